"""Every way of computing attention gives what XLA's gives: outputs, all gradients, a whole model, on any mesh."""

import dataclasses
import functools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import randomised
import toy
from toy import quick_compile  # noqa: F401

from surgery_r1_jax import attention, backends, errors, flash, model, options, scoring, sharding
from surgery_r1_jax.attention import Keys, Queries
from surgery_r1_jax.flash import EVERYBODY, NOBODY

B, J, T, P, N, K, H = 2, 3, 12, 20, 4, 2, 16
SMALL = flash.Blocks(rows=16, keys=16, interpret=True)  # several blocks of each, the last ones not full
IMITATED = functools.partial(flash.attend, blocks=flash.Blocks(interpret=True))


def gpu_problem():
    """Why cuDNN cannot be tested here."""
    return backends._no_cudnn(jax.devices()[0], "bfloat16")


BACKENDS = {
    "pallas": functools.partial(flash.attend, blocks=SMALL),
    "cudnn's layout on XLA": functools.partial(backends.cudnn, implementation="xla"),
    "cudnn": backends.cudnn,
}


class Case(NamedTuple):
    """Arguments of attention, and which queries see anything at all."""

    q: np.ndarray
    queries: Queries
    own: Keys
    prefix: Keys | None
    seeing: np.ndarray  # bool [B, J, T]


def case(segment, own_segment=None, order=None, own_order=None, filled=None, heads=(N, K, H)):
    """Random numbers under given marks; a lane's own keys are its queries' unless they are said to be others."""
    rng, (N, K, H) = np.random.default_rng(0), heads
    segment = np.asarray(segment, np.int32)
    own_segment, own_order = (segment, order) if own_segment is None else (np.asarray(own_segment, np.int32), own_order)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    own = Keys(draw(*own_segment.shape, K, H), draw(*own_segment.shape, K, H), own_segment, own_order)
    sees = (segment[..., None] == own_segment[..., None, :]) & (segment > 0)[..., None]
    if order is not None:
        sees &= own_order[..., None, :] <= order[..., :, None]
    prefix, seeing = None, sees.any(-1)
    if filled is not None:
        filled = np.asarray(filled, np.int32)
        prefix = Keys(draw(*filled.shape, K, H), draw(*filled.shape, K, H), filled)
        seeing |= (filled > 0).any(-1)[:, None, None]
    return Case(draw(*segment.shape, N, H), Queries(segment, order), own, prefix, seeing)


def prefixes():
    """Causal, one lane a frame; padding behind, in front, and a frame of nothing else."""
    segment = np.ones((3, 1, P))
    segment[0, 0, 13:], segment[1, 0, :5], segment[2] = 0, 0, 0
    return case(segment, order=np.arange(P)[None, None])


PACKED = np.zeros((B, J, T))  # lanes of uneven branches, of one, of none
PACKED[0, 0, :5], PACKED[0, 0, 5:11], PACKED[0, 1], PACKED[1, 0, 3:9] = 1, 2, 1, 1
PACKED[1, 1, :2], PACKED[1, 1, 2:3], PACKED[1, 1, 3:] = 1, 2, 3


def branches(heads=(N, K, H)):
    """Lanes over a shared prefix; the second frame's has holes."""
    filled = np.arange(P) < 17
    return case(PACKED, order=np.arange(T)[None, None], filled=[filled, np.arange(P) % 3 > 0], heads=heads)


def branches_without_a_prefix():
    """The same where the first frame's prefix is empty: padding there sees nothing."""
    return case(PACKED, order=np.arange(T)[None, None], filled=[np.zeros(P), np.ones(P)])


def decoding():
    """One query a lane at slot 7 of its cache, of which each lane has filled another part."""
    slots = np.arange(T)
    filled = (slots >= np.array([[0, 2, 7], [7, 3, 1]])[..., None]) & (slots <= 7)
    one = np.ones((B, J, 1))
    return case(one, filled, order=np.full((1, 1, 1), 7), own_order=slots[None, None], filled=np.ones((B, P)))


def windows():
    """Both ways within a window; windows not full, of two images, and empty."""
    segment = np.ones((B, 5, 8))
    segment[0, 1, 5:], segment[0, 3:], segment[1, 4], segment[1, 2, ::2] = 0, 2, 0, 0
    return case(segment)


def images():
    """All windows of a frame as one lane: two images, empty slots among them; a head size that is no power of two."""
    segment = windows().queries.segment.reshape(B, 1, -1)
    return case(segment, heads=(3, 3, 20))


