"""A frame with branches is exact: the same logits and gradients as the repeated flat rows it stands for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import randomised
from toy import quick_compile  # noqa: F401

from surgery_r1_jax import model, options, scoring
from surgery_r1_jax.batch import padding_like


@pytest.fixture(scope="module")
def frames():
    return [randomised.frame(1), randomised.frame(2, grids=((6, 8),), lengths=(11, 7, 4, 8))]


@pytest.fixture(scope="module")
def config():
    return randomised.config()


@pytest.fixture(scope="module")
def params(config):
    return randomised.random_params(config)


def flat_rows(frames):
    """Each branch as a frame of its own: the prefix repeated."""
    return [f._replace(branches=[branch]) for f in frames for branch in f.branches]


def loss_of(config, compute=options.Compute()):
    graph, _ = model.build(config, compute)

    def loss(params, batch):
        net = model.bind(graph, params)
        return scoring.cross_entropy(
            net.scored(batch), net.unembed_VD, batch.score_target_BL, batch.score_weight_BL
        ).nll

    return loss


def largest_difference(ours, reference):
    """Over all leaves, relative to the largest gradient of the tree's leaf or one."""
    gaps = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-3)), ours, reference)
    return max(jax.tree.leaves(gaps))


PACKED = [[[0, 2], [1]], [[0], [1, 2], [3]]]  # several branches in a lane


@pytest.mark.parametrize("lanes", [None, PACKED], ids=["one branch a lane", "packed lanes"])
def test_logits_equal_flat_rows_for_ragged_branches(config, params, frames, lanes):
    shared = randomised.logits(config, params, randomised.batch(config, frames, lanes=lanes, P=140, T=24))
    flat = randomised.logits(config, params, randomised.batch(config, flat_rows(frames)))
    row = 0
    for b, f in enumerate(frames):
        per_frame = lanes[b] if lanes else [[i] for i in range(len(f.branches))]
        for i, branch in enumerate(f.branches):
            j = next(j for j, lane in enumerate(per_frame) if i in lane)
            at = sum(len(f.branches[k]) for k in per_frame[j][: per_frame[j].index(i)])
            ours = shared[b, j, at : at + len(branch)]
            # Logits reach 5, where float32 is 5e-7 apart; the sums of the tests' kernels lie up to 1.1e-5 from these.
            np.testing.assert_allclose(ours, flat[row, 0, : len(branch)], atol=2e-5, rtol=0)
            row += 1


@pytest.mark.parametrize("lanes", [None, PACKED], ids=["one branch a lane", "packed lanes"])
def test_every_gradient_leaf_equals_flat_rows_in_float32(config, params, frames, lanes):
    grad = jax.jit(jax.grad(loss_of(config)))
    shared = grad(params, randomised.batch(config, frames, lanes=lanes, P=140, T=24))
    flat = grad(params, randomised.batch(config, flat_rows(frames)))
    # Relative to the leaf's largest entry; 1e-5 of it is a few units in float32's last place after 500 tokens' sums.
    assert largest_difference(shared, flat) < 1e-5


def test_logits_and_gradients_equal_flat_rows_to_1e_10_in_float64(config, params, frames):
    compute = options.Compute(dtype="float64")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda p: jnp.asarray(np.asarray(p), jnp.float64), params)
        graph, _ = model.build(config, compute)

        def total(params, batch):
            net = model.bind(graph, params)
            logits = net.scored(batch) @ net.unembed_VD.T
            logp = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.score_target_BL[..., None], axis=-1)[..., 0]
            return -(logp * batch.score_weight_BL).sum()

        both = jax.jit(jax.value_and_grad(total))
        shared, shared_grad = both(wide, randomised.batch(config, frames, lanes=PACKED, P=140, T=24))
        flat, flat_grad = both(wide, randomised.batch(config, flat_rows(frames)))
        assert abs(float(shared - flat)) < 1e-10 * abs(float(flat))
        assert largest_difference(shared_grad, flat_grad) < 1e-10


def test_control_branches_that_see_each_other_are_caught(config, params, frames):
    batch = randomised.batch(config, frames, lanes=PACKED, P=140, T=24)
    merged = batch._replace(branch_segment_BJT=np.minimum(batch.branch_segment_BJT, 1))
    ours, leaking = (randomised.logits(config, params, b) for b in (batch, merged))
    assert np.abs(ours - leaking).max() > 1e-3


def test_remat_and_query_chunks_change_nothing(config, params, frames):
    batch = randomised.batch(config, frames, lanes=PACKED, P=140, T=24)
    want, want_grad = jax.jit(jax.value_and_grad(loss_of(config)))(params, batch)
    saving = options.Compute(remat=True, tower_remat=True, query_chunk=32)
    loss, grad = jax.jit(jax.value_and_grad(loss_of(config, saving)))(params, batch)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert largest_difference(grad, want_grad) < 1e-5


def test_padding_never_changes_the_loss(config, params, frames):
    loss = jax.jit(loss_of(config))
    tight = loss(params, randomised.batch(config, frames))
    roomy = loss(params, randomised.batch(config, frames, P=160, T=40, windows=40))
    np.testing.assert_allclose(tight, roomy, rtol=1e-6)


def test_padded_frames_and_lanes_give_zero_loss_and_finite_gradients(config, params, frames):
    batch = randomised.batch(config, frames)
    empty = padding_like(batch)
    loss, grad = jax.jit(jax.value_and_grad(loss_of(config)))(params, empty)
    assert loss == 0
    assert all(np.isfinite(leaf).all() and not leaf.any() for leaf in jax.tree.leaves(grad))

    both = type(batch)(*(np.concatenate([a, b]) for a, b in zip(batch, empty, strict=True)))
    want, want_grad = jax.jit(jax.value_and_grad(loss_of(config)))(params, batch)
    loss, grad = jax.jit(jax.value_and_grad(loss_of(config)))(params, both)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert largest_difference(grad, want_grad) < 1e-5


def test_bfloat16_compute_stays_close_to_float32(config, params, frames):
    batch = randomised.batch(config, frames)
    wide = jax.jit(loss_of(config))(params, batch)
    narrow = jax.jit(loss_of(config, options.Compute(dtype="bfloat16")))(params, batch)
    assert abs(float(narrow - wide)) < 0.05 * float(wide)


def test_only_attention_scores_have_both_a_prefix_and_a_lane_extent(config, params):
    """Reads the compiled text of loss and gradient: no repeated prefix, keys or values anywhere."""
    one = randomised.frame(4, grids=((10, 14),), lengths=(29, 23, 29))
    batch = randomised.batch(config, [one], P=61, T=29)
    P, J, T, heads = 61, 3, 29, config.text.num_attention_heads
    text = jax.jit(jax.grad(loss_of(config))).lower(params, batch).compile().as_text()
    shapes = {tuple(int(n) for n in found.split(",") if n) for found in re.findall(r"\w+\[([\d,]+)\]", text)}
    assert any(T in shape for shape in shapes) and any(P in shape for shape in shapes)
    both = [s for s in shapes if (P in s or P + T in s) and (T in s or J in s or J * T in s)]
    assert both, "the scores themselves must be there"
    largest_scores = heads * J * T * (P + T)
    for shape in both:
        width = config.text.head_dim in shape or config.text.hidden_size in shape
        assert not width, f"an array with a prefix and a lane extent that is not scores: {shape}"
        # Scores of all layers may be kept for the backward pass.
        assert np.prod(shape) <= largest_scores * config.text.num_hidden_layers, shape
