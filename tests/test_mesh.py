"""Eight devices compute what one does, hold their share of the state, and batches may be cut into parts at will."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import randomised
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from randomised import PAD, STOP
from toy import quick_compile  # noqa: F401

from surgery_r1_jax import errors, grpo, model, optim, options, run, sampling, sft, sharding

SAMPLES, TOKENS = 2, 6
NOTHING = jnp.zeros(randomised.VOCABULARY, jnp.int32) - 1  # no id is a number
ALLOWED = jnp.asarray(np.isin(np.arange(randomised.VOCABULARY), [*range(30, 42), STOP]))


@pytest.fixture(scope="module")
def batch(config):
    """Eight frames with one to three answers, so that a mean of parts' means is not the mean."""
    lengths = [(9, 6, 4), (5,), (8, 8), (9,)] * 2
    frames = [randomised.frame(n, grids=((4, 6),), lengths=each) for n, each in enumerate(lengths)]
    return randomised.batch(config, frames)


@pytest.fixture(scope="module")
def meshes():
    one, eight = jax.devices()[:1], jax.devices()
    return {1: sharding.make_mesh((1, 1, 1), one), 8: sharding.make_mesh((2, 2, 2), eight)}


@pytest.fixture(scope="module")
def placed(config, params, meshes):
    """Parameters by number of devices."""
    _, abstract = model.build(config)
    return {n: jax.device_put(params, sharding.of_params(abstract, mesh)) for n, mesh in meshes.items()}


def largest_difference(ours, reference):
    """Over all leaves, relative to the leaf's largest entry; a leaf that is all but zero counts as such."""
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(reference))
    gaps = [
        np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(b).max(), 1e-4 * size)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
    ]
    return max(gaps)


# Hands out zeros and keeps the gradients, so that they can be compared as they are.
KEEP = optim.Transformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradients, state, params, *, sound: (jax.tree.map(jnp.zeros_like, gradients), gradients),
    offload=False,
)


@pytest.fixture(scope="module")
def started(config, meshes, placed):
    """The state before the first step, by number of devices."""

    def start(devices, tx=KEEP):
        mesh, params = meshes[devices], placed[devices]
        return run.start_state(jax.tree.map(jnp.copy, params), tx, mesh)

    return start


@pytest.fixture(scope="module")
def sft_on(config, batch, meshes, started):
    graph, _ = model.build(config)

    @functools.lru_cache
    def compute(devices, accumulate):
        settings = options.SFT(model="-", accumulate=accumulate, data=options.Data(root="-", frames=8))
        state = started(devices)
        step = run.keep_layout(functools.partial(sft.train_step, graph, KEEP, settings=settings), state)
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        for _ in range(2):
            state, stats = step(state, {}, sharding.put_batch(batch, meshes[devices]), NOTHING)
        assert step._cache_size() == 1, "the second step was compiled anew"
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == places
        return stats["loss"], state.opt_state, stats

    return compute


def test_sft_loss_and_gradients_do_not_depend_on_devices_or_parts(sft_on):
    loss, gradients, stats = sft_on(8, 2)
    want, want_gradients, want_stats = sft_on(1, 1)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert largest_difference(gradients, want_gradients) < 1e-5
    assert int(stats["num_tokens"]) == int(want_stats["num_tokens"]) == 84
    np.testing.assert_allclose(stats["mean_token_accuracy"], want_stats["mean_token_accuracy"], rtol=1e-6)


@pytest.fixture(scope="module")
def settings():
    def make(accumulate=1):
        data = options.Data(root="-", frames=8)
        sampler = options.Sampler(max_tokens=TOKENS, temperature=0.9)
        return options.GRPO(model="-", samples=SAMPLES, accumulate=accumulate, sampler=sampler, data=data)

    return make


@pytest.fixture(scope="module")
def rollout_on(config, batch, meshes, placed, settings):
    graph, _ = model.build(config)
    order = np.argsort(batch.branch_segment_BJT > 0, axis=-1, kind="stable")
    names = ("branch_ids_BJT", "branch_pos_BJT", "branch_segment_BJT")
    prompts = batch._replace(**{name: np.take_along_axis(getattr(batch, name), order, axis=-1) for name in names})
    numbers = (np.arange(8, dtype=np.int32), np.tile(np.arange(3, dtype=np.int32), (8, 1)))

    @functools.lru_cache
    def compute(devices):
        here, there = sharding.put_batch((prompts, numbers), meshes[devices])
        words = sampling.Vocabulary(jax.device_put(ALLOWED, sharding.replicated(meshes[devices])), STOP, PAD)
        return prompts, grpo.roll_out(graph, settings(), placed[devices], here, jax.random.key(3), there, words)

    return compute


