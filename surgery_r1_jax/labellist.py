"""A list of labels without their images: one text file, `seq_2/frame000|question|answer|x1,y1,x2,y2` a line.

Reasoning can be written from it before the frames are at hand.
"""

import logging
from pathlib import Path

from surgery_r1_jax.errors import InputError, printable
from surgery_r1_jax.labels import Problem, Record, Refused, parse_line
from surgery_r1_jax.records import Frame

SIZE = (1280, 1024)  # of the frames of EndoVis-18 and EndoVis-17

_MAX_NAME = 200  # characters of a frame's id
_NAME = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")


def read(path: str | Path, size: tuple[int, int] = SIZE) -> list[Frame]:
    """The frames of a list in its order, each with the path that its image would have; all are of (width, height) size.

    A box that leaves the frame is clipped, and one line of the log tells how many were. Raises: InputError.
    """
    path = Path(path)
    records: dict[str, list[Record]] = {}
    warned: list[Problem] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    name, record, warning = _read_line(line, f"{path}:{number}", size)
                    records.setdefault(name, []).append(record)
                    warned += [warning] if warning else []
    except Refused as refusal:
        raise InputError(f"{refusal.problem}; mend or remove the line") from None
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read ({error.strerror}); name a data set or a list") from None
    if not records:
        raise InputError(f"{printable(path)}: holds no label; a line reads seq_2/frame000|question|answer|x1,y1,x2,y2")
    if warned:
        logging.getLogger(__name__).warning(
            "%s: %d boxes clipped, the first: %s", printable(path), len(warned), warned[0]
        )
    return [
        Frame(name, name.rpartition("/")[0], Path(f"{name}.png"), *size, tuple(members))
        for name, members in records.items()
    ]


def _read_line(line: bytes, source: str, size: tuple[int, int]) -> tuple[str, Record, Problem | None]:
    """Frame id, record and warning of one line. Raises: Refused, with the column of the whole line."""
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise Refused(f"{source}:{error.start + 1}", "not UTF-8") from None
    name, bar, label = text.removeprefix("\ufeff").partition("|")
    parts = name.split("/")
    if not bar or len(name) > _MAX_NAME or not all(set(part) <= _NAME and part.strip(".") for part in parts):
        raise Refused(f"{source}:1", f"{name[:80]!r} is not the name of a frame, such as seq_2/frame000")
    try:
        return name, *parse_line(label, source, *size)
    except Refused as refusal:
        place, _, column = refusal.problem.source.rpartition(":")
        raise Refused(f"{place}:{int(column) + len(name) + 1}", refusal.problem.reason) from None
