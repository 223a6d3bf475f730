"""What a completion earns: format, accuracy, IoU and the coherence between answer and box.

The host has parsed the text already (`answer`); here stand only numbers, in arrays of any leading shape,
such as [B, J]. Every term is a pure function of `Judged` in a stated range. Padding earns exactly 0, and no
number in a box can make a NaN. An answer counts only where one is wanted, a box only where one is wanted,
coherence only where both are.

The rewards follow Surgery-R1 (arXiv:2506.19469), whose formulas were not readable: those here are our own
reconstruction. Coherence has several readings in the literature; `joint` is the default.
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from surgery_r1_jax import boxes, errors, options, vocabulary

LOCATION = vocabulary.KINDS.index("location")
LEFT_TOP = vocabulary.CLASSES.index("left-top")
"""First of the four location classes: left-top, right-top, left-bottom, right-bottom."""

TIE = 1e-6
"""Centres closer than this are level: far below a pixel, above the rounding of float32."""


def require_places(config: options.Reward, classes: Sequence[str]) -> None:
    """Refuse `geometry`, which reads a quadrant off a class index, for answers without the four locations there."""
    if config.coherence_form == "geometry" and tuple(classes[LEFT_TOP:][:4]) != vocabulary.LOCATIONS:
        raise errors.InputError(
            "reward.coherence_form geometry needs the official classes with their four locations; take another form"
        )


class Judged(NamedTuple):
    """Completions beside their gold, as numbers; leading axes are free but the same in all fields.

    Class indices are int32, -1 for none. Boxes are xyxy in [0, 1] of the frame, anything if not ok.
    """

    answer: jax.Array
    gold_answer: jax.Array
    box: jax.Array  # [..., 4]
    box_ok: jax.Array
    gold_box: jax.Array  # [..., 4]
    format_ok: jax.Array  # strict grammar, judged against what was wanted
    kind: jax.Array  # index into vocabulary.KINDS
    wants_answer: jax.Array
    wants_box: jax.Array
    think_answer: jax.Array  # last class of the question's kind that the trace asserts
    think_box: jax.Array  # [..., 4, 4]: up to four boxes named in the trace
    think_box_ok: jax.Array  # [..., 4]
    organ_box: jax.Array  # [..., 4], gold box of the frame's organ
    organ_ok: jax.Array
    valid: jax.Array  # False = padding


class Rewards(NamedTuple):
    """The terms before weighting, and their weighted sum; float32, shaped as `Judged.answer`."""

    format: jax.Array
    accuracy: jax.Array
    iou: jax.Array
    coherence: jax.Array
    total: jax.Array


@functools.partial(jax.jit, static_argnames="config")
def score(judged: Judged, config: options.Reward) -> Rewards:
    """All terms and their total, in [0, sum of weights]; `concord` can lower it by its penalty."""
    terms = (
        well_formed(judged),
        accuracy(judged),
        _iou_term(judged, config),
        _coherence_term(judged, config),
    )
    weights = (config.format_weight, config.accuracy_weight, config.iou_weight, config.coherence_weight)
    return Rewards(*terms, total=sum(weight * term for weight, term in zip(weights, terms, strict=True)))


def _iou_term(judged: Judged, config: options.Reward) -> jax.Array:
    match config.iou_form:
        case "true":
            return iou(judged)
        case "threshold":
            return iou_threshold(judged, config.tau)
        case "squared":
            return iou_squared(judged)
        case "giou":
            return giou(judged)


def _coherence_term(judged: Judged, config: options.Reward) -> jax.Array:
    match config.coherence_form:
        case "joint":
            return joint(judged, config.tau)
        case "joint_soft":
            return joint_soft(judged)
        case "harmonic":
            return harmonic(judged)
        case "concord":
            return concord(judged, config.tau, config.concord_lambda)
        case "geometry":
            return geometry(judged, config.location_reference, config.location_top)
        case "think_answer":
            return think_answer(judged)
        case "think_box":
            return think_box(judged)
        case "triple":
            return triple(judged, config.tau)


# Format and accuracy


def well_formed(judged: Judged) -> jax.Array:
    """1 where the completion keeps the grammar, else 0."""
    return _earned(judged.valid, judged.format_ok)


def accuracy(judged: Judged) -> jax.Array:
    """1 where the answer is the gold class, else 0."""
    return _earned(_right(judged))


# Overlap with the gold box


def iou(judged: Judged) -> jax.Array:
    """True IoU with the gold box, in [0, 1]; 0 for a missing or malformed box."""
    return _earned(_has_box(judged), boxes.iou(judged.box, judged.gold_box))


def iou_threshold(judged: Judged, tau: float = 0.5) -> jax.Array:
    """1 where the IoU reaches tau, else 0."""
    return _earned(_hit(judged, tau))


def iou_squared(judged: Judged) -> jax.Array:
    """IoU squared, in [0, 1]: flat far from the gold, steep near it."""
    return iou(judged) ** 2


def giou(judged: Judged) -> jax.Array:
    """(1 + GIoU) / 2, in [0, 1]: also tells a near miss from a far one; 0 for a missing or malformed box."""
    return _earned(_has_box(judged), (1 + boxes.giou(judged.box, judged.gold_box)) / 2)


# Coherence of answer and box, both against gold


def joint(judged: Judged, tau: float = 0.5) -> jax.Array:
    """1 where the answer is right and the IoU reaches tau, else 0: right in the wrong place pays nothing."""
    return _earned(_both_wanted(judged), _right(judged) & _hit(judged, tau))


def joint_soft(judged: Judged) -> jax.Array:
    """IoU where the answer is right, else 0; in [0, 1]."""
    return _earned(_both_wanted(judged) & _right(judged), iou(judged))


def harmonic(judged: Judged) -> jax.Array:
    """Harmonic mean of accuracy and IoU, in [0, 1]: 2 s / (1 + s) where the answer is right, else 0."""
    soft = joint_soft(judged)
    return 2 * soft / (1 + soft)


def concord(judged: Judged, tau: float = 0.5, penalty: float = 0.5) -> jax.Array:
    """1 where answer and box are both right, -penalty where only one is, 0 where neither; in [-penalty, 1].

    Being wrong twice earns 0, not the 1 of plain agreement, which a policy could farm.
    """
    right, hit = _right(judged), _hit(judged, tau)
    return _earned(_both_wanted(judged), jnp.where(right & hit, 1.0, jnp.where(right | hit, -penalty, 0.0)))


def geometry(
    judged: Judged,
    reference: Literal["organ", "image"] = "organ",
    top: Literal["larger_y", "smaller_y"] = "larger_y",
) -> jax.Array:
    """1 where a location answer names the quadrant of the completion's own box, else 0; other kinds earn 0.

    Blind to gold. The defaults are the rule of EndoVis-18-VQLA: seen from the centre of the organ's box,
    "top" lies lower in the picture. A centre on the line is right, and top if "larger_y".
    """
    x, y = _centre(judged.box)
    organ_x, organ_y = _centre(judged.organ_box)
    in_organ = reference == "organ"
    right = x - (organ_x if in_organ else 0.5) >= -TIE
    lower = y - (organ_y if in_organ else 0.5) >= -TIE
    bottom = ~lower if top == "larger_y" else lower
    quadrant = LEFT_TOP + right.astype(jnp.int32) + 2 * bottom.astype(jnp.int32)
    applies = _both_wanted(judged) & _has_box(judged) & (judged.kind == LOCATION)
    if in_organ:
        applies &= judged.organ_ok & boxes.is_valid(judged.organ_box)
    return _earned(applies, judged.answer == quadrant)


# Coherence with the reasoning trace


def think_answer(judged: Judged) -> jax.Array:
    """1 where the answer is right and the trace concluded it, else 0; a consistent error earns nothing."""
    return _earned(_both_wanted(judged) & _right(judged), judged.think_answer == judged.answer)


def think_box(judged: Judged) -> jax.Array:
    """Largest IoU of the answer's box with a box in the trace, in [0, 1]; blind to the gold box."""
    overlap_4 = boxes.iou(judged.think_box, judged.box[..., None, :])
    overlap = jnp.max(jnp.where(judged.think_box_ok, overlap_4, 0), axis=-1)
    return _earned(_both_wanted(judged) & _has_box(judged), overlap)


