"""The optimiser: rates by step and by part, what is decayed, and that bad numbers change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import randomised
import toy
from toy import quick_compile  # noqa: F401

from surgery_r1_jax import families, model, optim, options, run, sft, sharding, sums

STEPS = 20


def rates(steps=STEPS, **settings):
    schedule = optim.schedule(options.Optimizer(learning_rate=2.0, **settings), steps)
    return np.asarray([schedule(step) for step in range(steps)])


def test_the_rate_rises_holds_and_falls_as_configured():
    np.testing.assert_allclose(rates(schedule="constant", warmup=0.0), 2.0)
    # 4 of 20 steps rise from the first on, 5 hold, the rest falls.
    linear = rates(schedule="linear", warmup=0.2, hold=0.25, final=0.1)
    np.testing.assert_allclose(linear[:4], 2.0 * np.arange(1, 5) / 5, rtol=1e-6)
    np.testing.assert_allclose(linear[4:9], 2.0)
    np.testing.assert_allclose(linear[9:], 2.0 - 1.8 * np.arange(11) / 11, rtol=1e-5)
    cosine = rates(schedule="cosine", warmup=0.0, final=0.5)
    np.testing.assert_allclose(cosine, 1.5 + 0.5 * np.cos(np.pi * np.arange(STEPS) / STEPS), rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("shape", ["constant", "cosine", "linear"])
def test_very_short_runs_have_a_rate_at_every_step(steps, shape):
    for warmup, hold in ((0.03, 0.0), (0.5, 0.5), (1.0, 1.0)):
        found = rates(steps, schedule=shape, warmup=warmup, hold=hold)
        assert np.isfinite(found).all() and (found > 0).all() and (found <= 2.0).all()


def noise(params, seed=0):
    """Gradients of about one in every entry."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.standard_normal(leaf.shape, np.float32)) for leaf in leaves])


