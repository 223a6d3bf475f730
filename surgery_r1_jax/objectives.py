"""Policy losses: GRPO and its relatives as settings of one function.

Float32, pure and defined on every input: padded lanes, ratios that overflow, policies that drifted apart. An
update reads

    advantages -> loss_mask -> totals (whole batch) -> policy_loss (each part) -> sum of the parts

Every part divides by the totals of the whole batch, so losses, gradients and statistics of the parts add up
to those of the whole however the batch is cut (but for `token_micro`, which is defined per part). Such a part
of a mean is called its share below.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from surgery_r1_jax import options

LOG_RATIO_BOUND = 20.0  # log-ratios of policies are clamped to this before exp (verl)
MAX_RATIO = math.exp(LOG_RATIO_BOUND)


class Totals(NamedTuple):
    """What a whole batch is averaged over, counted before it is cut into parts."""

    sequences: jax.Array  # lanes with at least one token in the loss
    tokens: jax.Array
    max_completion: int  # longest completion that sampling allows, for `constant`
    parts: int  # micro-batches into which the batch is cut, for `token_micro`


def loss_mask(
    mask_BJT: jax.Array, scorable_BJ: jax.Array, truncated_BJ: jax.Array, objective: options.Objective
) -> jax.Array:
    """Completion tokens in the loss: none of an unscorable lane nor, if so configured, of a truncated one."""
    kept_BJ = scorable_BJ & ~truncated_BJ if objective.mask_truncated else scorable_BJ
    return mask_BJT & kept_BJ[..., None]


def totals(mask_BJT: jax.Array, *, max_completion: int, parts: int = 1) -> Totals:
    """Count a whole batch by its loss mask; never less than one sequence and one token.

    Lanes without a token in the loss do not count, be they padding, unscorable or truncated. (TRL's `grpo`
    and `dr_grpo` divide by those too, which weakens the others.)
    """
    sequences = _count(jnp.any(mask_BJT, axis=-1))
    return Totals(jnp.maximum(sequences, 1.0), jnp.maximum(_count(mask_BJT), 1.0), max_completion, parts)


def kl_k3(logp: jax.Array, ref_logp: jax.Array, bound: float = 10.0) -> tuple[jax.Array, jax.Array]:
    """The k3 estimate of KL(policy || reference) and where it was bounded.

    It is exp(d) - d - 1 with d = ref_logp - logp; beyond |d| = bound it goes on along its tangent. So it is
    finite however far apart the policies are, and its gradient is the one at the bound, not zero: a token
    that drifted off is still drawn back. Source: Schulman, "Approximating KL Divergence" (2020).
    """
    d = jax.lax.stop_gradient(ref_logp) - logp
    near = jax.lax.stop_gradient(jnp.clip(d, -bound, bound))  # where the tangent touches
    slope = jnp.expm1(near)
    return slope - near + slope * (d - near), jnp.abs(d) > bound


def policy_loss(
    logp_BJT: jax.Array,
    old_logp_BJT: jax.Array | None,
    advantage_BJ: jax.Array,
    mask_BJT: jax.Array,
    whole: Totals,
    objective: options.Objective,
    *,
    ref_logp_BJT: jax.Array | None = None,
    entropy_BJT: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One part's share of the loss and of its statistics, under TRL's names; `merge` joins the latter.

    Gradients flow to `logp_BJT` alone. Old log-probabilities may be left out for the one update that follows
    sampling: the policy is then its own old one. `mask_BJT` is `loss_mask`'s; what it hides may be anything.
    """
    if objective.beta > 0 and ref_logp_BJT is None:
        raise ValueError("objectives: beta > 0 needs ref_logp_BJT")

    def scored(x_BJT):
        return jnp.where(mask_BJT, x_BJT.astype(jnp.float32), 0.0)

    logp_BJT = scored(logp_BJT)
    old_logp_BJT = jax.lax.stop_gradient(logp_BJT if old_logp_BJT is None else scored(old_logp_BJT))
    present_BJ1 = jnp.any(mask_BJT, axis=-1, keepdims=True)
    advantage_BJ1 = jnp.where(present_BJ1, jax.lax.stop_gradient(advantage_BJ)[..., None], 0.0)

    # X is T, or 1 where a sequence has one ratio.
    log_ratio_BJX, used_BJX, number = logp_BJT - old_logp_BJT, mask_BJT, whole.tokens
    if objective.ratio == "sequence":
        log_ratio_BJX = jnp.sum(log_ratio_BJX, axis=-1, keepdims=True) / _length(mask_BJT)
        used_BJX, number = present_BJ1, whole.sequences
    ratio_BJX = jnp.exp(jnp.clip(log_ratio_BJX, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    low, high = 1 - objective.epsilon_low, 1 + objective.epsilon_high
    clipped_BJX = jnp.clip(ratio_BJX, low, high)
    too_low_BJX, too_high_BJX = ratio_BJX < low, ratio_BJX > high

    if objective.surrogate == "cispo":
        gain_BJT = jax.lax.stop_gradient(clipped_BJX) * advantage_BJ1 * logp_BJT
    else:
        capped_BJX = ratio_BJX if objective.delta is None else jnp.minimum(ratio_BJX, objective.delta)
        gain_BJX = jnp.minimum(capped_BJX * advantage_BJ1, clipped_BJX * advantage_BJ1)
        gain_BJT = jnp.broadcast_to(gain_BJX, mask_BJT.shape)
        too_low_BJX, too_high_BJX = too_low_BJX & (advantage_BJ1 < 0), too_high_BJX & (advantage_BJ1 > 0)
    loss = -_share(gain_BJT, mask_BJT, whole, objective.aggregate)

    def mean(x_BJX, used_BJX=used_BJX, number=number):
        return jnp.sum(jnp.where(used_BJX, x_BJX.astype(jnp.float32), 0.0)) / number

    stats = {
        "policy_loss": loss,
        "clip_ratio/low_mean": mean(too_low_BJX),
        "clip_ratio/high_mean": mean(too_high_BJX),
        "clip_ratio/region_mean": mean(too_low_BJX | too_high_BJX),
        "sampling/importance_sampling_ratio/mean": mean(ratio_BJX),
        "sampling/importance_sampling_ratio/min": jnp.min(ratio_BJX, where=used_BJX, initial=MAX_RATIO),
        "sampling/importance_sampling_ratio/max": jnp.max(ratio_BJX, where=used_BJX, initial=0.0),
    }
    if entropy_BJT is not None:
        stats["entropy"] = mean(entropy_BJT, mask_BJT, whole.tokens)
    if ref_logp_BJT is not None:
        kl_BJT, bounded_BJT = kl_k3(logp_BJT, scored(ref_logp_BJT), objective.kl_bound)
        stats["kl"] = mean(kl_BJT, mask_BJT, whole.tokens)
        stats["kl_bounded_ratio"] = mean(bounded_BJT, mask_BJT, whole.tokens)
        if objective.beta > 0:
            loss = loss + objective.beta * _share(kl_BJT, mask_BJT, whole, objective.aggregate)
    return loss, jax.lax.stop_gradient(stats)


def merge(stats: dict[str, jax.Array], more: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Join the statistics of two parts of a batch: shares add, extremes are compared."""
    how = {"min": jnp.minimum, "max": jnp.maximum}
    return {name: how.get(name.rpartition("/")[2], jnp.add)(stats[name], more[name]) for name in stats}


def _share(x_BJT, mask_BJT, whole: Totals, aggregate: str) -> jax.Array:
    """This part's share of the batch mean of a quantity of tokens."""
    x_BJT = jnp.where(mask_BJT, x_BJT, 0.0)
    match aggregate:
        case "sequence":
            return jnp.sum(x_BJT / _length(mask_BJT)) / whole.sequences
        case "token":
            return jnp.sum(x_BJT) / whole.tokens
        case "token_micro":
            return jnp.sum(x_BJT) / jnp.maximum(_count(mask_BJT), 1.0) / whole.parts
        case _:
            return jnp.sum(x_BJT) / (whole.sequences * whole.max_completion)


def _length(mask_BJT):
    """Tokens of each lane in the loss [B, J, 1], at least 1."""
    return jnp.maximum(jnp.sum(mask_BJT, axis=-1, keepdims=True, dtype=jnp.float32), 1.0)


def _count(mask):
    return jnp.sum(mask, dtype=jnp.float32)
