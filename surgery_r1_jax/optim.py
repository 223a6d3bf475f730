"""Optimiser and train state: schedule, parts with their own rate, clipping, and a gate against bad numbers.

The whole transition (parameters, moments, step count of the optimiser) is taken or left as one: a step whose loss
or gradient is not finite changes nothing but its own counters.
"""

import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from surgery_r1_jax import model, options

INPUTS = {"o": 2, "proj": 2}  # kernels that contract two axes (heads and head width); all others one


class Transformation(NamedTuple):
    """An optax transformation whose `update` asks whether the step is `sound`, and where its moments are kept."""

    init: Callable
    update: Callable
    offload: bool  # in the host's memory from one update to the next


class TrainState(NamedTuple):
    """All that training changes."""

    step: jax.Array  # int32, batches seen
    params: dict
    opt_state: optax.OptState
    skipped: jax.Array  # int32, steps not taken because of non-finite numbers
    skipped_in_a_row: jax.Array


def schedule(settings: options.Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by optimiser step."""
    full, last = settings.learning_rate, settings.learning_rate * settings.final
    rising, held = int(settings.warmup * steps), int(settings.hold * steps)
    falling = max(1, steps - rising - held)
    match settings.schedule:
        case "constant":
            after = optax.constant_schedule(full)
        case "linear":
            after = optax.linear_schedule(full, last, falling)
        case "cosine":
            after = optax.cosine_decay_schedule(full, falling, alpha=settings.final)
    # The first step already moves: a rise from exactly 0 would waste it.
    rise = optax.linear_schedule(full / (rising + 1), full, max(1, rising))
    return optax.join_schedules([rise, optax.constant_schedule(full), after], [rising, rising + held])


def transformation(settings: options.Optimizer, steps: int, params: dict, *, offload: bool = False) -> Transformation:
    """The optax chain; `params` may be abstract."""
    rate = schedule(settings, steps)
    rates = _map(lambda path, _: getattr(settings.rates, model.part_of(path)), params)
    trained = jax.tree.map(lambda share: share > 0, rates)
    decayed = _map(lambda path, _: model.is_matrix(path), params)
    if settings.kind == "muon":
        core = optax.contrib.muon(
            rate,
            ns_steps=4,
            adam_b1=settings.b1,
            adam_b2=settings.b2,
            adam_learning_rate=lambda step: settings.adam_share * rate(step),
            weight_decay=settings.weight_decay,
            muon_weight_dimension_numbers=lambda tree: _map(_matrix_axes, tree),
        )
    else:
        core = optax.adamw(
            rate, settings.b1, settings.b2, settings.eps, weight_decay=settings.weight_decay, mask=decayed
        )
    whole = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.masked(_gated(core, in_turn=offload), trained),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, share: u * share, updates, rates)),
    )
    return Transformation(*whole, offload)


def freeze(params: dict, settings: options.Optimizer) -> dict:
    """Parameters of which the frozen parts get no gradient, so that it is not even computed."""
    return _map(
        lambda path, p: p if getattr(settings.rates, model.part_of(path)) > 0 else jax.lax.stop_gradient(p), params
    )


def start(params: dict, tx: Transformation) -> TrainState:
    """State before the first step."""
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: the state is given away
    return TrainState(step, params, tx.init(params), skipped, in_a_row)


def update(
    state: TrainState, loss: jax.Array, gradients: dict, tx: Transformation
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one step, or none where the loss or any gradient is not finite."""
    norm = optax.tree.norm(gradients)
    sound = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params, sound=sound)
    params = _where(sound, optax.apply_updates(state.params, updates), state.params)
    missed = (~sound).astype(jnp.int32)
    new = TrainState(
        state.step + 1,
        params,
        opt_state,
        state.skipped + missed,
        jnp.where(sound, 0, state.skipped_in_a_row + 1),
    )
    return new, {"grad_norm": norm, "skipped_steps": new.skipped, "skipped_in_a_row": new.skipped_in_a_row}


def parameter_of(path: tuple, known: Collection[tuple[str, ...]]) -> tuple[str, ...] | None:
    """Which of the `known` parameters an array of the state belongs to, by its path; None for counters.

    The optimiser may group parameters under names of its own (muon, adam): what counts is how a path ends.
    """
    names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    return next((names[start:] for start in range(len(names)) if names[start:] in known), None)


def _gated(core: optax.GradientTransformation, *, in_turn: bool) -> optax.GradientTransformationExtraArgs:
    """`core`, whose state a step that is not `sound` leaves as it was. It has to treat every array by itself.

    `in_turn`: one array after the other, and its moments come to the device when those of the one before are done
    with; left to itself the compiler would fetch all of them first. So the gate is in here, array by array: old and
    new moments are chosen between while both are on the device.
    """

    def update(updates, state, params, *, sound):
        known = {tuple(key.key for key in path): None for path, _ in jax.tree_util.tree_leaves_with_path(updates)}
        if not in_turn or not known:
            changed, after = core.update(updates, state, params)
            return changed, _where(sound, after, state)
        parts, last = [], ()
        for name in known:
            only = functools.partial(_only, name, known)
            there, _ = jax.lax.optimization_barrier((only(state), last))
            before = jax.device_put(there, jax.memory.Space.Device)
            changed, after = core.update(only(updates), before, only(params))
            last = changed, _where(sound, after, before)
            parts.append(last)
        return jax.tree.map(_present, *parts, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))

    return optax.GradientTransformationExtraArgs(core.init, update)


def _only(name, known, tree):
    """Of a tree the arrays of one parameter and the counters, and masked nodes for the rest."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if parameter_of(path, known) in (name, None) else optax.MaskedNode(), tree
    )


def _present(*leaves):
    """Of trees that `_only` made the leaf of the one that has it."""
    return next((leaf for leaf in leaves if not isinstance(leaf, optax.MaskedNode)), leaves[0])


def _where(sound, new, old):
    """One tree or the other."""
    return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, old)


def _matrix_axes(path, leaf):
    """Which axes of a layer's kernel make the matrix that muon orthogonalises; None: Adam."""
    first = int(model.is_stacked(path))  # stacked layers are a batch of matrices
    if "lora" in path:
        middle = leaf.ndim - 1 if path[-1] == "a" else first + 1
    elif path[-1] == "kernel" and path[-2] != "patch_embed":
        middle = first + INPUTS.get(path[-2], 1)
    elif path[-1] in ("gate_up", "down"):  # of every expert of every layer
        first += 1
        middle = first + 1
    else:
        return None
    return optax.contrib.MuonDimensionNumbers(tuple(range(first, middle)), tuple(range(middle, leaf.ndim)))


def _map(function, tree):
    """Map over leaves with their path of names."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(tuple(k.key for k in path), leaf), tree)
