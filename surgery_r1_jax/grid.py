"""All that follows from an image's patch grid: window layout, 2-D patch places, 3-D token positions.

Qwen2.5-VL's geometry depends on the data (how many patches, which windows are cut short at the border). It is
worked out here on the host, once a frame, so that the model sees only arrays of fixed shape: every window is
padded to the same number of slots, and the un-reordering after the tower is one gather.

Source: transformers:models/qwen2_5_vl/modeling_qwen2_5_vl.py (get_window_index, rot_pos_emb, get_rope_index).
Departures: windows are padded to full size instead of being described by cumulative lengths; tokens are fetched
in raster order by index instead of sorting the merged tokens back.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Grid = tuple[int, int]  # patch rows, patch columns of one image


class Layout(NamedTuple):
    """Where the patches of a frame's images lie in the tower's window buffer."""

    source_WS: np.ndarray  # int32, row of the patch in the preprocessor's order, images one after another; -1 = empty
    hw_WS2: np.ndarray  # int32, patch row and column within its image
    image_WS: np.ndarray  # int32, 1-based number of the image within the frame, 0 = empty slot
    unit_of_token: np.ndarray  # int32 [image tokens], merged unit of every image token, in raster order


def count_windows(grids: Sequence[Grid], side: int, merge: int) -> int:
    """Windows needed for images of these patch grids."""
    return sum(-(-h // merge // side) * -(-w // merge // side) for h, w in grids)


def arrange(grids: Sequence[Grid], *, side: int, merge: int, windows: int | None = None) -> Layout:
    """Lay the patches of one frame's images out in windows of `side` x `side` merged units.

    A slot holds one patch; the merge^2 patches of a merged unit are neighbours, in the preprocessor's order.
    `windows` pads the buffer to that many windows (default: just enough).
    Raises: ValueError where they are too few.
    """
    per_unit = merge * merge
    needed = count_windows(grids, side, merge)
    windows = needed if windows is None else windows
    if windows < needed:
        raise ValueError(f"{needed} windows do not fit in a buffer of {windows}")
    slots = side * side * per_unit
    source_WS = np.full((windows, slots), -1, np.int32)
    hw_WS2 = np.zeros((windows, slots, 2), np.int32)
    image_WS = np.zeros((windows, slots), np.int32)
    units = []
    first_window = first_patch = 0
    for number, (height, width) in enumerate(grids, start=1):
        rows, cols = height // merge, width // merge
        row, col = (axis.ravel() for axis in np.mgrid[:rows, :cols])  # merged units in raster order
        window = first_window + row // side * -(-cols // side) + col // side
        # Units of a window cut short by the border stay packed at its front, in raster order.
        window_cols = np.minimum(side, cols - col // side * side)
        rank = row % side * window_cols + col % side
        inside = np.arange(per_unit)
        w, s = np.repeat(window, per_unit), (rank[:, None] * per_unit + inside).ravel()
        source_WS[w, s] = first_patch + np.arange(rows * cols * per_unit)
        hw_WS2[w, s, 0] = (row[:, None] * merge + inside // merge).ravel()
        hw_WS2[w, s, 1] = (col[:, None] * merge + inside % merge).ravel()
        image_WS[w, s] = number
        units.append(window * (slots // per_unit) + rank)
        first_window = window.max() + 1
        first_patch += height * width
    unit_of_token = np.concatenate(units).astype(np.int32) if units else np.zeros(0, np.int32)
    return Layout(source_WS, hw_WS2, image_WS, unit_of_token)


def rope_positions(ids: np.ndarray, image_id: int, grids: Sequence[Grid], merge: int) -> tuple[np.ndarray, int]:
    """Temporal, row and column position of every prefix token, and the position that follows.

    Text advances all three together; an image's tokens share one temporal position and spread over rows and
    columns. Every branch goes on from `next_pos = max position + 1`, whatever the prefix length or padding.

    Returns int32 [3, P] and next_pos.
    Raises: ValueError where `ids` does not hold one image token for every merged unit of the grids.
    """
    ids = np.asarray(ids)
    tokens, units = int(np.sum(ids == image_id)), sum(h * w for h, w in grids) // merge**2
    if tokens != units:
        raise ValueError(f"{tokens} image tokens for {units} merged units")
    positions_3P = np.zeros((3, ids.size), np.int32)
    next_pos = at = 0
    remaining = iter(grids)
    while at < ids.size:
        if ids[at] == image_id:
            height, width = next(remaining)
            rows, cols = height // merge, width // merge
            end = at + rows * cols
            row, col = (axis.ravel() for axis in np.mgrid[:rows, :cols])
            positions_3P[:, at:end] = next_pos + np.stack([np.zeros_like(row), row, col])
            next_pos += max(rows, cols)
        else:
            images = np.flatnonzero(ids[at:] == image_id)
            end = at + int(images[0]) if images.size else ids.size
            positions_3P[:, at:end] = next_pos + np.arange(end - at)
            next_pos += end - at
        at = end
    return positions_3P, next_pos
