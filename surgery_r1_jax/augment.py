"""Frames changed at random, their labels with them: mirrored, cropped, in another light, behind smoke or blood.

What is moved stays true. Boxes move with the picture, and where the frame is mirrored the words of location answers, of
questions about a location and of reasoning are swapped, reasoning's boxes moved. A crop never changes a word: one that
would is drawn anew, as is one that leaves too little of a box, and in the end there is none. A frame is not moved where

    a location answer would not follow its data set's rule after the move as it did before (`LocationRule`),
    a question, a class or reasoning has a word such as left or corner whose meaning is not known,
    or `tracecheck`, which knows nothing of this module, finds moved reasoning not borne out by the moved labels.

A location answer that contradicts its box is believed to be about the picture, as the others are, and is moved with it.
Of an instrument that is cut off, the box is what the crop leaves of the old one, which may be more than it needs.
"""

import dataclasses
import functools

import numpy as np
from PIL import Image

from surgery_r1_jax import answer, appearance, location, tracecheck, vocabulary
from surgery_r1_jax.location import LocationRule
from surgery_r1_jax.options import Augment
from surgery_r1_jax.records import Box, Frame, Record

TRIES = 10  # windows drawn before a frame is left whole

# Words that tell a place in the picture and have no counterpart, or none in all their meanings.
_UNSURE_WORDS = """
    up down upward upwards downward downwards upside higher highest lowest over under underneath beneath
    center centre central middle corner corners quadrant edge edges side sides
    clock clockwise anticlockwise counterclockwise north south east west
"""
_UNSURE = set(_UNSURE_WORDS.split())
_PLACES = {*_UNSURE, *location.ACROSS, *location.DOWN}
_NO_PLACE = "takes up"  # in the phrases of traces.py


def apply(
    frame: Frame, picture: Image.Image, settings: Augment, rng: np.random.Generator, *, rule: LocationRule | None
) -> tuple[Frame, Image.Image]:
    """A frame and its RGB picture, of any resolution, changed by the lots that `rng` draws; both keep their sizes.

    `rule` is what the location answers of its whole data set follow (`location.settled`); with None, frames that have
    some are not moved. The frame keeps its records in their order. What the lots leave alone is returned itself.
    """
    lots = rng.random(3) < (settings.flip_left_right, settings.flip_top_bottom, settings.crop)
    if lots.any() and not _unsure(frame, rule):
        frame, move = _moved(frame, settings, rng, rule, *map(bool, lots))
        picture = move.picture(picture)
    return frame, appearance.change(picture, settings, rng)


