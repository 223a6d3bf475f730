"""Policy losses against the papers' formulas in PyTorch and NumPy loops, and the laws that any of them obeys."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_r1_jax import config, grpo, objectives, options
from surgery_r1_jax.errors import InputError

B, J, T, LONGEST = 2, 4, 6, 8
PRESETS = sorted(options.PRESETS)


class Case(NamedTuple):
    """One batch for `policy_loss`, with an empty lane in it."""

    logp: np.ndarray
    old: np.ndarray
    advantage: np.ndarray
    mask: np.ndarray
    ref: np.ndarray

    def frames(self, rows):
        return Case(*(x[rows] for x in self))


def draw(seed=0, spread=0.4, frames=B):
    rng = np.random.default_rng(seed)
    logp = rng.uniform(-3, -0.1, (frames, J, T))
    old, ref = logp + spread * rng.normal(size=(2, frames, J, T))
    mask = np.arange(T) < rng.integers(1, T + 1, (frames, J))[..., None]
    mask[0, 1] = False
    advantage = rng.normal(size=(frames, J))
    return Case(*(x.astype(np.float32) for x in (logp, old, advantage)), mask, ref.astype(np.float32))


_totals = jax.jit(objectives.totals)


def whole(mask, parts=1):
    return _totals(mask, max_completion=LONGEST, parts=parts)


def settings_of(name, **changes):
    return options.Objective(preset=name, **({"beta": 0.1} | changes))


@partial(jax.jit, static_argnames="objective")
def _value_and_grad(logp, old, advantage, mask, ref, counted, objective):
    def loss(logp):
        named = {"ref_logp_BJT": ref, "entropy_BJT": -logp}
        return objectives.policy_loss(logp, old, advantage, mask, counted, objective, **named)

    return jax.value_and_grad(loss, has_aux=True)(logp)


def evaluate(case, objective, counted=None):
    """Loss, statistics and gradient of a case, against the totals of a batch (default: its own)."""
    (loss, stats), grad = jax.device_get(_value_and_grad(*case, counted or whole(case.mask), objective))
    return loss, stats, grad


# The papers' objectives, one sequence after the other; `xp` is torch or NumPy. All return the loss.
# r: ratio, A: advantage, o: number of tokens of a sequence, k: KL term of each token.


def k3(xp, logp, ref):
    return xp.exp(ref - logp) - (ref - logp) - 1


def clipped_gain(xp, r, A, low, high):
    return xp.minimum(r * A, r.clip(1 - low, 1 + high) * A)


def paper_grpo(xp, sequences, beta):
    """2402.03300 equation 3: mean over tokens, then over sequences."""
    total = 0.0
    for logp, old, ref, A in sequences:
        gain = clipped_gain(xp, xp.exp(logp - old), A, 0.2, 0.2) - beta * k3(xp, logp, ref)
        total = total + gain.sum() / len(logp)
    return -total / len(sequences)


def paper_dr_grpo(xp, sequences, beta):
    """2503.20783: no division by the length; a constant instead."""
    total = 0.0
    for logp, old, ref, A in sequences:
        total = total + (clipped_gain(xp, xp.exp(logp - old), A, 0.2, 0.2) - beta * k3(xp, logp, ref)).sum()
    return -total / (LONGEST * len(sequences))


def token_mean(xp, sequences, beta, high):
    total = 0.0
    for logp, old, ref, A in sequences:
        total = total + (clipped_gain(xp, xp.exp(logp - old), A, 0.2, high) - beta * k3(xp, logp, ref)).sum()
    return -total / sum(len(sequence[0]) for sequence in sequences)


def paper_dapo(xp, sequences, beta):
    """2503.14476 equation 8: one mean over all tokens, a higher upper bound."""
    return token_mean(xp, sequences, beta, 0.28)


def paper_bnpo(xp, sequences, beta):
    """TRL: the token mean of the batch at hand."""
    return token_mean(xp, sequences, beta, 0.2)


def paper_gspo(xp, sequences, beta):
    """2507.18071 equations 5 and 7: the length-normalised ratio of whole sequences."""
    total = 0.0
    for logp, old, ref, A in sequences:
        s = xp.exp((logp - old).sum() / len(logp))
        total = total + clipped_gain(xp, s, A, 3e-4, 4e-4) - beta * k3(xp, logp, ref).sum() / len(logp)
    return -total / len(sequences)


def paper_cispo(xp, sequences, beta):
    """2506.13585 equation 4: the clipped ratio is a constant weight of the log-probability."""
    total = 0.0
    for logp, old, ref, A in sequences:
        r = xp.exp(logp - old)
        r = (r.detach() if hasattr(r, "detach") else r).clip(0, 5)
        total = total + (r * A * logp - beta * k3(xp, logp, ref)).sum()
    return -total / sum(len(sequence[0]) for sequence in sequences)


PAPER = {name: globals()[f"paper_{name}"] for name in PRESETS}


def ragged(case):
    """The sequences of a batch, without padding."""
    lanes = [(b, j) for b in range(len(case.mask)) for j in range(J) if case.mask[b, j].any()]
    used = [case.mask[i] for i in lanes]
    return [
        (case.logp[i][m], case.old[i][m], case.ref[i][m], case.advantage[i]) for i, m in zip(lanes, used, strict=True)
    ]


def exactly(case, convert):
    """The case in float64, its mask as it is."""
    return Case(*(convert(x if x.dtype == bool else x.astype(np.float64)) for x in case))


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_its_papers_formula(name):
    case = draw()
    want = PAPER[name](np, ragged(exactly(case, np.asarray)), 0.1)
    np.testing.assert_allclose(evaluate(case, settings_of(name))[0], want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_each_presets_gradient_is_torchs(name):
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    case = draw(1)
    theirs = exactly(case, torch.tensor)
    theirs.logp.requires_grad_()
    PAPER[name](torch, ragged(theirs), 0.1).backward()
    grad = evaluate(case, settings_of(name))[2]
    np.testing.assert_allclose(grad, theirs.logp.grad.numpy(), rtol=1e-4, atol=1e-6)
    assert np.any(grad)


@pytest.mark.parametrize("name", PRESETS)
def test_the_first_update_is_reinforce(name):
    case, objective = draw(2), settings_of(name, beta=0.0)
    case = case._replace(old=case.logp)
    length, lanes = case.mask.sum(-1, keepdims=True), case.mask.any(-1).sum()
    number = {"sequence": np.maximum(length, 1) * lanes, "constant": LONGEST * lanes}
    want = -np.where(case.mask, case.advantage[..., None] / number.get(objective.aggregate, length.sum()), 0)
    _, stats, grad = evaluate(case, objective)
    np.testing.assert_allclose(grad, want, rtol=1e-6)
    for end in ("min", "mean", "max"):
        assert stats[f"sampling/importance_sampling_ratio/{end}"] == pytest.approx(1, abs=1e-6)
    assert stats["clip_ratio/region_mean"] == 0


def test_without_old_log_probabilities_the_policy_is_its_own_old_one():
    case, objective = draw(2), settings_of("gspo")
    a, b = (evaluate(case._replace(old=old), objective) for old in (None, case.logp))
    np.testing.assert_array_equal(a[2], b[2])
    assert a[1]["sampling/importance_sampling_ratio/max"] == 1


@pytest.mark.parametrize("name", PRESETS)
def test_equal_rewards_without_kl_give_exactly_zero_gradient(name):
    case = draw(3)
    loss, _, grad = evaluate(case._replace(advantage=0 * case.advantage), settings_of(name, beta=0.0))
    assert loss == 0 and not np.any(grad)


SPLITTABLE = [name for name in PRESETS if name != "bnpo"]


@pytest.mark.parametrize("name", SPLITTABLE)
def test_a_batch_cut_into_parts_has_the_loss_gradient_and_statistics_of_the_whole(name):
    case, objective = draw(4, frames=4), settings_of(name)
    loss, stats, grad = evaluate(case, objective)
    halves = [evaluate(case.frames(rows), objective, whole(case.mask)) for rows in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(halves[0][0] + halves[1][0], loss, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(np.concatenate([half[2] for half in halves]), grad, rtol=1e-5, atol=1e-8)
    merged = objectives.merge(halves[0][1], halves[1][1])
    assert merged.keys() == stats.keys()
    for key in stats:
        np.testing.assert_allclose(merged[key], stats[key], rtol=1e-5, atol=1e-7, err_msg=key)


def test_bnpo_is_the_mean_of_its_parts_token_means():
    case, objective = draw(5, frames=4), settings_of("bnpo")
    halves = [case.frames(slice(0, 2)), case.frames(slice(2, 4))]
    alone = [evaluate(half, objective)[0] for half in halves]
    shares = [evaluate(half, objective, whole(case.mask, parts=2))[0] for half in halves]
    np.testing.assert_allclose(sum(shares), np.mean(alone), rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.sampled_from(PRESETS), st.sampled_from([0.0, 0.3, 5.0, 200.0, 1e9]))
def test_loss_gradient_and_statistics_are_finite_however_far_the_policies_drift(seed, name, spread):
    case = draw(seed, spread)
    loss, stats, grad = evaluate(case, settings_of(name))
    assert np.isfinite(loss) and np.all(np.isfinite(grad)) and all(np.isfinite(x) for x in stats.values())
    assert not np.any(grad[~case.mask])
    assert 0 <= stats["clip_ratio/region_mean"] <= 1.000001 and 0 <= stats["kl_bounded_ratio"] <= 1.000001
    assert stats["kl"] >= -1e-5


@pytest.mark.parametrize("name", PRESETS)
def test_what_the_mask_hides_changes_nothing_not_even_nan(name):
    case = draw(6)
    holes = Case(*(x if x.ndim < 3 or x.dtype == bool else np.where(case.mask, x, np.float32(np.nan)) for x in case))
    holes = holes._replace(advantage=case.advantage.copy())
    holes.advantage[0, 1] = np.nan  # the empty lane
    a, b = evaluate(case, settings_of(name)), evaluate(holes, settings_of(name))
    np.testing.assert_array_equal(a[2], b[2])
    assert a[0] == b[0]


@pytest.mark.parametrize("name", PRESETS)
def test_a_fully_padded_batch_has_zero_loss_and_zero_gradient(name):
    case = draw(7)
    loss, stats, grad = evaluate(case._replace(mask=np.zeros_like(case.mask)), settings_of(name))
    assert loss == 0 and all(np.isfinite(x) for x in stats.values()) and not np.any(grad)


@pytest.mark.parametrize("name", PRESETS)
def test_padding_frames_and_the_order_of_frames_change_nothing(name):
    case = draw(8)
    longer = Case(*(np.concatenate([x[::-1], np.zeros_like(x)]) for x in case))
    a, b = evaluate(case, settings_of(name))[0], evaluate(longer, settings_of(name))[0]
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def one_token(ratio, advantage, **changes):
    """Loss, gradient and statistics of a single token with this ratio."""
    logp = np.full((1, 1, 1), -1.0, np.float32)
    old = logp - np.float32(math.log(ratio))
    case = Case(logp, old, np.full((1, 1), advantage, np.float32), np.ones((1, 1, 1), bool), logp)
    loss, stats, grad = evaluate(case, settings_of("grpo", beta=0.0, **changes))
    return float(loss), float(grad[0, 0, 0]), stats


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "low", "high"),
    [
        (1.1, 1.0, -1.1, -1.1, 0, 0),
        (1.5, 1.0, -1.2, 0.0, 0, 1),  # risen enough: held
        (1.5, -1.0, 1.5, 1.5, 0, 0),  # risen though bad: pushed down
        (0.5, 1.0, -0.5, -0.5, 0, 0),
        (0.5, -1.0, 0.8, 0.0, 1, 0),  # fallen enough: held
    ],
)
def test_the_clip_by_hand(ratio, advantage, loss, slope, low, high):
    have_loss, have_slope, stats = one_token(ratio, advantage)
    assert have_loss == pytest.approx(loss, rel=1e-5) and have_slope == pytest.approx(slope, rel=1e-5)
    assert (stats["clip_ratio/low_mean"], stats["clip_ratio/high_mean"]) == (low, high)


def test_the_dual_clip_caps_only_bad_tokens_that_rose():
    assert one_token(9.0, -1.0, delta=3.0)[:2] == (pytest.approx(3.0), 0.0)
    assert one_token(2.0, -1.0, delta=3.0)[:2] == (pytest.approx(2.0), pytest.approx(2.0))
    assert one_token(9.0, 1.0, delta=3.0)[0] == pytest.approx(-1.2)


def test_cispo_never_drops_a_token():
    _, slope, stats = one_token(50.0, 1.0, surrogate="cispo", epsilon_low=1.0, epsilon_high=4.0)
    assert slope == pytest.approx(-5.0) and stats["clip_ratio/high_mean"] == 1


def test_k3_is_analytic_inside_the_bound_and_straight_outside():
    d = np.linspace(-12, 12, 97)
    have, outside = objectives.kl_k3(jnp.zeros(97), jnp.asarray(d, jnp.float32), 5.0)
    near = np.clip(d, -5, 5)
    np.testing.assert_allclose(have, np.exp(near) - near - 1 + np.expm1(near) * (d - near), rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(outside, np.abs(d) > 5)


@settings(deadline=None, max_examples=100)
@given(st.floats(-1e6, 1e6), st.sampled_from([1.0, 10.0, 40.0]))
def test_k3s_gradient_is_finite_not_zero_and_the_slope_of_its_value(d, bound):
    d = float(np.float32(d))
    slope = float(k3_slope(jnp.float32(-d), jnp.float32(0.0), bound))
    assert np.isfinite(slope)
    want = -math.expm1(min(max(d, -bound), bound))
    assert slope == pytest.approx(want, rel=1e-5, abs=1e-30)
    if abs(d) > 1e-3:
        assert slope != 0 and (slope < 0) == (d > 0)  # drawn back towards the reference


k3_slope = jax.jit(jax.grad(lambda logp, ref, bound: objectives.kl_k3(logp, ref, bound)[0]))


def test_k3s_gradient_equals_finite_differences_also_across_the_bound():
    with jax.enable_x64():
        d = jnp.asarray([-30.0, -10.5, -10.0, -9.5, -3.0, 0.5, 9.5, 10.0, 10.5, 40.0], jnp.float64)

        @jax.jit
        def value(logp):
            return objectives.kl_k3(logp, jnp.zeros_like(d), 10.0)[0]

        step = 1e-5
        differences = (value(-d + step) - value(-d - step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(lambda x: value(x).sum())(-d), differences, rtol=1e-5)


def test_kl_is_measured_without_being_charged_when_beta_is_zero():
    case = draw(9)
    loss, stats, _ = evaluate(case, settings_of("dapo", beta=0.0))
    assert loss == stats["policy_loss"]
    used = case.mask
    want = k3(np, case.logp[used].astype(np.float64), case.ref[used]).mean()
    np.testing.assert_allclose(stats["kl"], want, rtol=1e-5)
    charged = evaluate(case, settings_of("dapo"))[0]
    np.testing.assert_allclose(charged, loss + 0.1 * want, rtol=1e-5)


def test_beta_without_a_reference_is_refused():
    case = draw()
    with pytest.raises(ValueError, match="beta > 0 needs ref_logp_BJT"):
        objectives.policy_loss(*case[:4], whole(case.mask), settings_of("grpo"))


def test_statistics_are_token_means():
    case = draw(10)
    used, logp = case.mask, case.logp
    ratio = np.exp(logp - case.old)
    A = np.broadcast_to(case.advantage[..., None], ratio.shape)
    want = {
        "entropy": -logp[used].mean(),
        "clip_ratio/low_mean": ((ratio < 0.8) & (A < 0))[used].mean(),
        "clip_ratio/high_mean": ((ratio > 1.28) & (A > 0))[used].mean(),
        "sampling/importance_sampling_ratio/mean": ratio[used].mean(),
        "sampling/importance_sampling_ratio/min": ratio[used].min(),
        "sampling/importance_sampling_ratio/max": ratio[used].max(),
    }
    assert want["clip_ratio/low_mean"] > 0 and want["clip_ratio/high_mean"] > 0
    stats = evaluate(case, settings_of("dapo", beta=0.0))[1]
    for key, value in want.items():
        np.testing.assert_allclose(stats[key], value, rtol=1e-5, err_msg=key)


def test_only_scorable_and_whole_completions_enter_the_loss():
    mask = jnp.ones((1, 3, T), bool)
    scorable, truncated = jnp.asarray([[True, True, False]]), jnp.asarray([[False, True, False]])
    kept = objectives.loss_mask(mask, scorable, truncated, options.Objective(preset="grpo"))
    np.testing.assert_array_equal(kept.any(-1), [[True, True, False]])
    kept = objectives.loss_mask(mask, scorable, truncated, options.Objective(preset="dapo"))
    np.testing.assert_array_equal(kept.any(-1), [[True, False, False]])
    assert whole(kept).sequences == 1 and whole(kept).tokens == T


def test_a_preset_fills_in_what_is_not_given():
    assert options.Objective().beta == 0.04
    assert options.Objective(preset="dapo").epsilon_high == 0.28
    changed = config.parse(options.Objective, "preset: gspo\nepsilon_high: 0.001\n", "run.yaml")
    assert (changed.ratio, changed.epsilon_low, changed.epsilon_high) == ("sequence", 3e-4, 0.001)
    assert config.parse(options.Objective, config.dump(changed), "saved.yaml") == changed
    for name in PRESETS:
        assert hash(options.Objective(preset=name)) == hash(options.Objective(preset=name))


@pytest.mark.parametrize(
    "text", ["preset: gpro", "preset: [grpo]", "epsilon: 0.2", "delta: 1.1", "beta: -1", "kl_bound: 90"]
)
def test_mistaken_settings_are_refused_with_their_line(text):
    with pytest.raises(InputError, match=r"run.yaml"):
        config.parse(options.Objective, text, "run.yaml")


@pytest.mark.parametrize("name", PRESETS)
def test_objectives_hold_under_strict_ranks_and_types(name):
    case, objective = draw(), settings_of(name, delta=8.0)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(partial(_value_and_grad, objective=objective), *case, whole(case.mask))


def test_the_updates_of_a_step_are_told_together():
    one = {
        "loss": 1.0,
        "ratio/min": 0.5,
        "ratio/max": 2.0,
        "ratio/mean": 1.0,
        "skipped_steps": 4,
        "skipped_in_a_row": 2,
    }
    other = {"loss": 4.0, "ratio/min": 0.7, "ratio/max": 3.0, "ratio/mean": 2.0, "skipped_steps": 4}
    told = grpo.over_updates([one, other | {"skipped_in_a_row": 0}])  # a sound one after a bad one hides nothing
    wanted = {"loss": 2.5, "ratio/min": 0.5, "ratio/max": 3.0, "ratio/mean": 1.5, "skipped_steps": 4}
    assert jax.tree.map(float, told) == wanted | {"skipped_in_a_row": 2}
    assert grpo.over_updates([one]) is one
