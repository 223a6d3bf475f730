"""Boxes as the whole numbers a model writes, and back.

Inside the program a box is float xyxy in [0, 1] on the original frame; a model family writes it on a grid of
its own. A perfect box that is read on the wrong grid scores almost nothing. The pixel grid is that of the
resized image the model saw, so both directions take that size.
"""

import dataclasses
import math
from collections.abc import Sequence

from surgery_r1_jax.labels import Box


@dataclasses.dataclass(frozen=True)
class BoxCodec:
    """A grid for boxes: `steps` quanta along each side or, where None, one per pixel of the resized image."""

    units: str  # as a prompt calls them
    steps: int | None = None

    def encode(self, box: Box, width: int, height: int) -> tuple[int, int, int, int]:
        """The nearest grid lines of a box: each edge within half a quantum, x0 < x1 and y0 < y1.

        Only a side so short that it would collapse may miss by more, and never by more than one quantum: it
        becomes the quantum that holds its middle, because a box without area can never be read back.
        """
        columns, rows = self._grid(width, height)
        x0, x1 = _side(box[0], box[2], columns)
        y0, y1 = _side(box[1], box[3], rows)
        return x0, y0, x1, y1

    def decode(self, units: Sequence[float], width: int, height: int) -> Box:
        """The box of four grid coordinates, whole or not; one beyond the image stays beyond it."""
        columns, rows = self._grid(width, height)
        x0, y0, x1, y1 = units
        return x0 / columns, y0 / rows, x1 / columns, y1 / rows

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        return (width, height) if self.steps is None else (self.steps, self.steps)


# Qwen2.5-VL writes pixels of the resized image, Qwen2-VL and Qwen3-VL thousandths of each side
# (QwenLM/Qwen3-VL: qwen-vl-finetune/tools/process_bbox.ipynb).
RESIZED_PIXELS = BoxCodec("whole pixels of the image")
PER_MILLE = BoxCodec("thousandths of the image's width and height", steps=1000)


def _side(low: float, high: float, steps: int) -> tuple[int, int]:
    # Edges lie between pixels, so the last is `steps`. Qwen's notebook clamps to steps - 1, as if edges were
    # pixels: there every box at the right or lower border loses a quantum.
    first = min(max(round(low * steps), 0), steps)
    last = min(max(round(high * steps), 0), steps)
    if first < last:
        return first, last
    middle = min(max(math.floor((low + high) / 2 * steps), 0), steps - 1)
    return middle, middle + 1
