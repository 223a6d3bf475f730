"""Advantages: how much better than the other completions of its question each completion did.

Defined on every input, in float32. A reward that is not finite enters nothing, gets 0, is marked unscorable
and counted. A group of one and a group of equals get exactly 0. Rewards as large as 1e38 do not overflow.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

STD_FLOOR = 1e-4  # added to the standard deviation of rewards (TRL, VLM-R1)
FLAT_STD = 1e-8  # a group whose rewards spread no more than this has no signal (TRL)


class Advantages(NamedTuple):
    """How much better than the rest of its group each completion did."""

    value_BJ: jax.Array
    scorable_BJ: jax.Array  # valid lanes with a finite reward; the loss must leave out all others
    flat_BQ: jax.Array  # groups without spread: only the KL term is left to learn from them
    stats: dict[str, jax.Array]


def from_rewards(
    reward_BJ: jax.Array,
    group_BJ: jax.Array,
    valid_BJ: jax.Array,
    *,
    num_groups: int,
    scale: Literal["group", "batch", "none"] = "group",
    baseline_BJ: jax.Array | None = None,
) -> Advantages:
    """Compare each reward with the others of its question: (reward - mean) / (unbiased deviation + 1e-4).

    `group_BJ` numbers the questions of a frame from 0 to num_groups - 1; frames never mix. `scale` says whose
    deviation divides: the group's, the batch's, or none. `baseline_BJ` restricts who is compared (default:
    all, truncated completions too); a lane outside it gets 0, so the loss should leave it out.
    Sources: arXiv 2402.03300 section 4.1.2; `scale` as in trl grpo_trainer.py.
    """
    reward_BJ = reward_BJ.astype(jnp.float32)
    scorable_BJ = valid_BJ & jnp.isfinite(reward_BJ)
    counted_BJ = scorable_BJ if baseline_BJ is None else scorable_BJ & baseline_BJ
    member_BJQ = (group_BJ[..., None] == jnp.arange(num_groups)[None, None]) & counted_BJ[..., None]
    reward_BJQ = jnp.where(member_BJQ, reward_BJ[..., None], 0.0)

    gap_BJQ, std_B1Q, unit_B1Q = _spread(reward_BJQ, member_BJQ, axis=1)
    if scale == "group":
        value_BJQ = _divide(gap_BJQ, std_B1Q + STD_FLOOR / unit_B1Q)
    elif scale == "batch":
        _, std_111, unit_111 = _spread(reward_BJQ, member_BJQ, axis=(0, 1, 2))
        value_BJQ = gap_BJQ * unit_B1Q / (std_111 * unit_111 + STD_FLOOR)
    else:
        value_BJQ = gap_BJQ * unit_B1Q

    present_BQ = jnp.any(member_BJQ, axis=1)
    flat_BQ = present_BQ & (std_B1Q <= FLAT_STD)[:, 0]
    stats = {
        "reward": _mean(reward_BJ, scorable_BJ),
        "reward_std": _mean((std_B1Q * unit_B1Q)[:, 0], present_BQ),
        "frac_reward_zero_std": _count(flat_BQ) / jnp.maximum(_count(present_BQ), 1.0),
        "groups": _count(present_BQ),
        "flat_groups": _count(flat_BQ),
        "unscorable": _count(valid_BJ & ~scorable_BJ),
    }
    return Advantages(jnp.sum(value_BJQ, axis=-1), scorable_BJ, flat_BQ, stats)


def from_terms(
    reward_RBJ: jax.Array,
    weight_R: jax.Array,
    group_BJ: jax.Array,
    valid_BJ: jax.Array,
    *,
    num_groups: int,
    baseline_BJ: jax.Array | None = None,
) -> Advantages:
    """Normalise each reward term in its group first, then sum by weight and standardise over the batch.

    So a near-binary term cannot drown a continuous one. A lane with any term that is not finite is
    unscorable; a group is flat when every term is.
    Source: GDPO, arXiv 2601.05242 (TRL's `normalize_then_sum`).
    """

    def compare(reward_BJ):
        return from_rewards(reward_BJ, group_BJ, valid_BJ, num_groups=num_groups, baseline_BJ=baseline_BJ)

    weight_R11 = weight_R.astype(jnp.float32)[:, None, None]
    finite_1BJ = jnp.all(jnp.isfinite(reward_RBJ), axis=0, keepdims=True)
    reward_RBJ = jnp.where(finite_1BJ, reward_RBJ.astype(jnp.float32), jnp.nan)
    total = compare(jnp.sum(weight_R11 * reward_RBJ, axis=0))
    terms = jax.vmap(compare)(reward_RBJ)

    counted_BJ = total.scorable_BJ if baseline_BJ is None else total.scorable_BJ & baseline_BJ
    value_BJ = jnp.sum(weight_R11 * terms.value_BJ, axis=0)
    gap_BJ, std_11, unit_11 = _spread(value_BJ, counted_BJ, axis=(0, 1))
    flat_BQ = jnp.all(terms.flat_BQ, axis=0)
    flat = _count(flat_BQ)
    shares = {"flat_groups": flat, "frac_reward_zero_std": flat / jnp.maximum(total.stats["groups"], 1.0)}
    return Advantages(_divide(gap_BJ, std_11 + STD_FLOOR / unit_11), total.scorable_BJ, flat_BQ, total.stats | shares)


def _spread(reward, member, axis):
    """Members' distance from their mean (0 elsewhere) and its unbiased deviation, both in units of `unit`.

    The unit is 1 unless rewards exceed 1,000: then it grows with them, so that no square overflows. Distances
    are taken from the smallest member first, so that equal rewards are exactly 0 apart.
    """
    number = jnp.sum(member, axis, keepdims=True, dtype=jnp.float32)
    unit = jnp.max(jnp.abs(reward) / 1000, axis, keepdims=True, where=member, initial=1.0)
    scaled = reward / unit
    scaled = scaled - jnp.min(scaled, axis, keepdims=True, where=member, initial=jnp.inf)
    mean = jnp.sum(scaled, axis, keepdims=True, where=member) / jnp.maximum(number, 1.0)
    gap = jnp.where(member, scaled - mean, 0.0)
    variance = jnp.sum(gap**2, axis, keepdims=True) / jnp.maximum(number - 1.0, 1.0)
    return gap, jnp.sqrt(variance), unit


def _divide(gap, spread):
    """The quotient, and 0 for a gap of 0: the floor under the spread vanishes beside rewards of 1e38."""
    return jnp.where(gap == 0, 0.0, gap / spread)


def _mean(x, used):
    """Mean of the entries in use, 0 if there are none; divided before summing, so that it cannot overflow."""
    return jnp.sum(jnp.where(used, x / jnp.maximum(_count(used), 1.0), 0.0))


def _count(used):
    return jnp.sum(used, dtype=jnp.float32)