@dataclasses.dataclass(frozen=True)
class Move:
    """A window of a frame enlarged to the whole, then mirrored left-right (`across`) and top-bottom (`down`)."""

    size: tuple[int, int]  # of the frame in pixels
    window: Box  # in pixels
    across: bool = False
    down: bool = False

    def box(self, box: Box) -> Box:
        """A box in pixels after the move, to hundredths, as far as it lies in the window; inverted where none of it."""
        moved = []
        for low, high, side, mirror in zip((0, 1), (2, 3), self.size, (self.across, self.down), strict=True):
            scale = side / (self.window[high] - self.window[low])
            ends = [min(max((box[at] - self.window[low]) * scale, 0), side) for at in (low, high)]
            ends = [side - end for end in reversed(ends)] if mirror else ends
            moved.append([round(end, 2) for end in ends])  # as reasoning holds them, so that both stay equal
        (x0, x1), (y0, y1) = moved
        return x0, y0, x1, y1

    def words(self, text: str) -> str:
        """What is said of the frame, after the move."""
        return location.mirrored(text, across=self.across, down=self.down)

    def picture(self, picture: Image.Image) -> Image.Image:
        """The picture after the move, in its own size."""
        if self.window != (0, 0, *self.size):
            sides = zip(self.window, self.size * 2, picture.size * 2, strict=True)
            window = [edge / side * pixels for edge, side, pixels in sides]
            picture = picture.resize(picture.size, Image.Resampling.BICUBIC, box=window)
        for mirror, method in (
            (self.across, Image.Transpose.FLIP_LEFT_RIGHT),
            (self.down, Image.Transpose.FLIP_TOP_BOTTOM),
        ):
            picture = picture.transpose(method) if mirror else picture
        return picture

    def frame(self, frame: Frame, rule: LocationRule | None, visible: float) -> Frame | None:
        """The frame with its labels after the move; None where not all are true then, or less of a box is visible."""
        if any(self._left(record.box) < visible for record in frame.records):
            return None
        records = [
            dataclasses.replace(record, box=self._unit(record.box), **self._said(record)) for record in frame.records
        ]
        moved = dataclasses.replace(frame, records=tuple(records))
        old, new = {record.box for record in frame.records}, {record.box for record in records}
        if len(new) < len(old) or any(x0 >= x1 or y0 >= y1 for x0, y0, x1, y1 in new):
            return None  # boxes tell instruments of one name apart
        pairs = zip(frame.records, records, strict=True)
        holds = all(self._place_holds(*pair, frame.organ_box, moved.organ_box, rule) for pair in pairs)
        return moved if holds and all(_borne_out(record, moved, rule) for record in records) else None

    def _left(self, box: Box) -> float:
        """The share of a box in parts of the frame that lies in the window."""
        whole, seen = 1.0, 1.0
        for low, high, side in ((0, 2, self.size[0]), (1, 3, self.size[1])):
            start, end = max(box[low], self.window[low] / side), min(box[high], self.window[high] / side)
            whole, seen = whole * (box[high] - box[low]), seen * max(end - start, 0)
        return seen / whole

    def _unit(self, box: Box) -> Box:
        sides = self.size * 2
        pixels = self.box(tuple(edge * side for edge, side in zip(box, sides, strict=True)))
        return tuple(edge / side for edge, side in zip(pixels, sides, strict=True))

    def _said(self, record: Record) -> dict[str, str]:
        """The texts of a record after the move."""
        said = {}
        if record.kind == vocabulary.LOCATION:
            said["answer"] = self.words(record.answer)
        if vocabulary.question_kind(record.question)[0] == vocabulary.TOOL:
            said["question"] = self.words(record.question)
        if record.think:
            said["think"] = self.words(answer.map_boxes(record.think, self.box))
        return said

    def _place_holds(
        self, old: Record, new: Record, old_organ: Box | None, new_organ: Box | None, rule: LocationRule | None
    ) -> bool:
        """Whether the rule says of the moved boxes what it said before, in the moved words."""
        if not _has_place(old):
            return True
        if rule is None:
            return False
        before, after = rule.answer(old.box, old_organ), rule.answer(new.box, new_organ)
        if before is None:  # relative to an organ without a box: nobody knows what a crop leaves of it
            return self.window == (0, 0, *self.size)
        return after == self.words(before)


def _moved(
    frame: Frame,
    settings: Augment,
    rng: np.random.Generator,
    rule: LocationRule | None,
    across: bool,
    down: bool,
    crop: bool,
) -> tuple[Frame, Move]:
    """The frame moved as far as its labels stay true, and how."""
    size = width, height = frame.width, frame.height
    move, moved = Move(size, (0, 0, *size), across, down), frame
    if across or down:
        moved = move.frame(frame, rule, settings.crop_visible)
        if moved is None:
            move, moved = dataclasses.replace(move, across=False, down=False), frame
    for _ in range(TRIES if crop else 0):
        share = rng.uniform(settings.crop_least, 1)
        w, h = max(1, round(share * width)), max(1, round(share * height))
        x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        window = dataclasses.replace(move, window=(x, y, x + w, y + h))
        if (cropped := window.frame(frame, rule, settings.crop_visible)) is not None:
            return cropped, window
    return moved, move


def _unsure(frame: Frame, rule: LocationRule | None) -> bool:
    """Whether a frame says something of places that nobody knows how to move."""
    if rule is None and any(map(_has_place, frame.records)):
        return True
    texts = [record.think.replace(_NO_PLACE, "") for record in frame.records if record.think]
    if _classes_tell_places(frame.classes) or any(location.words(text) & _UNSURE for text in texts):
        return True
    own = [record.question for record in frame.records if vocabulary.question_kind(record.question)[0] < 0]
    return any(location.words(question) & _PLACES for question in own)


@functools.cache
def _classes_tell_places(classes: tuple[str, ...]) -> bool:
    """Whether classes other than the four locations hold a word of a place."""
    return any(location.words(name) & _PLACES for name in classes if name not in vocabulary.LOCATIONS)


def _has_place(record: Record) -> bool:
    """Whether the answer, or the question, is a location."""
    asked = vocabulary.question_kind(record.question)[0]
    return vocabulary.LOCATION in (record.kind, asked) or asked == vocabulary.TOOL


def _borne_out(record: Record, frame: Frame, rule: LocationRule | None) -> bool:
    """Whether a record's own reasoning, if it has some, is what the labels of its frame say."""
    if not record.think:
        return True
    reference = rule.reference if rule else "organ"
    wants = range(len(answer.WANT)) if record.want is None else (record.want,)
    checks = (tracecheck.check(record.think, frame, record, want=want, reference=reference) for want in wants)
    return tracecheck.Reason.OK in checks
