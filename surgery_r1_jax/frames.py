"""A frame with its records, and what every reader of frames needs: files that lie where they should, in order."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from surgery_r1_jax import vocabulary
from surgery_r1_jax.labels import Box, Problem, Record, Refused

_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height

Report = Callable[[Problem], None]


@dataclass(frozen=True)
class Frame:
    """One image with its records; `width` and `height` are those of the upright image in pixels."""

    id: str  # "seq_2/frame000"
    sequence: str  # "seq_2"; "seq2" in EndoVis-17
    image: Path  # or what can be read like one: prepared.Stored
    width: int
    height: int
    records: tuple[Record, ...]
    split: str | None = None  # train, dev, val or external; None where the sequence tells it
    classes: tuple[str, ...] = vocabulary.CLASSES  # the answers of its data set
    source: int = 0  # which of the data sets that a run draws from it is of

    @property
    def organ_box(self) -> Box | None:
        """Box of the organ record, if the frame has one."""
        return next((record.box for record in self.records if record.kind == vocabulary.ORGAN), None)


def require_file(file: Path, inside: Path, source: str) -> None:
    """Refuse anything but an ordinary file that, links followed, lies inside; opens nothing."""
    try:
        target = file.resolve(strict=True)
        ordinary = target.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a broken link, links in a circle, a NUL in the name
        raise Refused(source, f"{file} cannot be opened ({error})") from None
    if not target.is_relative_to(inside):
        raise Refused(source, f"{file} leads out of the data's folder; put the file itself there")
    if not ordinary:
        raise Refused(source, f"{file} is not an ordinary file")


def image_size(image: Path, source: str) -> tuple[int, int]:
    """Width and height of the upright image, from its header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(image, formats=("PNG", "JPEG")) as header:
                width, height = header.size
                # Of a PNG without EXIF data in its header, getexif would decode the pixels to look for more.
                known = header.format == "JPEG" or "exif" in header.info
                turned = known and header.getexif().get(0x0112) in _TURNED
    except Exception as error:  # Pillow raises a dozen kinds on damaged files
        raise Refused(source, f"image {image} is not a whole PNG or JPEG ({error})") from None
    return (height, width) if turned else (width, height)


def natural(name: str) -> list[str | int]:
    """Sort key that takes runs of digits as numbers."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))]