def test_eight_devices_draw_the_same_tokens_as_one(rollout_on):
    (_, one), (_, eight) = rollout_on(1), rollout_on(8)
    assert one.mask_BJT.sum() > 40 and len(np.unique(one.tokens_BJT)) > 8
    for name in ("tokens_BJT", "mask_BJT", "stopped_BJ"):
        assert np.array_equal(getattr(one, name), getattr(eight, name)), name
    np.testing.assert_allclose(one.logp_BJT, eight.logp_BJT, atol=1e-5)


@pytest.fixture(scope="module")
def experience(rollout_on):
    """On the host, what a GRPO update is given."""
    prompts, drawn = rollout_on(1)
    drawn = jax.tree.map(np.asarray, drawn)
    rng = np.random.default_rng(0)
    noise = lambda: rng.normal(size=drawn.logp_BJT.shape).astype(np.float32)  # noqa: E731
    made = grpo.Experience(
        batch=sampling.branches(prompts, drawn, SAMPLES),
        mask_BJT=drawn.mask_BJT,
        old_logp_BJT=drawn.logp_BJT + 0.2 * noise(),  # some ratios are clipped
        ref_logp_BJT=drawn.logp_BJT + 0.5 * noise(),
        advantage_BJ=noise()[..., 0],
    )
    return jax.tree.map(np.asarray, made)


@pytest.fixture(scope="module")
def grpo_on(config, experience, meshes, started, settings):
    graph, _ = model.build(config)

    @functools.lru_cache
    def compute(devices, accumulate):
        state = started(devices)
        step = run.keep_layout(functools.partial(grpo.update, graph, KEEP, settings(accumulate)), state)
        state, stats = step(state, {}, sharding.put_batch(experience, meshes[devices]), ALLOWED)
        return state.opt_state, stats

    return compute