def triple(judged: Judged, tau: float = 0.5) -> jax.Array:
    """1 where `joint` holds, the trace concluded the answer, and a box in the trace, if any, reaches tau."""
    traced = (think_box(judged) >= tau) | ~jnp.any(judged.think_box_ok, axis=-1)
    return _earned(traced, joint(judged, tau) * think_answer(judged))


def likelihood(judged: Judged, answer_logp: jax.Array, answer_length: jax.Array, bonus: float = 0.5) -> jax.Array:
    """The bonus where a right answer follows from its trace at least as surely as in its group, else 0.

    The last axis is the group. `answer_logp` is the reference model's summed log-probability of the answer's
    tokens given the trace, `answer_length` their number. Not a form of `score`: it needs a reference pass.
    Source: GRPO-CARE (arXiv:2506.16141): probability per token up to 0.95, against the right ones' mean.
    """
    right = _right(judged)
    p = jnp.exp(answer_logp.astype(jnp.float32) / jnp.maximum(answer_length, 1).astype(jnp.float32))
    p = jnp.where(right & (p >= 0), jnp.minimum(p, 0.95), 0)
    num_right = jnp.sum(right, axis=-1, keepdims=True, dtype=jnp.float32)
    mean = jnp.sum(p, axis=-1, keepdims=True) / jnp.maximum(num_right, 1)
    return _earned(right & (p >= mean - 0.01), bonus)


# Facts shared by the terms: boolean, False for padding


def _right(judged: Judged) -> jax.Array:
    same = (judged.answer == judged.gold_answer) & (judged.gold_answer >= 0)
    return judged.valid & judged.wants_answer & same


def _has_box(judged: Judged) -> jax.Array:
    return judged.valid & judged.wants_box & judged.box_ok & boxes.is_valid(judged.box)


def _hit(judged: Judged, tau: float) -> jax.Array:
    return _has_box(judged) & (boxes.iou(judged.box, judged.gold_box) >= tau)


def _both_wanted(judged: Judged) -> jax.Array:
    return judged.valid & judged.wants_answer & judged.wants_box


def _centre(box: jax.Array) -> tuple[jax.Array, jax.Array]:
    box, _ = boxes.sanitise(box)
    return (box[..., 0] + box[..., 2]) / 2, (box[..., 1] + box[..., 3]) / 2


def _earned(condition: jax.Array, amount: jax.Array | float = 1.0) -> jax.Array:
    """The amount as float32 where the condition holds, exactly 0 elsewhere."""
    return jnp.where(condition, jnp.asarray(amount, jnp.float32), jnp.float32(0))
