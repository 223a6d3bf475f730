"""What can be had without looking at the image: the floors that every reported figure stands beside."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from surgery_r1_jax import vocabulary
from surgery_r1_jax.errors import InputError
from surgery_r1_jax.records import Box, Frame, Record

Guess = tuple[str, Box]


@dataclass(frozen=True)
class Score:
    """How guesses fare on a number of questions."""

    questions: int
    accuracy: float
    miou: float  # mean of the true intersection over union


def question_only(train_frames: Iterable[Frame], test_frames: Iterable[Frame]) -> list[Guess]:
    """The answer and box that each test record's question alone suggests, in the records' order.

    That is the most frequent answer (of equals the first by name) and the median box of the same question in
    training; for a question not seen there, of its kind; else of all.
    Raises: InputError without training records.
    """
    alike: dict[object, list[Record]] = defaultdict(list)
    for frame in train_frames:
        for record in frame.records:
            for key in _keys(record):
                alike[key].append(record)
    if not alike:
        raise InputError("no training questions to take a floor from; read a data set with a train split")
    guesses = {key: _typical(records) for key, records in alike.items()}
    return [
        next(guesses[key] for key in _keys(record) if key in guesses)
        for frame in test_frames
        for record in frame.records
    ]


def score(frames: Iterable[Frame], guesses: Sequence[Guess]) -> dict[str, Score]:
    """Scores of one guess per record, under "all" and under the name of each kind of question that occurs."""
    groups = defaultdict(list)
    records = [record for frame in frames for record in frame.records]
    for record, (answer, box) in zip(records, guesses, strict=True):
        outcome = (answer == record.answer, iou(box, record.box))
        groups["all"].append(outcome)
        groups[vocabulary.KINDS[record.kind]].append(outcome)
    return {name: Score(len(rows), *np.mean(rows, axis=0).tolist()) for name, rows in groups.items()}


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / (area_a + area_b - shared)


def _keys(record: Record) -> tuple:
    """What records may share, the closest likeness first."""
    return record.question, record.kind, None


def _typical(records: Sequence[Record]) -> Guess:
    counts = Counter(record.answer for record in records)
    answer = min(counts, key=lambda name: (-counts[name], name))
    return answer, tuple(np.median([record.box for record in records], axis=0).tolist())
