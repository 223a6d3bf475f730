"""Holds what reasoning claims against a frame's labels, the answer and the box it is meant to lead to.

Every claim that `claims` reads must be what a label says: a text that passes holds no named class, no number of
instruments and no box that the labels contradict, leaves no instrument out, and ends with the answer. Other words, such
as a teacher's description of the tissue, are not judged: no label could bear them out.
"""

import enum
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from surgery_r1_jax import answer, claims, vocabulary
from surgery_r1_jax.claims import Claim, Reading
from surgery_r1_jax.records import Box, Frame, Record

NEAR = 0.51  # pixels by which an edge in a text may differ from the label's: boxes are written in round numbers


class Reason(enum.StrEnum):
    """Why a text is refused; of several reasons the first that is found."""

    OK = "ok"
    NOT_PLAIN = "empty, too long or not plain ASCII without tags"
    NOT_READABLE = "a claim that cannot be read"
    INSTRUMENT = "an instrument that is not in the labels"
    COUNT = "a number of instruments that is not that of the labels"
    ORGAN = "an organ that the labels do not give"
    STATE = "a state that the labels do not give"
    LOCATION = "a location that the labels do not give"
    BOX = "a box that the labels do not give"
    LEFT_OUT = "an instrument left out"
    OTHER_ANSWER = "another conclusion than the answer"
    OTHER_BOX = "another box at the end than the answer's"


def check(text: str, frame: Frame, record: Record, *, want: int, reference: str = "organ") -> Reason:
    """Whether the frame's labels bear out a text that reasons towards `answer.WANT[want]` of one of its records.

    `reference` is what locations are relative to (`LocationRule.reference`). Never raises.
    """
    try:
        reading = claims.read(text)
    except claims.NotPlain:
        return Reason.NOT_PLAIN
    except claims.Unreadable:
        return Reason.NOT_READABLE
    labels = _Labels(frame)
    reasons = itertools.chain(
        _against_labels(reading, labels, record, reference), _conclusion(reading, labels, record, want, text)
    )
    return next(filter(None, reasons), Reason.OK)


class _Thing(NamedTuple):
    """What the labels hold of one instrument or organ."""

    states: set[str]
    places: set[str]
    boxes: list[Box]  # in pixels


class _Labels:
    """The labels of a frame by what they are about."""

    def __init__(self, frame: Frame):
        self.size = (frame.width, frame.height) * 2
        self.organs: dict[str, _Thing] = {}
        said: dict[str, list[tuple[Record, set[str], set[str]]]] = {}
        for record in frame.records:
            if record.kind == vocabulary.ORGAN:
                self.organs.setdefault(record.answer, _Thing(set(), set(), [])).boxes.append(self.pixels(record.box))
            elif record.kind == vocabulary.STATE and record.tool:
                said.setdefault(record.tool, []).append((record, {record.answer}, set()))
            elif record.kind == vocabulary.LOCATION and record.tool:
                said.setdefault(record.tool, []).append((record, set(), {record.answer}))
            elif record.kind == vocabulary.TOOL:
                place = vocabulary.question_kind(record.question)[1]
                said.setdefault(record.answer, []).append((record, set(), {place} - {None}))
        self.tools = {tool: self._things(labels) for tool, labels in said.items()}

    def _things(self, labels: list[tuple[Record, set[str], set[str]]]) -> list[_Thing]:
        """The instruments of one name: one where its labels agree, else one for each box."""
        whole = self._thing(labels)
        if len(whole.states) <= 1 and len(whole.places) <= 1:
            return [whole]
        boxes = dict.fromkeys(record.box for record, *_ in labels)
        return [self._thing([label for label in labels if label[0].box == box]) for box in boxes]

    def _thing(self, labels: list[tuple[Record, set[str], set[str]]]) -> _Thing:
        states = set().union(*(states for _, states, _ in labels))
        places = set().union(*(places for _, _, places in labels))
        return _Thing(states, places, [self.pixels(record.box) for record, *_ in labels])

    def pixels(self, box: Box) -> Box:
        return tuple(edge * side for edge, side in zip(box, self.size, strict=True))

    def asked(self, record: Record) -> _Thing:
        """What the record itself says, with what else is known of its instrument."""
        box = self.pixels(record.box)
        tool = record.answer if record.kind == vocabulary.TOOL else record.tool
        things = [thing for thing in self.tools.get(tool, ()) if box in thing.boxes]
        known = things[0] if things else _Thing(set(), set(), [])
        states = {record.answer} if record.kind == vocabulary.STATE else known.states
        places = {record.answer} if record.kind == vocabulary.LOCATION else known.places
        return _Thing(states, places, [box])


def _against_labels(reading: Reading, labels: _Labels, record: Record, reference: str) -> Iterator[Reason | None]:
    """What keeps the claims from being borne out, one by one; None is nothing."""
    instruments = sum(map(len, labels.tools.values()))
    yield Reason.COUNT if any(count != instruments for count in reading.counts) else None
    yield Reason.ORGAN if reading.organs - labels.organs.keys() else None
    yield Reason.LOCATION if reading.of_organ and reference != "organ" else None
    yield Reason.COUNT if reading.listed_twice and all(len(same) == 1 for same in labels.tools.values()) else None
    for claim in reading.claims:
        if claim.organ:
            yield _unlike(claim, [labels.organs[claim.organ]])
        elif not claim.tools:
            yield _unlike(claim, [labels.asked(record)])
        elif not (present := claim.tools & labels.tools.keys()):
            yield Reason.INSTRUMENT
        else:
            yield _unlike(claim, [thing for tool in present for thing in labels.tools[tool]])
    named = [claim.tools & labels.tools.keys() for claim in reading.claims]
    yield Reason.LEFT_OUT if any({tool} not in named for tool in labels.tools) else None


def _unlike(claim: Claim, things: list[_Thing]) -> Reason | None:
    """Why a claim fits none of the things that it may be about."""
    for states in claim.states:
        if not (things := [thing for thing in things if states & thing.states]):
            return Reason.STATE
    for places in claim.places:
        if not (things := [thing for thing in things if places & thing.places]):
            return Reason.LOCATION
    for box in claim.boxes:
        if not (things := [thing for thing in things if any(_near(box, true) for true in thing.boxes)]):
            return Reason.BOX
    return None


def _conclusion(reading: Reading, labels: _Labels, record: Record, want: int, text: str) -> Iterator[Reason | None]:
    """Whether the text ends with what the prompt wants, said of what the question asks about.

    An answer to a question of a kind of its own is only looked for: nothing is known of what it means.
    """
    tool = record.answer if record.kind == vocabulary.TOOL else record.tool
    about = {record.answer} if record.kind == vocabulary.ORGAN else {tool}
    final = reading.claims[-1] if reading.claims else Claim(organ="nothing")
    of_asked = not (final.tools or final.organ) or about & (final.tools | {final.organ})
    if answer.WANT[want] != "box":
        known = record.kind in (vocabulary.ORGAN, vocabulary.STATE, vocabulary.LOCATION, vocabulary.TOOL)
        right = reading.last.get(record.kind) == {record.answer} if known else record.answer in text
        yield None if of_asked and right else Reason.OTHER_ANSWER
    if answer.WANT[want] != "answer":
        box = labels.pixels(record.box)
        yield None if of_asked and reading.last_box and _near(reading.last_box, box) else Reason.OTHER_BOX


def _near(box: Iterable[float], other: Iterable[float]) -> bool:
    return all(abs(edge - true) <= NEAR for edge, true in zip(box, other, strict=True))
