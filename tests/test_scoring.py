"""Token scores and cross-entropy against dense computations, PyTorch and the compiler's own account."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from surgery_r1_jax import scoring

# Jitted once here: tests that agree on shapes and settings share a compilation.
score_tokens = jax.jit(scoring.score_tokens, static_argnames="chunk")
cross_entropy = jax.jit(scoring.cross_entropy, static_argnames=("smoothing_sigma", "chunk"))

B, L, D, V = 3, 13, 8, 29
NUMBERS = np.where((np.arange(V) >= 4) & (np.arange(V) < 20), np.arange(V) - 4, -1).astype(np.int32)  # ids 4..19


def draw(seed=0, dtype=jnp.float32, vocabulary=V):
    rng = np.random.default_rng(seed)
    hidden_BLD = jnp.asarray(rng.normal(size=(B, L, D)), dtype)
    unembed_VD = jnp.asarray(rng.normal(size=(vocabulary, D)), jnp.float32)
    target_BL = jnp.asarray(rng.integers(0, vocabulary, (B, L)), jnp.int32)
    weight_BL = jnp.asarray(rng.uniform(0.2, 2.0, (B, L)) * (rng.random((B, L)) > 0.3), jnp.float32)
    return hidden_BLD, unembed_VD, target_BL, weight_BL


def dense_logp(hidden_BLD, unembed_VD, temperature=1.0, allowed_V=None):
    """Log-probabilities of every id in NumPy float64."""
    logits = np.asarray(hidden_BLD, np.float64) @ np.asarray(unembed_VD, np.float64).T / temperature
    if allowed_V is not None:
        logits[..., ~np.asarray(allowed_V)] = -np.inf
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def pick(logp_BLV, target_BL):
    return np.take_along_axis(logp_BLV, np.asarray(target_BL)[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [4, 64])
def test_scores_equal_a_dense_log_softmax_for_every_chunk(chunk):
    hidden, unembed, target, _ = draw()
    scores = score_tokens(hidden, unembed, target, temperature=0.7, chunk=chunk)
    logp = dense_logp(hidden, unembed, 0.7)
    np.testing.assert_allclose(scores.logp_BL, pick(logp, target), atol=2e-5)
    np.testing.assert_allclose(scores.entropy_BL, -(np.exp(logp) * logp).sum(-1), atol=2e-5)
    np.testing.assert_array_equal(scores.top1_BL, logp.argmax(-1) == target)
    assert scores.logp_BL.dtype == scores.entropy_BL.dtype == jnp.float32


def test_ids_that_are_not_allowed_have_no_probability_and_nothing_becomes_infinite():
    hidden, unembed, target, _ = draw()
    allowed = np.arange(V) % 3 != 0
    scores = score_tokens(hidden, unembed, target, temperature=0.5, allowed_V=jnp.asarray(allowed))
    logp = dense_logp(hidden, unembed, 0.5, allowed)
    inside = allowed[np.asarray(target)]
    np.testing.assert_allclose(scores.logp_BL[inside], pick(logp, target)[inside], atol=2e-5)
    assert np.all(scores.logp_BL[~inside] < -1e8) and np.all(np.isfinite(scores.logp_BL))
    entropy = -np.where(allowed, np.exp(logp) * np.where(allowed, logp, 0), 0).sum(-1)
    np.testing.assert_allclose(scores.entropy_BL, entropy, atol=2e-5)
    gradient = jax.grad(lambda w: score_tokens(hidden, w, target, allowed_V=jnp.asarray(allowed)).logp_BL.sum())(
        unembed
    )
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[~allowed]) and np.any(gradient[allowed])


def test_gradients_equal_those_of_the_dense_computation():
    hidden, unembed, target, weight = draw()

    def dense(hidden, unembed):
        logp = jax.nn.log_softmax(jnp.einsum("bld,vd->blv", hidden, unembed) / 0.8)
        return jnp.sum(weight * jnp.take_along_axis(logp, target[..., None], -1)[..., 0])

    def chunked(hidden, unembed):
        scores = score_tokens(hidden, unembed, target, temperature=0.8, chunk=5)
        return jnp.sum(weight * scores.logp_BL) + jnp.sum(scores.entropy_BL)  # the entropy is a constant

    want, have = (jax.jit(jax.grad(f, (0, 1)))(hidden, unembed) for f in (dense, chunked))
    for a, b in zip(want, have, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_cross_entropy_and_its_gradients_equal_those_of_torch():
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    hidden, unembed, target, weight = draw()
    h, w = (torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in (hidden, unembed))
    nll = torch.nn.functional.cross_entropy(
        (h @ w.T).reshape(-1, V), torch.tensor(np.asarray(target)).reshape(-1).long(), reduction="none"
    )
    loss = (nll * torch.tensor(np.asarray(weight, np.float64)).reshape(-1)).sum()
    loss.backward()

    def ours(hidden, unembed):
        return cross_entropy(hidden, unembed, target, weight, chunk=4).nll

    value, (grad_hidden, grad_unembed) = jax.value_and_grad(ours, (0, 1))(hidden, unembed)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    np.testing.assert_allclose(grad_hidden, h.grad.numpy(), atol=1e-5)
    np.testing.assert_allclose(grad_unembed, w.grad.numpy(), atol=1e-5)


def test_sums_count_only_tokens_with_weight_and_padding_gets_no_gradient():
    hidden, unembed, target, weight = draw()
    sums = cross_entropy(hidden, unembed, target, weight)
    used = np.asarray(weight) > 0
    hits = dense_logp(hidden, unembed).argmax(-1) == np.asarray(target)
    assert (sums.tokens, sums.correct) == (used.sum(), (hits & used).sum())
    np.testing.assert_allclose(sums.weight, np.asarray(weight).sum(), rtol=1e-6)
    gradient = jax.grad(lambda h: cross_entropy(h, unembed, target, weight).nll)(hidden)
    assert not np.any(gradient[~used]) and np.all(np.any(gradient[used], -1))


def test_the_likeliest_target_counts_as_correct():
    hidden, unembed, _, weight = draw()
    best = jnp.asarray(dense_logp(hidden, unembed).argmax(-1), jnp.int32)
    sums = cross_entropy(hidden, unembed, best, weight)
    assert sums.correct == sums.tokens > 0


@pytest.mark.parametrize(("cut", "chunk", "sigma"), [(1, 4, 0.0), (6, 5, 1.5)])
def test_sums_of_parts_are_the_sums_of_the_whole(cut, chunk, sigma):
    hidden, unembed, target, weight = draw(1)

    def sums(part):
        return cross_entropy(
            hidden[:, part],
            unembed,
            target[:, part],
            weight[:, part],
            number_V=jnp.asarray(NUMBERS),
            smoothing_sigma=sigma,
            chunk=chunk,
        )

    parts = jax.tree.map(jnp.add, sums(slice(0, cut)), sums(slice(cut, L)))
    for a, b in zip(parts, sums(slice(0, L)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]), st.floats(0.05, 5.0))
def test_scores_are_probabilities_whatever_the_logits(seed, size, temperature):
    hidden, unembed, target, _ = draw(seed)
    scores = score_tokens(size * hidden, unembed, target, temperature=temperature, chunk=4)
    assert np.all(scores.logp_BL <= 1e-6) and np.all(np.isfinite(scores.logp_BL))
    assert np.all((scores.entropy_BL >= -1e-5) & (scores.entropy_BL <= np.log(V) + 1e-5))


def test_padding_never_changes_the_loss():
    hidden, unembed, target, weight = draw()
    longer = [jnp.pad(x, [(0, 2), (0, 9)] + [(0, 0)] * (x.ndim - 2)) for x in (hidden, target, weight)]
    short = cross_entropy(hidden, unembed, target, weight, chunk=4)
    long = cross_entropy(longer[0], unembed, longer[1], longer[2], chunk=4)
    for a, b in zip(short, long, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def smoothed_nll(logp_V, target, sigma):
    """The loss of one token by the definition, in plain Python."""
    if sigma == 0 or NUMBERS[target] < 0:
        return -logp_V[target]
    share = {}
    for token, number in enumerate(NUMBERS):
        gap = number - NUMBERS[target]
        if number >= 0 and abs(gap) <= 3 * sigma:
            share[token] = np.exp(-(gap**2) / (2 * sigma**2))
    return -sum(weight / sum(share.values()) * logp_V[token] for token, weight in share.items())


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0, 2.5])
def test_numbers_are_smoothed_over_their_neighbours_and_words_are_not(sigma):
    hidden, unembed, target, weight = draw(2)
    target = target.at[0, :6].set(jnp.asarray([4, 5, 11, 19, 2, 25]))  # ends, middle and two words
    sums = cross_entropy(hidden, unembed, target, weight, number_V=jnp.asarray(NUMBERS), smoothing_sigma=sigma, chunk=5)
    logp = dense_logp(hidden, unembed)
    want = sum(
        float(weight[b, t]) * smoothed_nll(logp[b, t], int(target[b, t]), sigma) for b in range(B) for t in range(L)
    )
    np.testing.assert_allclose(sums.nll, want, rtol=2e-6)


def test_a_near_miss_costs_less_than_a_far_miss_only_when_smoothed():
    unembed = jnp.eye(V, dtype=jnp.float32)
    hidden = 8.0 * jnp.stack([unembed[12], unembed[18]])[:, None]  # sure of 8, sure of 14
    target, weight = jnp.full((2, 1), 11, jnp.int32), jnp.ones((2, 1), jnp.float32)  # the truth is 7

    def nll(row, sigma):
        return float(
            cross_entropy(
                hidden[row : row + 1],
                unembed,
                target[row : row + 1],
                weight[row : row + 1],
                number_V=jnp.asarray(NUMBERS),
                smoothing_sigma=sigma,
            ).nll
        )

    assert nll(0, 1.0) < nll(1, 1.0) - 1
    assert abs(nll(0, 0.0) - nll(1, 0.0)) < 1e-5


def test_numbers_that_are_not_allowed_get_no_share():
    hidden, unembed, _, weight = draw(3)
    target = jnp.full((B, L), 10, jnp.int32)
    allowed = jnp.asarray(np.arange(V) != 11)
    sums = cross_entropy(
        hidden,
        unembed,
        target,
        weight,
        allowed_V=allowed,
        number_V=jnp.asarray(NUMBERS),
        smoothing_sigma=1.0,
    )
    assert 0 < sums.nll < 1e4


def test_bfloat16_hidden_states_give_float32_scores_close_to_the_exact_ones():
    hidden, unembed, target, _ = draw(dtype=jnp.bfloat16)
    scores = score_tokens(hidden, unembed, target, chunk=4)
    kernel = np.asarray(unembed.astype(jnp.bfloat16), np.float64)
    exact = pick(dense_logp(np.asarray(hidden, np.float64), kernel), target)
    assert scores.logp_BL.dtype == jnp.float32
    np.testing.assert_allclose(scores.logp_BL, exact, atol=1e-4)  # bfloat16 logits would be off by 0.03


def test_a_bfloat16_kernels_gradient_is_summed_in_float32():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, 256, D)), jnp.float32)
    unembed = jnp.asarray(rng.normal(size=(V, D)), jnp.bfloat16)
    target = jnp.asarray(rng.integers(0, V, (1, 256)), jnp.int32)

    def gradient(kernel, chunk):
        return jax.grad(lambda w: cross_entropy(hidden, w, target, jnp.ones((1, 256)), chunk=chunk).nll)(kernel).astype(
            jnp.float32
        )

    exact = gradient(unembed.astype(jnp.float32), 256)
    np.testing.assert_allclose(gradient(unembed, 1), exact, rtol=2**-8, atol=1e-3)


def test_nothing_as_large_as_the_logits_exists_in_either_direction():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 96, 8), (251, 8))]
    target = jnp.zeros((2, 96), jnp.int32)

    def loss(hidden, unembed):
        scores = score_tokens(hidden, unembed, target, chunk=8)
        weighted = cross_entropy(hidden, unembed, target, jnp.ones((2, 96)), chunk=8)
        return scores.logp_BL.sum() + weighted.nll

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (var.aval.size for var in eqn.outvars)
            for inner in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    found = list(sizes(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*shapes).jaxpr))
    assert 2 * 8 * 251 in found  # the walk does see the logits of one chunk
    assert max(found) < 2 * 96 * 251 / 4


def test_chunks_shrink_the_memory_that_the_compiler_plans():
    length, vocabulary = 256, 4096
    hidden = jax.ShapeDtypeStruct((1, length, 16), jnp.float32)
    unembed = jax.ShapeDtypeStruct((vocabulary, 16), jnp.float32)
    target = jnp.zeros((1, length), jnp.int32)

    def planned(chunk):
        def loss(h, w):
            return score_tokens(h, w, target, chunk=chunk).logp_BL.sum()

        return jax.jit(jax.grad(loss, (0, 1))).lower(hidden, unembed).compile().memory_analysis().temp_size_in_bytes

    whole, chunked = planned(length), planned(16)
    assert whole > 4 * length * vocabulary
    assert chunked < whole / 5


@jax.jit
@partial(jax.value_and_grad, argnums=(0, 1))
def sharded_step(hidden, unembed, target, weight):
    scores = scoring.score_tokens(hidden, unembed, target, chunk=4)
    numbers = {"number_V": jnp.arange(32), "smoothing_sigma": 1.0}
    sums = scoring.cross_entropy(hidden, unembed, target, weight, chunk=4, **numbers)
    return sums.nll + jnp.sum(weight * scores.logp_BL) + sums.correct


@pytest.mark.parametrize("kernel_spec", [P(None, None), P("tensor", None)])
def test_of_a_chunk_only_hidden_states_travel_and_no_logits_nor_the_kernel(kernel_spec):
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    hidden, unembed, target, weight = draw(vocabulary=32)
    arguments = [jnp.concatenate([x, x[:1]]) for x in (hidden, target, weight)]
    arguments.insert(1, unembed)
    specs = [P("data"), kernel_spec, P("data"), P("data")]
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arguments, specs, strict=True)]

    compiled = sharded_step.lower(*placed).compile()
    sizes = [
        math.prod(int(side) for side in shape.split(",") if side)
        for line in compiled.as_text().splitlines()
        if " all-gather" in line.split("(%")[0]
        for shape in re.findall(r"\w\d+\[([\d,]*)\]", line.split(" all-gather")[0])
    ]
    assert max(sizes) <= 4 * 4 * D < min(4 * 4 * 32, 32 * D)  # frames, tokens of a chunk; the vocabulary is 32
    assert "all-reduce" in compiled.as_text()
    value, gradients = compiled(*placed)
    want, want_gradients = sharded_step(*arguments)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for a, b in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_scoring_holds_under_strict_ranks_and_types():
    hidden, unembed, target, weight = draw()
    scores = partial(scoring.score_tokens, temperature=0.9, allowed_V=jnp.ones(V, bool))
    sums = partial(scoring.cross_entropy, number_V=jnp.asarray(NUMBERS), smoothing_sigma=1.0)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(scores, hidden, unembed, target)
        jax.eval_shape(sums, hidden, unembed, target, weight)


def test_no_tokens_are_no_loss():
    _, unembed, _, _ = draw()
    empty = jnp.zeros((2, 0))
    sums = cross_entropy(jnp.zeros((2, 0, D)), unembed, empty.astype(jnp.int32), empty)
    assert [float(x) for x in sums] == [0, 0, 0, 0]