@functools.cache
def program(attend):
    """Output, and gradients by q, keys and values, of a weighted sum; one for each back end, compiled by shapes."""

    def total(arrays, marks, weight):
        q, own, prefix = arrays
        queries, own_marks, prefix_marks = marks
        prefix = prefix and Keys(*prefix, *prefix_marks)
        out = attend(q, Queries(*queries), Keys(*own, *own_marks), prefix)
        return (out.astype(jnp.float32) * weight).sum(), out

    return jax.jit(jax.grad(total, has_aux=True))


def evaluated(attend, case, dtype):
    """Gradients by q, keys and values of a weighted sum over the queries that see anything, and the output."""
    weight = np.random.default_rng(1).standard_normal(case.q.shape) * case.seeing[..., None, None]
    sides = case.own, case.prefix
    arrays = jax.tree.map(lambda x: jnp.asarray(x, dtype), (case.q, *(side and side[:2] for side in sides)))
    marks = tuple(case.queries), *(side and side[2:] for side in sides)
    return jax.tree.map(lambda x: np.asarray(x, np.float32), program(attend)(arrays, marks, weight))


def largest_gap(ours, reference, case):
    """Of all arrays, relative to the largest entry; outputs only where something is seen."""
    (gradients, out), (want_gradients, want) = ours, reference
    pairs = [(out[case.seeing], want[case.seeing])]
    pairs += zip(*map(jax.tree.leaves, (gradients, want_gradients)), strict=True)
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


CASES = {f.__name__: f for f in (prefixes, branches, branches_without_a_prefix, decoding, windows, images)}
BOUND = {"float32": 2e-6, "bfloat16": 2e-2}  # a few units in the last place of each


@pytest.fixture(scope="module")
def expected():
    """XLA's figures in float32, which are the yardstick for both precisions."""
    return functools.cache(lambda name: evaluated(attention.attend, CASES[name](), "float32"))


UNUSED = ("decoding", "windows")  # by our kernels: the model leaves these to XLA; seconds of compiling each
RUNS = [("pallas", "float32", name) for name in CASES if name not in UNUSED] + [("pallas", "bfloat16", "branches")]
RUNS += [("cudnn's layout on XLA", "float32", name) for name in CASES]
RUNS += [("cudnn's layout on XLA", "bfloat16", "branches"), *(("cudnn", "bfloat16", name) for name in CASES)]
RUNS += [pytest.param("pallas", "float32", name, marks=pytest.mark.slow) for name in UNUSED]
RUNS += [pytest.param("pallas", "bfloat16", name, marks=pytest.mark.slow) for name in CASES if name != "branches"]


@pytest.mark.parametrize(("backend", "dtype", "name"), RUNS)
def test_output_and_every_gradient_are_those_of_xla(backend, dtype, name, expected):
    if backend == "cudnn" and gpu_problem():
        pytest.skip(f"cuDNN: {gpu_problem()}")
    given = CASES[name]()
    ours = evaluated(backends.Kernel(BACKENDS[backend]), given, dtype)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ours))
    assert largest_gap(ours, expected(name), given) < BOUND[dtype]


@pytest.mark.parametrize("backend", ["pallas", "cudnn's layout on XLA"])
@pytest.mark.parametrize("slip", ["a prefix slot too many", "branches of a lane see each other", "one place late"])
def test_control_a_slip_in_the_mask_leaves_the_bound(backend, slip, expected):
    given = branches()
    wrong = {
        "a prefix slot too many": lambda: given._replace(
            prefix=given.prefix._replace(segment=np.ones((B, P), np.int32))
        ),
        "branches of a lane see each other": lambda: given._replace(
            queries=given.queries._replace(segment=np.minimum(given.queries.segment, 1)),
            own=given.own._replace(segment=np.minimum(given.own.segment, 1)),
        ),
        "one place late": lambda: given._replace(queries=given.queries._replace(order=given.queries.order + 1)),
    }[slip]()
    ours = evaluated(backends.Kernel(BACKENDS[backend]), wrong, "float32")
    assert largest_gap(ours, expected("branches"), given) > 1e-2


