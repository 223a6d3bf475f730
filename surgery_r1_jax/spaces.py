"""Boxes written in another space than the one they are read in: the mistake that costs a night and raises no error.

Boxes of frames full of instruments come up to the borders of the frame. Where they stop short of these, or leave the
frame, and another reading of the same numbers fits them into it exactly, that reading is named.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

SPACES = ("pixel", "unit", "thousand")

_FEWEST = 12  # boxes to judge by
_INSIDE, _DOUBTED = 0.99, 0.9  # share of the boxes that fit, for a better reading and below which one is doubted
_REACHED, _SHORT = 0.995, 0.98  # share of the frame that the boxes reach, likewise
_SLACK = 0.002  # of a side, for corners that count from 1

_ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "x1, y1, x2, y2": lambda box_N4: box_N4,
    "x, y, width, height": lambda box_N4: np.concatenate([box_N4[:, :2], box_N4[:, :2] + box_N4[:, 2:]], axis=1),
    "y1, x1, y2, x2": lambda box_N4: box_N4[:, [1, 0, 3, 2]],
}
_TITLES = {"pixel": "pixels", "unit": "0..1", "thousand": "0..1000"}


class Written(NamedTuple):
    """A box as it was read, in parts of its frame but not clipped or put in order, and the frame's size."""

    box: tuple[float, float, float, float]
    width: int
    height: int


def doubt(boxes: Iterable[Written], space: str = "pixel") -> str | None:
    """Why boxes that were read in `space`, one of SPACES, look like another; None where all seems well."""
    boxes = list(boxes)
    if len(boxes) < _FEWEST:
        return None
    size_N2 = np.array([(box.width, box.height) for box in boxes], float)
    extents = {"pixel": size_N2, "unit": np.ones_like(size_N2), "thousand": np.full_like(size_N2, 1000)}
    number_N4 = np.array([box.box for box in boxes]) * np.tile(extents[space], 2)
    inside, reached = _fit(number_N4, extents[space])
    if inside >= _DOUBTED and reached >= _SHORT:
        return None
    for order, arranged in _ORDERS.items():
        for other in dict.fromkeys((space, *SPACES)):
            inside, reached = _fit(arranged(number_N4), extents[other])
            if inside >= _INSIDE and reached >= _REACHED:
                meant, read = f"{order} in {_TITLES[other]}", f"x1, y1, x2, y2 in {_TITLES[space]}"
                return f"the boxes look like {meant}, and are read as {read}"
    return None


def _fit(number_N4: np.ndarray, extent_N2: np.ndarray) -> tuple[float, float]:
    """The share of the numbers that are boxes inside of the extents, and how far across these come."""
    box_N4 = number_N4 / np.tile(extent_N2, 2)
    ordered_N = (box_N4[:, :2] < box_N4[:, 2:]).all(axis=1)
    inside_N = ordered_N & (box_N4 > -_SLACK).all(axis=1) & (box_N4 < 1 + _SLACK).all(axis=1)
    if not inside_N.any():
        return 0.0, 0.0
    return float(inside_N.mean()), float(box_N4[inside_N, 2:].max(axis=0).min())
