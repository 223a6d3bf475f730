"""The page of `data check`: what is in a data set and what is wrong with it, to be looked at.

Made as `report.py` makes its page: one file, no script, no network, the same bytes for the same data.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from surgery_r1_jax import images, pictures, records, report, vocabulary
from surgery_r1_jax.check import Summary
from surgery_r1_jax.errors import InputError
from surgery_r1_jax.labels import Problem
from surgery_r1_jax.records import Box, Frame

MOST_PROBLEMS = 120  # shown, errors first
SAMPLES = 12  # frames, from all splits alike

_BINS = 20
_CELLS = 24  # of a map, across and down


class Sample(NamedTuple):
    """A frame with its boxes, each once, and what is asked about it."""

    split: str
    frame: Frame
    boxes: list[tuple[Box, list[str]]]


class Places(NamedTuple):
    """Where the boxes of one kind of question lie, and how large they are."""

    kind: str
    questions: int
    shares: list[list[float]]  # of the boxes, that cover each cell; rows from the top
    sides: list[int]  # boxes by the root of their area, in parts of the frame's


def render(summary: Summary, frames: Sequence[Frame], notes: Sequence[str], *, seed: int = 0) -> str:
    """The page as HTML; `notes` are lines that stand above all."""
    shown = sorted(summary.problems, key=lambda problem: problem.severity)[:MOST_PROBLEMS]
    samples = _samples(frames, seed)
    files = {frame.id: str(frame.image) for frame in frames}
    pairs = (*summary.equal_images, *summary.near_images)[: MOST_PROBLEMS // 4]
    twins = [(files[ours], files[theirs]) for ours, theirs, *_ in pairs]
    names = [str(sample.frame.image) for sample in samples]
    names += [problem.image for problem in shown if problem.image]
    names += [name for pair in twins for name in pair]
    return report.template("data_page.html.jinja").render(
        summary=summary,
        notes=notes,
        seed=seed,
        samples=samples,
        problems=[(problem, _around(problem)) for problem in shown],
        kinds=_kinds(summary.problems),
        twins=twins,
        places=[_places(kind, frames) for kind in range(len(vocabulary.KINDS)) if _asked(kind, frames)],
        frames=report.embedded(dict.fromkeys(names), _picture),
        colours={"truth": pictures.TRUTH, "prediction": pictures.PREDICTION},
    )


def _picture(file: str) -> Image.Image | None:
    """The picture of a file; None where it cannot be read."""
    try:
        return images.load(file)
    except InputError:
        return None


def _samples(frames: Sequence[Frame], seed: int) -> list[Sample]:
    """Frames drawn at random, as many of each split."""
    rng, splits, samples = random.Random(seed), records.by_split(frames), []
    for name, members in splits.items():
        for frame in rng.sample(members, min(SAMPLES // len(splits), len(members))):
            boxes: dict[Box, list[str]] = {}
            for record in frame.records:
                boxes.setdefault(record.box, []).append(f"{record.question} {record.answer}")
            samples.append(Sample(name, frame, list(boxes.items())))
    return samples


def _around(problem: Problem) -> Box | None:
    """The problem's box between its corners, whichever comes first, as far as it can be drawn."""
    if problem.box is None:
        return None
    x0, y0, x1, y1 = problem.box
    return pictures.drawable((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)))


def _kinds(problems: Iterable[Problem]) -> list[tuple[str, str, int]]:
    """How many problems there are of each kind: severity, the reason up to where it becomes particular, number."""
    counts = Counter((problem.severity, _general(problem.reason)) for problem in problems)
    return [(*kind, count) for kind, count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0]))]


def _general(reason: str) -> str:
    """A reason without what is quoted, its names and its numbers."""
    parts = reason.split("'")
    unquoted = "...".join([parts[0], parts[-1]]) if len(parts) > 2 else reason
    words = re.split("[;:(]", unquoted)[0].split()
    return " ".join("..." if any(c.isdigit() or c in "/_" for c in word) else word for word in words)[:80]


def _asked(kind: int, frames: Iterable[Frame]) -> list[Box]:
    return [record.box for frame in frames for record in frame.records if record.kind == kind]


def _places(kind: int, frames: Iterable[Frame]) -> Places:
    box_N4 = np.array(_asked(kind, frames))
    middle_C = (np.arange(_CELLS) + 0.5) / _CELLS
    across_NC, down_NC = ((box_N4[:, low, None] <= middle_C) & (middle_C < box_N4[:, low + 2, None]) for low in (0, 1))
    shares_CC = np.einsum("nr,nc->rc", down_NC.astype(float), across_NC.astype(float)) / len(box_N4)
    side_N = np.sqrt(np.prod(box_N4[:, 2:] - box_N4[:, :2], axis=1))
    sides = np.histogram(side_N, bins=_BINS, range=(0, 1))[0]
    return Places(vocabulary.KINDS[kind], len(box_N4), shares_CC.tolist(), sides.tolist())