def test_blocks_that_are_left_out_are_those_in_which_nobody_sees_anybody():
    rng, (rows, slots, block) = np.random.default_rng(0), (64, 48, 8)
    segment = np.sort(rng.integers(0, 5, (B, rows)))
    key_segment = np.sort(rng.choice([NOBODY, 1, 2, 3, 4], (B, slots)))
    key_segment[1, 20] = EVERYBODY
    order, key_order = rng.integers(0, 9, (B, rows)), rng.integers(0, 9, (B, slots))
    lines = [np.stack(pair, axis=1) for pair in ((segment, order), (key_segment, key_order))]
    blocks_of = jax.jit(lambda *lines: flash._live(*lines, block, block))
    live = np.asarray(blocks_of(*lines))
    sees = np.asarray(flash.sees(segment[..., None], order[..., None], key_segment[:, None], key_order[:, None]))
    needed = sees.reshape(B, rows // block, block, slots // block, block).any((2, 4))
    assert (live >= needed).all() and live.mean() < 0.6

    place = np.stack([np.ones((1, rows)), np.arange(rows)[None]], axis=1).astype(np.int32)
    assert np.array_equal(blocks_of(place, place)[0], np.tri(rows // block, dtype=bool))


@pytest.mark.parametrize(("backend", "shape"), [("pallas", (2, 1, 4)), ("cudnn's layout on XLA", (2, 2, 2))])
def test_a_mesh_changes_nothing(backend, shape):
    """Key heads fewer than devices along `tensor`; frames that cannot be spread."""
    mesh, given = sharding.make_mesh(shape), branches(heads=(8, 2, H))
    ours = evaluated(backends.Kernel(BACKENDS[backend], mesh), given, "float32")
    assert largest_gap(ours, evaluated(attention.attend, given, "float32"), given) < BOUND["float32"]


@pytest.fixture(scope="module")
def frames():
    """A batch of two frames with lanes of several branches."""
    made = [randomised.frame(1), randomised.frame(2, grids=((6, 8),), lengths=(11, 7, 4, 8))]
    return randomised.batch(randomised.config(), made, lanes=[[[0, 2], [1]], [[0], [1, 2], [3]]], P=140, T=24)


def test_a_model_computes_the_same_logits_and_gradients_by_flash_kernels(config, frames):
    tower = dataclasses.replace(config.vision, depth=1, fullatt_block_indexes=(0,))  # no windows: they are XLA's
    config = dataclasses.replace(config, vision=tower)
    params = toy.params(config)

    def run(attend):
        graph, _ = model.build(config, options.Compute(), attend)

        def loss(params):
            net = model.bind(graph, params)
            scored = net.scored(frames)
            nll = scoring.cross_entropy(scored, net.unembed_VD, frames.score_target_BL, frames.score_weight_BL).nll
            return nll, scored @ net.unembed_VD.T

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    ((_, logits), gradients), ((_, want), want_gradients) = run(backends.Kernel(IMITATED)), run(attention.XLA())
    np.testing.assert_allclose(logits, want, atol=2e-5, rtol=0)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want_gradients))
    for ours, reference in zip(*map(jax.tree.leaves, (gradients, want_gradients)), strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-5 * max(np.abs(reference).max(), 1e-3 * largest), rtol=0)


def test_what_is_not_asked_for_is_xla_and_what_cannot_be_is_refused():
    mesh = sharding.make_mesh((1, 8, 1))
    chosen = backends.choose(options.Compute(query_chunk=7), mesh)
    assert chosen == attention.XLA(7) == backends.choose(options.Compute(attention="xla", query_chunk=7))
    with pytest.raises(errors.InputError, match=r"compute.attention pallas: needs TPUs, and here is 'cpu'; take auto"):
        backends.choose(options.Compute(attention="pallas"), mesh)
    with pytest.raises(errors.InputError, match=r"compute.attention cudnn: needs compute.dtype bfloat16, not float32"):
        backends.choose(options.Compute(attention="cudnn"), mesh)
    with pytest.raises(errors.InputError, match=r"compute.attention cudnn: needs NVIDIA GPUs .* here is 'cpu'"):
        backends.choose(options.Compute(attention="cudnn", dtype="bfloat16"))


def test_devices_are_taken_for_what_they_are():
    tpu = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    amd = types.SimpleNamespace(platform="gpu", device_kind="AMD", compute_capability="gfx90a")
    old = types.SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5")
    assert backends._no_tpu(tpu, "bfloat16") is None and "float64" in backends._no_tpu(tpu, "float64")
    assert "AMD" in backends._no_cudnn(amd, "bfloat16") and "T4" in backends._no_cudnn(old, "bfloat16")