def by_path(tree):
    return {tuple(k.key for k in path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def stepped(params, settings, gradients=None):
    """Change of every parameter in one step, by path, and the state behind it."""
    tx = optim.transformation(settings, STEPS, params)
    state = optim.start(params, tx)
    gradients = noise(params) if gradients is None else gradients
    new, _ = jax.jit(functools.partial(optim.update, tx=tx))(state, jnp.float32(1.0), gradients)
    before, after = by_path(params), by_path(new.params)
    return {path: after[path] - before[path] for path in before}, new


FLAT = dict(schedule="constant", warmup=0.0, clip_norm=1e9)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_frozen_part_does_not_move_and_has_no_moments(params, kind):
    shares = options.Rates(tower=0.0, merger=1.0, decoder=0.0)
    change, state = stepped(params, options.Optimizer(kind=kind, rates=shares, weight_decay=0.1, **FLAT))
    for path, moved in change.items():
        assert moved.any() == (model.part_of(path) == "merger"), path
    held = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    merger = jax.tree.leaves(params["tower"]["merger"])
    moments = 2 if kind == "adamw" else 1  # muon keeps one of matrices, Adam of norms and biases two
    assert sum(leaf.size for leaf in held) <= 2 * sum(leaf.size for leaf in merger)
    assert len(held) >= moments * len(merger)


def test_a_frozen_part_gets_no_gradient(config, params):
    settings = options.Optimizer(rates=options.Rates(tower=0.0, merger=0.0))
    total = lambda params: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(optim.freeze(params, settings)))  # noqa: E731
    for path, gradient in by_path(jax.grad(total)(params)).items():
        assert gradient.any() == (model.part_of(path) == "decoder"), path


def test_each_part_learns_at_its_share_of_the_rate(params):
    shares = options.Rates(tower=0.5, merger=2.0, decoder=1.0)
    plain, _ = stepped(params, options.Optimizer(learning_rate=1e-2, **FLAT))
    scaled, _ = stepped(params, options.Optimizer(learning_rate=1e-2, rates=shares, **FLAT))
    for path, moved in scaled.items():
        share = getattr(shares, model.part_of(path))
        np.testing.assert_allclose(moved, share * plain[path], rtol=1e-3, atol=1e-6, err_msg=str(path))


@pytest.fixture(scope="module")
def mixture():
    """Parameters of a model that has every kind of them: experts, places, norms with and without bias."""
    family = "qwen3_vl_moe"
    return toy.params(families.FAMILIES[family].architecture(randomised.configuration(family, tied=False)))


@pytest.mark.parametrize("family", ["params", "mixture"])
def test_weight_decay_pulls_on_kernels_and_embeddings_only(request, family):
    params, settings = request.getfixturevalue(family), dict(learning_rate=1e-2, **FLAT)
    plain, _ = stepped(params, options.Optimizer(**settings))
    decayed, _ = stepped(params, options.Optimizer(weight_decay=0.5, **settings))
    for path, value in by_path(params).items():
        pulled = decayed[path] - plain[path]
        want = np.zeros_like(value) if path[-1] in ("bias", "scale", "places") else -0.5e-2 * value
        np.testing.assert_allclose(pulled, want, atol=2e-6, err_msg=str(path))
    more = {"gate_up", "down", "places"} if family == "mixture" else set()
    assert {path[-1] for path in decayed} == {"kernel", "bias", "scale", "embed", "head"} | more


def test_muon_makes_the_update_of_every_layers_matrix_orthogonal(params, config):
    change, _ = stepped(params, options.Optimizer(kind="muon", learning_rate=1.0, **FLAT))
    blocks = ("decoder", "blocks")
    for path, inputs in (((*blocks, "q"), 1), ((*blocks, "o"), 2), (("tower", "blocks", "proj"), 2)):
        update = change[*path, "kernel"]
        rows = int(np.prod(update.shape[1 : 1 + inputs]))
        for matrix in update.reshape(update.shape[0], rows, -1):  # layer by layer
            singular = np.linalg.svd(matrix, compute_uv=False)
            # Newton-Schulz brings singular values near one (the least of them not all the way); noise has 0 to 16.
            assert np.mean((singular > 0.6) & (singular < 1.3)) > 0.9, (path, singular)
    layers = change[*blocks, "q", "kernel"]
    assert not np.allclose(layers[0], layers[1])
    # What is no matrix takes the first step of Adam with Nesterov momentum: a fixed length against the sign.
    length = 0.2 * (1 + 0.9 * 0.1 / (1 - 0.9**2))
    for path in (("embed",), (*blocks, "q", "bias"), ("tower", "patch_embed", "kernel")):
        np.testing.assert_allclose(change[path], -length * np.sign(by_path(noise(params))[path]), rtol=5e-2)


def test_muon_makes_the_update_of_every_expert_orthogonal_by_itself(mixture):
    change, _ = stepped(mixture, options.Optimizer(kind="muon", learning_rate=1.0, **FLAT))
    for name in ("gate_up", "down"):
        update = change["decoder", "blocks", "mlp", name]
        for matrix in update.reshape(-1, update.shape[2], np.prod(update.shape[3:])):
            rows, columns = matrix.shape
            singular = np.linalg.svd(matrix, compute_uv=False) / max(1, columns / rows) ** 0.5  # muon's own factor
            assert np.mean((singular > 0.6) & (singular < 1.3)) > 0.9, (name, singular)


def test_the_gradient_is_clipped_to_its_norm_before_anything_else(params):
    gradients = noise(params)
    settings = options.Optimizer(
        learning_rate=1.0, b1=0.0, b2=0.0, eps=1.0, schedule="constant", warmup=0.0, clip_norm=0.5
    )
    # With so large an epsilon and so small a gradient Adam's update is the gradient itself.
    change, _ = stepped(params, settings, gradients)
    norm = float(optax.tree.norm(gradients))
    for path, gradient in by_path(gradients).items():
        np.testing.assert_allclose(change[path], -gradient * 0.5 / norm, rtol=1e-2, atol=1e-6)


@pytest.fixture(scope="module")
def training(config):
    """A jitted SFT step on two hand-made frames, and their batch."""
    settings = options.SFT(
        model="-", data=options.Data(root="-"), optimizer=options.Optimizer(learning_rate=1e-2, schedule="constant")
    )
    frames = [randomised.frame(n, grids=((4, 6),), lengths=(7, 5)) for n in (1, 2)]
    graph, _ = model.build(config)
    return settings, graph, randomised.batch(config, frames)


def begin(params, settings):
    """A train state that may be given away."""
    tx = optim.transformation(settings.optimizer, STEPS, params)
    return tx, optim.start(jax.tree.map(jnp.copy, params), tx)


def same_bytes(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_steps_compile_once_and_a_bad_batch_is_as_if_it_had_never_been(training, params):
    settings, graph, batch = training
    tx, state = begin(params, settings)
    number_V = jnp.zeros(randomised.VOCABULARY, jnp.int32) - 1
    batches = [batch._replace(score_target_BL=np.roll(batch.score_target_BL, n, axis=1)) for n in range(3)]
    bad = batches[1]._replace(patches_BWSC=np.full_like(batch.patches_BWSC, np.nan))
    step = jax.jit(functools.partial(sft.train_step, graph, tx, settings=settings), donate_argnums=0)

    def run_all(state, batches):
        states, stats = [], []
        for batch in batches:
            state, found = step(state, {}, batch, number_V)
            states.append(jax.tree.map(np.asarray, state))
            stats.append(jax.tree.map(np.asarray, found))
        return states, stats

    with_bad, stats = run_all(state, [batches[0], bad, bad, batches[2]])
    _, state = begin(params, settings)
    without, _ = run_all(state, [batches[0], batches[2]])
    assert step._cache_size() == 1
    assert not np.isfinite(stats[1]["loss"]) and np.isfinite(stats[0]["loss"])
    assert same_bytes(with_bad[2][1:3], with_bad[0][1:3]) and same_bytes(with_bad[-1][1:3], without[-1][1:3])
    assert not same_bytes(with_bad[-1].params, with_bad[0].params)
    assert [int(s.skipped) for s in with_bad] == [0, 1, 2, 2]
    assert [int(s.skipped_in_a_row) for s in with_bad] == [0, 1, 2, 0]
    assert [int(s.step) for s in with_bad] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_in_the_hosts_memory_change_nothing_but_their_place(config, params, kind):
    rates, mesh = options.Rates(tower=0.0), sharding.make_mesh((2, 2, 2))
    settings = options.Optimizer(kind=kind, learning_rate=1e-2, weight_decay=0.1, rates=rates, **FLAT)
    batches = [noise(params, seed) for seed in range(3)]
    batches[1] = jax.tree.map(lambda leaf: leaf * np.nan, batches[1])

    def state_after(offload):
        given = jax.device_put(jax.tree.map(np.asarray, params), sharding.of_params(model.build(config)[1], mesh))
        tx = optim.transformation(settings, STEPS, given, offload=offload)
        state = run.start_state(given, tx, mesh)
        step = run.keep_layout(lambda state, loss, gradients: optim.update(state, loss, gradients, tx), state)
        for gradients in batches:
            state, _ = step(state, jnp.float32(1.0), gradients)
        assert step._cache_size() == 1
        return state, step.lower(state, jnp.float32(1.0), batches[0]).as_text()

    plain, without = state_after(False)
    kept, text = state_after(True)
    for ours, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)  # other fusions, other roundings
    second = [np.abs(leaf).max() for leaf in jax.tree.leaves(plain.opt_state) if leaf.ndim > 1]
    assert min(second) > 1e-4  # all are large enough to be compared
    assert int(kept.skipped) == 1 and not np.array_equal(kept.params["head"], params["head"])
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(kept.opt_state) if leaf.ndim > 1}
    assert kinds == {"pinned_host"}
    copied = jax.tree.map(np.asarray, kept._asdict())
    assert sums.of(kept._asdict()) == sums.of(copied)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(kept.params)} == {"device"}
    # Array by array: each waits for the one before it.
    learning = [path for path in by_path(params) if model.part_of(path) != "tower"]
    assert text.count("optimization_barrier") == len(learning) and "optimization_barrier" not in without