def test_a_grpo_update_does_not_depend_on_devices_or_parts(grpo_on):
    gradients, stats = grpo_on(8, 4)
    want_gradients, want = grpo_on(1, 1)
    assert largest_difference(gradients, want_gradients) < 1e-5
    assert want["kl"] > 0.01 and 0 < want["clip_ratio/region_mean"] < 1
    for name, value in stats.items():
        np.testing.assert_allclose(value, want[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def adam_step(config, experience, params, settings):
    """What AdamW makes of an experience: the state before, after, and what was told."""
    graph, _ = model.build(config)
    tx = optim.transformation(settings().optimizer, 9, params)
    state = jax.jit(lambda params: optim.start(params, tx))(params)
    step = jax.jit(functools.partial(grpo.update, graph, tx, settings()))
    return lambda changed: (state, *step(state, {}, experience._replace(**changed), ALLOWED))


BAD = [("advantage_BJ", bad) for bad in (np.nan, np.inf, -np.inf)]
BAD += [("ref_logp_BJT", np.nan), ("ref_logp_BJT", np.inf), ("old_logp_BJT", np.nan)]


@pytest.mark.survival
@pytest.mark.parametrize(("field", "bad"), BAD)
def test_one_bad_number_of_an_experience_reaches_neither_weights_nor_moments(experience, adam_step, field, bad):
    spoilt = getattr(experience, field).copy()
    spoilt[np.unravel_index(np.flatnonzero(experience.mask_BJT)[-1], experience.mask_BJT.shape)[: spoilt.ndim]] = bad
    before, after, stats = adam_step({field: spoilt})
    assert int(stats["skipped_steps"]) == 1 and int(after.step) == 1
    same = jax.tree.map(np.array_equal, after[1:3], before[1:3])
    assert all(jax.tree.leaves(same))
    _, taken, stats = adam_step({})
    assert int(stats["skipped_steps"]) == 0 and not np.array_equal(taken.params["head"], before.params["head"])


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_parts_are_groups_of_whole_frames_that_add_up_to_the_batch(parts):
    frames = {"x": jnp.arange(1.0, 25.0).reshape(8, 3), "n": jnp.arange(8)}
    seen = []

    def function(part, number):
        seen.append(part["x"].shape)
        return {"total": part["x"].sum(), "most": part["n"].max()}

    def join(a, b):
        return {"total": a["total"] + b["total"], "most": jnp.maximum(a["most"], b["most"])}

    found = run.sum_over_parts(function, frames, parts, join)
    assert float(found["total"]) == 300 and int(found["most"]) == 7 and set(seen) == {(8 // parts, 3)}
    assert float(run.sum_over_parts(lambda part, _: part["x"].sum(), frames, parts)) == 300


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_parameters_and_moments_are_spread_over_the_mesh(placed, started, kind):
    tx = optim.transformation(options.Optimizer(kind=kind), 10, placed[8])
    state = started(8, tx)

    def share(tree):
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
        return sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(leaf.size for leaf in leaves)

    # Kernels lie on a quarter or half of the devices' memory each; norms and biases are whole on all.
    assert share(state.params) < 0.3 and share(state.opt_state) < 0.3
    blocks = state.params["decoder"]["blocks"]
    shards = {
        (2, 64, 4, 16): (2, 32, 2, 16),  # q: embed over fsdp, heads over tensor
        (2, 64, 2, 16): (2, 32, 1, 16),  # k and v
        (1024, 64): (512, 32),  # embedding and head: vocabulary over tensor, embed over fsdp
    }
    assert blocks["q"]["kernel"].addressable_shards[0].data.shape == (2, 32, 2, 16)
    checked = [leaf for leaf in jax.tree.leaves(state) if leaf.shape in shards]
    assert len(checked) >= 10
    for leaf in checked:
        assert {shard.data.shape for shard in leaf.addressable_shards} == {shards[leaf.shape]}


def test_heads_that_do_not_divide_are_replicated():
    mesh = sharding.make_mesh((1, 2, 4))
    spec = sharding.spec(("embed", "kv_heads", "head"), (64, 2, 16), mesh)
    assert spec == PartitionSpec("fsdp", None, None)
    whole = jax.device_put(jnp.zeros((64, 2, 16)), NamedSharding(mesh, spec))
    assert {shard.data.shape for shard in whole.addressable_shards} == {(32, 2, 16)}
    assert sharding.spec(("embed", "heads", "head"), (64, 4, 16), mesh) == PartitionSpec("fsdp", "tensor", None)


def test_an_axis_without_a_rule_and_a_parameter_without_axes_are_refused(meshes):
    class Odd(nnx.Module):
        def __init__(self, **metadata):
            self.weight = nnx.Param(jnp.zeros((4, 4)), **metadata)

    with pytest.raises(errors.InputError, match="parameter weight: no sharding rule for axis 'mystery'"):
        sharding.of_params(nnx.state(Odd(axes=("embed", "mystery"))), meshes[8])
    with pytest.raises(errors.InputError, match="parameter weight names no logical axes"):
        sharding.of_params(nnx.state(Odd()), meshes[8])


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 2, 4), (-1, -1, 1), (2, 2), (0, 4, 2), (0, -1, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(shape):
    with pytest.raises(errors.InputError, match="mesh"):
        sharding.make_mesh(shape)


def test_an_array_is_pinned_on_the_mesh_that_the_program_runs_on(meshes):
    pin = jax.jit(lambda x: sharding.pinned(x + 1, ("data", "fsdp"), ("tensor",)))
    there = sharding.put_batch(np.zeros((8, 6), np.float32), meshes[8])
    assert {shard.data.shape for shard in pin(there).addressable_shards} == {(2, 3)}
    odd = sharding.put_batch(np.zeros((8, 5), np.float32), meshes[8])  # 5 is not shared out over two devices
    assert {shard.data.shape for shard in pin(odd).addressable_shards} == {(2, 5)}
    assert pin(jnp.zeros((7, 5))).shape == (7, 5)  # on one device there is nothing to say


def test_a_tensor_axis_over_several_processes_is_refused():
    sharding.check_owners(np.array([[[0, 0], [1, 1]]]))
    with pytest.raises(errors.InputError, match="its tensor axis of 4 reaches over several processes"):
        sharding.check_owners(np.array([[[0, 0, 1, 1]]]))


def test_rows_come_back_in_the_order_they_were_put_and_must_divide(meshes):
    rows = {"a": np.arange(24).reshape(8, 3), "b": np.arange(8.0)}
    placed = sharding.put_batch(rows, meshes[8])
    back = sharding.local_rows(placed)
    assert all(np.array_equal(back[name], rows[name]) for name in rows)
    with pytest.raises(errors.InputError, match="batch of 6 frames cannot be spread over data x fsdp = 4 devices"):
        sharding.put_batch(np.zeros((6, 2)), meshes[8])
