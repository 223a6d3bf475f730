"""Optimiser and train state: schedule, parts with their own rate, clipping, and a gate against bad numbers.

The whole transition (parameters, moments, step count of the optimiser) is taken or left as one: a step whose loss
or gradient is not finite changes nothing but its own counters.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from surgery_r1_jax import model, options

INPUTS = {"o": 2, "proj": 2}  # kernels that contract two axes (heads and head width); all others one

DECAYED = ("kernel", "embed", "head", "a", "b")  # matrices, an adapter's two among them


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


def transformation(settings: options.Optimizer, steps: int, params: dict) -> optax.GradientTransformation:
    """The optax chain; `params` may be abstract."""
    rate = schedule(settings, steps)
    rates = _map(lambda path, _: getattr(settings.rates, model.part_of(path)), params)
    trained = jax.tree.map(lambda share: share > 0, rates)
    decayed = _map(lambda path, _: path[-1] in DECAYED, params)
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
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.masked(core, trained),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, share: u * share, updates, rates)),
    )


def freeze(params: dict, settings: options.Optimizer) -> dict:
    """Parameters of which the frozen parts get no gradient, so that it is not even computed."""
    return _map(
        lambda path, p: p if getattr(settings.rates, model.part_of(path)) > 0 else jax.lax.stop_gradient(p), params
    )


def start(params: dict, tx: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: the state is given away
    return TrainState(step, params, tx.init(params), skipped, in_a_row)


def update(state: TrainState, loss: jax.Array, gradients: dict, tx) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one step, or none where the loss or any gradient is not finite."""
    norm = optax.tree.norm(gradients)
    sound = jnp.isfinite(loss) & jnp.isfinite(norm)

    def take(_):
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    params, opt_state = jax.lax.cond(sound, take, lambda _: (state.params, state.opt_state), None)
    missed = (~sound).astype(jnp.int32)
    new = TrainState(
        state.step + 1,
        params,
        opt_state,
        state.skipped + missed,
        jnp.where(sound, 0, state.skipped_in_a_row + 1),
    )
    return new, {"grad_norm": norm, "skipped_steps": new.skipped, "skipped_in_a_row": new.skipped_in_a_row}


def _matrix_axes(path, leaf):
    """Which axes of a layer's kernel make the matrix that muon orthogonalises; None: Adam."""
    first = int(model.is_stacked(path))  # stacked layers are a batch of matrices
    if "lora" in path:
        middle = leaf.ndim - 1 if path[-1] == "a" else first + 1
    elif path[-1] == "kernel" and path[-2] != "patch_embed":
        middle = first + INPUTS.get(path[-2], 1)
    else:
        return None
    return optax.contrib.MuonDimensionNumbers(tuple(range(first, middle)), tuple(range(middle, leaf.ndim)))


def _map(function, tree):
    """Map over leaves with their path of names."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(tuple(k.key for k in path), leaf), tree)