def test_where_nothing_is_trained_there_is_nothing_to_fetch(params):
    settings = options.Optimizer(rates=options.Rates(tower=0.0, merger=0.0, decoder=0.0))
    tx = optim.transformation(settings, STEPS, params, offload=True)
    state, _ = jax.jit(functools.partial(optim.update, tx=tx))(optim.start(params, tx), jnp.float32(1.0), noise(params))
    assert same_bytes(state.params, params) and int(state.step) == 1


@pytest.mark.survival
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_bad_loss_or_any_bad_gradient_leaf_leaves_everything_bitwise(params, kind, bad):
    # Few entries are enough here: one leaf of each sort.
    params = {"decoder": params["decoder"], "embed": params["embed"]}
    tx = optim.transformation(options.Optimizer(kind=kind, **FLAT), STEPS, params)
    update = jax.jit(functools.partial(optim.update, tx=tx))
    gradients = noise(params)
    state, _ = update(optim.start(params, tx), jnp.float32(1.0), gradients)

    def refused(loss, gradients):
        new, stats = update(state, jnp.float32(loss), gradients)
        assert same_bytes(new[1:3], state[1:3])
        assert int(stats["skipped_steps"]) == 1 and int(stats["skipped_in_a_row"]) == 1 and int(new.step) == 2

    refused(bad, gradients)
    leaves, tree = jax.tree.flatten(gradients)
    for i, leaf in enumerate(leaves):
        spoilt = leaf.reshape(-1).at[leaf.size // 2].set(bad).reshape(leaf.shape)
        refused(1.0, jax.tree.unflatten(tree, [*leaves[:i], spoilt, *leaves[i + 1 :]]))
    taken, _ = update(state, jnp.float32(1.0), gradients)
    assert not same_bytes(taken.params, state.params)
