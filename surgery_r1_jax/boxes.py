"""Box geometry: area, IoU, GIoU and the field's legacy IoU, safe for any numbers a model may write.

A box is (x0, y0, x1, y1), exclusive edges, usually as fractions of the frame. Leading axes broadcast. Every
function takes the array namespace as `xp`: `jax.numpy` in rewards (float32, jittable), `numpy` in metrics
(float64, the same bits everywhere). Nothing raises, nothing returns NaN: a box that is not finite or is
inverted is unmeasurable and scores lowest with every partner. Measurable boxes without an inside, points
and lines, are not valid either, but have a defined distance.
"""

import jax.numpy as jnp

LARGEST_EDGE = 1e18
"""Edges beyond this count as not finite: the square of a side still fits float32."""


def is_valid(box_4, xp=jnp):
    """Whether a box is finite and has an inside: x0 < x1 and y0 < y1."""
    box_4, _ = sanitise(box_4, xp)
    return xp.all(box_4[..., :2] < box_4[..., 2:], axis=-1)


def sanitise(box_4, xp=jnp):
    """Return (box, measurable): floats of at least 32 bits, the zero box where not finite or inverted."""
    box_4 = xp.asarray(box_4)
    box_4 = box_4.astype(xp.promote_types(box_4.dtype, xp.float32))
    finite = xp.all(xp.abs(box_4) <= LARGEST_EDGE, axis=-1)
    measurable = finite & xp.all(box_4[..., :2] <= box_4[..., 2:], axis=-1)
    return xp.where(measurable[..., None], box_4, xp.zeros_like(box_4)), measurable


def area(box_4, xp=jnp):
    """Area of a box, at least 0 and finite; 0 for an unmeasurable one."""
    box_4, _ = sanitise(box_4, xp)
    return xp.prod(box_4[..., 2:] - box_4[..., :2], axis=-1)


def iou(a_4, b_4, xp=jnp):
    """Intersection over union, in [0, 1]: symmetric, exactly 1 for equal boxes only, 0 for an empty union."""
    (a_4, _), (b_4, _) = sanitise(a_4, xp), sanitise(b_4, xp)
    return _ratio(a_4, b_4, *_shares(a_4, b_4, xp), xp)


def giou(a_4, b_4, xp=jnp):
    """Generalised IoU, in [-1, 1]: 1 for equal boxes only, 0 for an empty hull, -1 for an unmeasurable box.

    Source: Rezatofighi et al. 2019 (arXiv:1902.09630): IoU - (hull - union) / hull.
    """
    (a_4, a_measurable), (b_4, b_measurable) = sanitise(a_4, xp), sanitise(b_4, xp)
    inter, union = _shares(a_4, b_4, xp)
    hull = xp.maximum(a_4[..., 2:], b_4[..., 2:]) - xp.minimum(a_4[..., :2], b_4[..., :2])
    value = _ratio(a_4, b_4, inter, union, xp) - (1 - xp.minimum(union, 1))
    value = xp.where(xp.all(hull > 0, axis=-1), value, xp.zeros_like(value))
    return xp.where(a_measurable & b_measurable, value, -xp.ones_like(value))


def legacy_iou(a_4, b_4, xp=jnp):
    """What the Surgical-VQLA code bases print as mIoU, in [0, 1]; far above the true IoU, so never a reward.

    They apply the pixel convention `x1 - x0 + 1` to boxes in [0, 1], which enlarges both by one whole frame.
    Source: `mIoU_xyxy` in longbai1006/Surgical-VQLA, CAT-ViL, Surgical-VQLAPlus.
    """
    (a_4, a_measurable), (b_4, b_measurable) = sanitise(a_4, xp), sanitise(b_4, xp)
    value = iou(*(xp.concatenate([box_4[..., :2], box_4[..., 2:] + 1], axis=-1) for box_4 in (a_4, b_4)), xp)
    return xp.where(a_measurable & b_measurable, value, xp.zeros_like(value))


def _shares(a_4, b_4, xp):
    """Intersection and union of two measurable boxes as shares of their hull, the smallest box around both.

    IoU and GIoU do not change when an axis is rescaled, and in shares nothing overflows or underflows.
    """
    low_4, high_4 = xp.minimum(a_4, b_4), xp.maximum(a_4, b_4)
    hull_2 = high_4[..., 2:] - low_4[..., :2]
    hull_2 = xp.where(hull_2 > 0, hull_2, xp.ones_like(hull_2))
    shared_2 = xp.maximum(low_4[..., 2:] - high_4[..., :2], 0)
    a, b, inter = (
        xp.prod(side_2 / hull_2, axis=-1)
        for side_2 in (a_4[..., 2:] - a_4[..., :2], b_4[..., 2:] - b_4[..., :2], shared_2)
    )
    # Larger and smaller, not a and b: compilers fuse a product with the next sum, which breaks symmetry.
    larger, smaller = xp.maximum(a, b), xp.minimum(a, b)
    inter = xp.minimum(inter, smaller)
    return inter, larger + (smaller - inter)


def _ratio(a_4, b_4, inter, union, xp):
    """IoU from `_shares`: rounding may not make unequal boxes reach 1, nor keep equal ones from it."""
    below_one = 1 - xp.finfo(union.dtype).epsneg
    ratio = xp.minimum(inter / xp.where(union > 0, union, xp.ones_like(union)), below_one)
    equal = xp.all(a_4 == b_4, axis=-1) & (union > 0)
    return xp.where(equal, xp.ones_like(ratio), ratio)
