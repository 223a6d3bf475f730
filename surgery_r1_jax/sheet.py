"""`data augment`: frames as a run may see them, with their moved boxes and answers, on one sheet to look at."""

import string
from pathlib import Path

import numpy as np
from PIL import Image

from surgery_r1_jax import augment, images, location, options, pictures, records
from surgery_r1_jax.errors import InputError
from surgery_r1_jax.records import Box, Frame

DRAWN = 3  # times that each frame is drawn, beside itself as it is
_SIDE, _GAP = 640, 8  # pixels of a frame's longer side, and between frames


def write(settings: options.SFT | options.GRPO, out: Path, *, count: int) -> None:
    """A PNG with `count` frames of the run's split, each in a row: as it is, then as it may become.

    Raises: InputError where nothing is augmented, or for what cannot be read or written.
    """
    data = settings.data
    if not data.augment.on:
        raise InputError("data.augment changes nothing; give a share, such as --data.augment.flip_left_right=0.5")
    found = records.split(records.read(data.root, strict=data.strict, boxes=data.boxes), data.split)
    rule = location.settled(found)
    chosen = sorted(set(np.linspace(0, len(found) - 1, count).round().astype(int)))
    rows = []
    for frame in (found[at] for at in chosen):
        picture = images.load(frame.image)
        cells = [_cell(frame, picture, "as it is")]
        for number in range(DRAWN):
            rng = np.random.default_rng([settings.seed, len(rows), number])
            cells.append(_cell(*augment.apply(frame, picture, data.augment, rng, rule=rule), f"drawn, {number + 1}"))
        rows.append(cells)
    pictures.save(_laid_out(rows), out)


def _cell(frame: Frame, picture: Image.Image, about: str) -> Image.Image:
    """A frame with each box once, and below it what is asked about them."""
    said: dict[Box, list[str]] = {}
    for record in frame.records:
        said.setdefault(record.box, []).append(f"{record.tool or record.question} {record.answer}")
    boxes = dict(zip(said, string.ascii_lowercase, strict=False))
    lines = [f"{frame.id}, {about}"]
    lines += [f"{name}: {'; '.join(dict.fromkeys(said[box]))}" for box, name in boxes.items()]
    lines += [record.think for record in frame.records if record.think][:1]
    small = picture.copy()
    small.thumbnail((_SIDE, _SIDE))
    return pictures.named(small, [(name, box) for box, name in boxes.items()], lines)


def _laid_out(rows: list[list[Image.Image]]) -> Image.Image:
    """The cells of each row beside each other, the rows below each other."""
    width = max(sum(cell.width + _GAP for cell in cells) for cells in rows)
    heights = [max(cell.height for cell in cells) + _GAP for cells in rows]
    sheet = Image.new("RGB", (width, sum(heights)), "white")
    for row, cells in enumerate(rows):
        x = 0
        for cell in cells:
            sheet.paste(cell, (x, sum(heights[:row])))
            x += cell.width + _GAP
    return sheet
