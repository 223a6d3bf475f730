"""One line of a label file, `question|answer|x1,y1,x2,y2`, to a checked Record.

Corners are integers 1..W+1 and 1..H+1; less 1 they are exclusive pixel edges, as in
longbai1006/Surgical-VQLA:dataloader.py.
"""

import re
from dataclasses import dataclass

from surgery_r1_jax import vocabulary
from surgery_r1_jax.errors import InputError, printable

Box = tuple[float, float, float, float]  # xyxy in [0, 1] on the original frame, x0 < x1, y0 < y1

MAX_LINE = 500  # characters; real lines have at most 80
OUTSIDE = "box leaves the image"  # how the reason of every such problem begins
REPEATED = "question asked again"

_INTEGER = re.compile(r"-?[0-9]{1,6}")
_PART = re.compile(r"0(\.[0-9]{1,20})?|1(\.0{1,20})?")


@dataclass(frozen=True)
class Record:
    """One question about a frame, with its answer and the box that shows it."""

    question: str  # in its official form
    answer: str  # one of the classes read with
    box: Box
    kind: int  # index into vocabulary.KINDS
    tool: str | None  # the instrument asked about
    source: str  # "path:line"
    think: str | None = (
        None  # its own reasoning, boxes in pixels of the frame; "" for none, None: written from the labels
    )
    want: int | None = None  # what its prompt asks for, index into answer.WANT; None where that is left to the run


@dataclass(frozen=True)
class Problem:
    """Something wrong with the data: an error costs its line or frame, a warning does not."""

    severity: str  # "error" | "warning"
    source: str  # "path:line:column", as exact as is known
    reason: str
    image: str | None = None  # the picture to look at
    box: Box | None = None  # as written, before any clipping

    def __str__(self) -> str:
        return printable(f"{self.source}: {self.reason}")


class Refused(InputError):
    """An error that costs one line or one frame."""

    def __init__(self, source: str, reason: str, box: Box | None = None):
        self.problem = Problem("error", source, reason, box=box)
        super().__init__(str(self.problem))


def parse_line(
    text: str,
    source: str,
    width: int,
    height: int,
    classes: tuple[str, ...] = vocabulary.CLASSES,
    strict: bool = False,
) -> tuple[Record, Problem | None]:
    """The record of one line about a `width` x `height` image, and a warning where its box was clipped.

    `strict` refuses what would be clipped. Raises: Refused (an InputError) with source, column and reason.
    """
    if len(text) > MAX_LINE:
        raise Refused(f"{source}:{MAX_LINE + 1}", f"line of {len(text)} characters; {MAX_LINE} is the most")
    fields = text.split("|")
    if len(fields) != 3:
        raise Refused(f"{source}:1", f"{len(fields)} fields where question|answer|x1,y1,x2,y2 has 3")
    at_question = f"{source}:1"
    at_answer = f"{source}:{len(fields[0]) + 2}"
    at_box = f"{source}:{len(fields[0]) + len(fields[1]) + 3}"
    question, answer, corners = (field.strip(" \t") for field in fields)

    kind, topic = vocabulary.question_kind(question)
    if kind < 0:
        raise Refused(at_question, f"unknown question {question!r}")
    index = vocabulary.class_index(answer, classes)
    if index < 0:
        raise Refused(at_answer, f"{answer!r} is none of the {len(classes)} answer classes")
    if vocabulary.class_kind(index, classes) not in (kind, vocabulary.OTHER):
        raise Refused(at_answer, f"{answer!r} does not answer a question of kind {vocabulary.KINDS[kind]}")
    box, warning = _parse_box(corners, at_box, width, height, strict)
    tool = topic if kind in (vocabulary.STATE, vocabulary.LOCATION) else None
    return Record(vocabulary.ask(kind, topic), classes[index], box, kind, tool, source), warning


def _parse_box(text: str, source: str, width: int, height: int, strict: bool) -> tuple[Box, Problem | None]:
    """The box in [0, 1], clipped to the image, and a warning where that changed it."""
    corners = [corner.strip(" \t") for corner in text.split(",")]
    if len(corners) != 4 or not all(map(_INTEGER.fullmatch, corners)):
        like = "; it looks like parts of the image, 0..1" if all(map(_PART.fullmatch, corners)) else ""
        raise Refused(source, f"{text!r} is not a box of four integers x1,y1,x2,y2{like}")
    x0, y0, x1, y1 = (int(corner) - 1 for corner in corners)
    return unit_box((x0, y0, x1, y1), text, source, width, height, strict)


def unit_box(
    edges: tuple[float, float, float, float], text: str, source: str, width: float, height: float, strict: bool
) -> tuple[Box, Problem | None]:
    """Edges on a `width` x `height` grid as a box in [0, 1], clipped, and a warning where that changed it.

    `text` is how the data has the box. Raises: Refused for a box that is inverted or wholly outside, and where
    `strict` for one that would be clipped.
    """
    x0, y0, x1, y1 = edges
    written = (x0 / width, y0 / height, x1 / width, y1 / height)
    if x0 >= x1 or y0 >= y1:
        raise Refused(source, f"box {text} is empty or inverted; it needs x1 < x2 and y1 < y2", written)
    left, right = (min(max(x, 0), width) for x in (x0, x1))
    top, bottom = (min(max(y, 0), height) for y in (y0, y1))
    box = (left / width, top / height, right / width, bottom / height)
    if (left, top, right, bottom) == edges:
        return box, None
    outside = f"{OUTSIDE}: {text} on {width}x{height}"
    if left >= right or top >= bottom:
        raise Refused(source, f"{outside}, wholly", written)
    if strict:
        raise Refused(source, outside, written)
    return box, Problem("warning", source, f"{outside}; it is clipped", box=written)
