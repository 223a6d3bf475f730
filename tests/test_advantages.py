"""Advantages against hand-worked numbers, NumPy loops and everything a reward can be."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_r1_jax import advantages

B, Q, G = 2, 3, 4
GROUPS = jnp.asarray(np.tile(np.repeat(np.arange(Q), G), (B, 1)), jnp.int32)
VALID = jnp.ones((B, Q * G), bool)

from_rewards = jax.jit(advantages.from_rewards, static_argnames=("num_groups", "scale"))
from_terms = jax.jit(advantages.from_terms, static_argnames="num_groups")


def compare(reward, valid=VALID, scale="group", **kwargs):
    return from_rewards(jnp.asarray(reward, jnp.float32), GROUPS, valid, num_groups=Q, scale=scale, **kwargs)


def by_loops(reward, counted, scale="group"):
    """The definition, one question at a time, in float64."""
    reward, counted = np.asarray(reward, np.float64), np.asarray(counted)
    value = np.zeros_like(reward)
    for b in range(B):
        for q in range(Q):
            rows = [j for j in range(Q * G) if GROUPS[b, j] == q and counted[b, j]]
            if len(rows) < 2:
                continue
            mine = reward[b, rows]
            spread = {"group": np.std(mine, ddof=1), "batch": np.std(reward[counted], ddof=1), "none": None}[scale]
            value[b, rows] = (mine - mine.mean()) / (1 if spread is None else spread + 1e-4)
    return value


def test_the_published_example_is_reproduced():
    group = jnp.zeros((1, 4), jnp.int32)
    have = from_rewards(jnp.asarray([[3.2, 1, 1, 0]]), group, jnp.ones((1, 4), bool), num_groups=1)
    np.testing.assert_allclose(have.value_BJ[0], [1.405697, -0.221952, -0.221952, -0.961793], atol=1e-6)
    np.testing.assert_allclose(have.stats["reward_std"], 1.351542, rtol=1e-6)


def test_the_deviation_is_torchs():
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    reward = np.random.default_rng(0).normal(size=(B, Q * G)).astype(np.float32)
    grouped = torch.tensor(reward).reshape(B * Q, G)
    want = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    np.testing.assert_allclose(compare(reward).value_BJ, want.reshape(B, -1), atol=1e-5)
    np.testing.assert_allclose(compare(reward).stats["reward_std"], grouped.std(1).mean(), rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.sampled_from(["group", "batch", "none"]))
def test_any_mixture_of_valid_lanes_equals_the_loops(seed, scale):
    rng = np.random.default_rng(seed)
    reward = rng.integers(0, 4, (B, Q * G)) / rng.choice([1, 3, 7])
    valid = rng.random((B, Q * G)) > 0.3
    baseline = rng.random((B, Q * G)) > 0.2
    have = compare(reward, jnp.asarray(valid), scale, baseline_BJ=jnp.asarray(baseline))
    np.testing.assert_allclose(have.value_BJ, by_loops(reward, valid & baseline, scale), atol=2e-4)
    if scale == "group":
        assert abs(float(jnp.sum(have.value_BJ))) < 1e-3


def test_questions_and_frames_never_mix():
    reward = np.random.default_rng(1).normal(size=(B, Q * G))
    other = reward.copy()
    other[0, :G] += 100 * np.arange(G)
    a, b = compare(reward).value_BJ, compare(other).value_BJ
    np.testing.assert_array_equal(a[0, G:], b[0, G:])
    np.testing.assert_array_equal(a[1], b[1])


def test_the_order_of_lanes_does_not_matter():
    rng = np.random.default_rng(2)
    reward, order = rng.normal(size=(B, Q * G)).astype(np.float32), rng.permutation(Q * G)
    shuffled = from_rewards(jnp.asarray(reward)[:, order], GROUPS[:, order], VALID, num_groups=Q)
    np.testing.assert_allclose(shuffled.value_BJ, compare(reward).value_BJ[:, order], atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.floats(-1e38, 1e38), st.sampled_from(["group", "batch", "none"]))
def test_equal_rewards_give_exactly_zero(value, scale):
    reward = np.full((B, Q * G), value, np.float32)
    reward[1] *= np.float32(0.3)
    have = compare(reward, scale=scale)
    assert not np.any(have.value_BJ)
    assert np.all(have.flat_BQ) and have.stats["flat_groups"] == B * Q
    assert have.stats["frac_reward_zero_std"] == 1


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.sampled_from([0.0, 1.0, -1e38, 1e38, 3e38, 1e-40, 0.1, np.nan, np.inf, -np.inf]),
        min_size=B * Q * G,
        max_size=B * Q * G,
    ),
    st.integers(0, 2 ** (B * Q * G) - 1),
)
def test_group_scaled_advantages_are_finite_and_bounded_for_every_reward(rewards, bits):
    reward = np.asarray(rewards, np.float32).reshape(B, Q * G)
    valid = np.asarray([bits >> i & 1 for i in range(B * Q * G)], bool).reshape(B, Q * G)
    have = compare(reward, jnp.asarray(valid))
    assert np.all(np.abs(have.value_BJ) <= (G - 1) / np.sqrt(G) + 1e-5)  # the most that one of G can stand out
    assert not np.any(have.value_BJ[~(valid & np.isfinite(reward))])
    assert all(np.isfinite(x) for x in have.stats.values())


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_rewards_of_1e38_give_finite_advantages(scale):
    reward = np.tile([1e38, -1e38, 0.0, 1.0], (B, Q)).astype(np.float32)
    have = compare(reward, scale=scale)
    assert np.all(np.isfinite(have.value_BJ)) and np.all(have.value_BJ[:, 0] > 0)
    assert all(np.isfinite(x) for x in have.stats.values())


def test_a_group_of_one_gets_exactly_zero():
    valid = np.ones((B, Q * G), bool)
    valid[0, 1:G] = False
    have = compare(np.random.default_rng(3).normal(size=(B, Q * G)), jnp.asarray(valid))
    assert not np.any(have.value_BJ[0, :G]) and have.flat_BQ[0, 0] and have.stats["flat_groups"] == 1


def test_unscorable_samples_are_masked_and_counted_and_leave_the_others_alone():
    reward = np.random.default_rng(4).normal(size=(B, Q * G)).astype(np.float32)
    reward[0, 1], reward[1, 5], reward[1, 6] = np.nan, np.inf, -np.inf
    valid = np.ones((B, Q * G), bool)
    valid[0, 0] = False
    reward[0, 0] = np.nan  # padding is not counted as unscorable
    have = compare(reward, jnp.asarray(valid))
    np.testing.assert_array_equal(have.scorable_BJ, valid & np.isfinite(reward))
    np.testing.assert_allclose(have.value_BJ, by_loops(reward, valid & np.isfinite(reward)), atol=1e-4)
    assert have.stats["unscorable"] == 3
    np.testing.assert_allclose(have.stats["reward"], reward[valid & np.isfinite(reward)].mean(), rtol=1e-5)


def test_a_batch_without_a_single_scorable_reward_is_all_zeros():
    have = compare(np.full((B, Q * G), np.nan))
    assert not np.any(have.value_BJ) and not np.any(have.scorable_BJ)
    assert have.stats["unscorable"] == B * Q * G and have.stats["groups"] == 0
    assert all(np.isfinite(x) for x in have.stats.values())


def test_truncated_completions_enter_the_baseline_unless_told_otherwise():
    reward = np.random.default_rng(5).normal(size=(B, Q * G)).astype(np.float32)
    complete = np.ones((B, Q * G), bool)
    complete[0, 0] = False
    with_it, without = compare(reward), compare(reward, baseline_BJ=jnp.asarray(complete))
    assert with_it.value_BJ[0, 0] != 0 and without.value_BJ[0, 0] == 0
    assert not np.allclose(with_it.value_BJ[0, 1:G], without.value_BJ[0, 1:G])
    assert without.scorable_BJ[0, 0]


def test_flat_groups_are_reported():
    reward = np.tile(np.arange(G), (B, Q)).astype(np.float32)
    reward[0, :G] = 0.4
    have = compare(reward)
    np.testing.assert_array_equal(have.flat_BQ, [[True, False, False], [False, False, False]])
    np.testing.assert_allclose(have.stats["frac_reward_zero_std"], 1 / 6)


def test_terms_normalised_first_equal_the_loops_and_do_not_drown_one_another():
    rng = np.random.default_rng(6)
    reward = np.stack([rng.integers(0, 2, (B, Q * G)), 0.01 * rng.random((B, Q * G))]).astype(np.float32)
    weight = np.asarray([1.0, 2.0])
    have = from_terms(jnp.asarray(reward), jnp.asarray(weight), GROUPS, VALID, num_groups=Q)
    total = sum(w * by_loops(r, VALID) for w, r in zip(weight, reward, strict=True))
    want = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(have.value_BJ, want, atol=1e-3)
    summed = compare(weight[0] * reward[0] + weight[1] * reward[1]).value_BJ

    def share(value):
        return abs(np.corrcoef(np.asarray(value).ravel(), by_loops(reward[1], VALID).ravel())[0, 1])

    assert share(have.value_BJ) > share(summed) + 0.2


def test_a_lane_with_any_unscorable_term_is_unscorable():
    reward = np.random.default_rng(7).random((2, B, Q * G)).astype(np.float32)
    reward[1, 0, 2] = np.nan
    have = from_terms(jnp.asarray(reward), jnp.ones(2), GROUPS, VALID, num_groups=Q)
    assert not have.scorable_BJ[0, 2] and have.value_BJ[0, 2] == 0 and have.stats["unscorable"] == 1
    assert np.all(np.isfinite(have.value_BJ))


def test_advantages_hold_under_strict_ranks_and_types():
    reward = jnp.ones((B, Q * G))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for scale in ("group", "batch", "none"):
            settings = {"num_groups": Q, "scale": scale, "baseline_BJ": VALID}
            jax.eval_shape(partial(advantages.from_rewards, **settings), reward, GROUPS, VALID)
        terms = partial(advantages.from_terms, num_groups=Q)
        jax.eval_shape(terms, reward[None], jnp.ones(1), GROUPS, VALID)
