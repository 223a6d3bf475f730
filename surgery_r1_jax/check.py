"""Looks through a data set before anything is trained on it: every label line, image, box and split.

Whatever reader the frames come from, what is wrong with them becomes a `Problem` with its place, and where there is
one with the picture and the box to look at.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from surgery_r1_jax import (
    errors,
    floors,
    images,
    labels,
    leaks,
    lengths,
    likeness,
    location,
    recordfile,
    records,
    spaces,
    vocabulary,
)
from surgery_r1_jax.errors import InputError
from surgery_r1_jax.examples import Encoder
from surgery_r1_jax.labels import Problem
from surgery_r1_jax.records import Frame

Track = Callable[[Iterable, int], Iterable]


@dataclass(frozen=True)
class Split:
    """What one split holds; `kinds` and `answers` count questions by kind and by answer class."""

    sequences: tuple[str, ...]
    frames: int
    questions: int
    kinds: dict[str, int]
    answers: dict[str, int]

    @property
    def absent(self) -> tuple[str, ...]:
        """The classes that no question of the split has for an answer."""
        return tuple(name for name, count in self.answers.items() if not count)


@dataclass(frozen=True)
class Tokens:
    """The longest questions as a model is given them, each figure by itself; `over` have more than `limit` in all."""

    prefix: int  # instruction and image
    prompt: int
    completion: int  # true answer with reasoning
    total: int
    limit: int | None
    over: int


@dataclass(frozen=True)
class Summary:
    """All that was found."""

    root: str
    frames: int
    questions: int
    splits: dict[str, Split]  # those that are not empty, by name
    image_sizes: dict[str, int]  # frames by "1280x1024"
    changed_images: dict[str, int]  # frames by what reading them changes, such as "CMYK"
    outside: int  # records whose box leaves the image
    repeated: int  # records that ask what their frame was asked before
    equal_images: tuple[tuple[str, str], ...]  # ids of frames of two splits with the same image file
    near_images: tuple[tuple[str, str, int], ...]  # of those that look alike, and the bits that tell them apart
    location_rule: location.LocationRule
    location_agreement: float
    location_questions: int
    floors: dict[str, dict[str, floors.Score]]  # by "train -> val", then by kind of question
    tokens: Tokens | None  # where a model was given
    errors: int
    warnings: int
    problems: tuple[Problem, ...]


class Model(NamedTuple):
    """What of a model the questions are measured against."""

    encoder: Encoder
    limit: int | None  # tokens it was made for


def inspect(
    root: str | Path,
    strict: bool = False,
    *,
    classes: tuple[str, ...] | None = None,
    boxes: str | None = None,
    **options,
) -> Summary:
    """Read all labels and decode all images below `root`; the other options are those of `examine`.

    Raises: InputError only where `root` holds no data set; what is wrong inside is in the summary.
    """
    problems: list[Problem] = []
    frames = records.read(root, strict=strict, classes=classes, boxes=boxes, on_problem=problems.append)
    return examine(root, frames, problems, strict=strict, space=recordfile.space(root, boxes), **options)


def examine(
    root: str | Path,
    frames: Sequence[Frame],
    problems: Sequence[Problem] = (),
    *,
    strict: bool = False,
    splits: Mapping[str, Sequence[Frame]] | None = None,
    space: str = "pixel",
    model: Model | None = None,
    track: Track = lambda steps, total: steps,
) -> Summary:
    """The summary of frames that a reader gave, with the problems it had; `strict` makes mended images errors.

    `space` is the one of `spaces.SPACES` that the boxes were read in. `track` may show how the decoding goes on.
    """
    splits = records.by_split(frames) if splits is None else splits
    with ThreadPoolExecutor() as pool:
        looks = list(track(pool.map(lambda frame: _look(frame, strict), frames), len(frames)))
    found = [*problems, *itertools.chain.from_iterable(look.problems for look in looks)]
    if doubt := spaces.doubt(_written(frames, problems), space):
        found.append(Problem("error", str(root), f"{doubt}; mend the labels, or say how they are meant"))
    found += _repeated_ids(frames)
    found += leaks.sequences(splits)
    prints = {str(frame.image): look.print for frame, look in zip(frames, looks, strict=True)}
    found += (pairs := leaks.pictures(splits, prints)).problems
    counts = {name: _count(members) for name, members in splits.items()}
    found += _never_taught(counts, str(root))
    tokens = None
    if model is not None:
        tokens, long = _tokens(frames, model)
        found += long
    rule, agreement, located = location.fit(frames)
    return Summary(
        root=str(root),
        frames=len(frames),
        questions=sum(len(frame.records) for frame in frames),
        splits=counts,
        image_sizes=dict(Counter(f"{frame.width}x{frame.height}" for frame in frames).most_common()),
        changed_images=dict(Counter(change for look in looks for change in look.changes).most_common()),
        outside=sum(problem.reason.startswith(labels.OUTSIDE) for problem in found),
        repeated=sum(problem.reason.startswith(records.REPEATED) for problem in found),
        equal_images=pairs.equal,
        near_images=pairs.near,
        location_rule=rule,
        location_agreement=agreement,
        location_questions=located,
        floors={
            f"{source} -> {target}": floors.score(splits[target], floors.question_only(splits[source], splits[target]))
            for source, target in itertools.product(splits, splits)
            if source in ("train", target)
        },
        tokens=tokens,
        errors=sum(problem.severity == "error" for problem in found),
        warnings=sum(problem.severity == "warning" for problem in found),
        problems=tuple(found),
    )


class _Look(NamedTuple):
    """What decoding a frame's image showed."""

    problems: list[Problem]
    changes: list[str]
    print: int | None


def _look(frame: Frame, strict: bool) -> _Look:
    """Decode the frame's image just as training will."""
    path = str(frame.image)
    try:
        image, changes = images.read(frame.image)
    except InputError as error:
        reason = str(error).removeprefix(f"{errors.printable(frame.image)}: ")
        return _Look([Problem("error", path, reason)], [], None)
    problems = [Problem("error" if strict else "warning", path, change, path) for change in changes]
    width, height = image.size
    if image.size != (frame.width, frame.height):
        problems.append(Problem("error", path, f"decodes to {width}x{height}, its header says otherwise", path))
    if _extreme(*image.size):
        reason = f"sides of {width}x{height} differ over {images.MAX_ASPECT} to 1; crop or drop it"
        problems.append(Problem("error", path, reason, path))
    return _Look(problems, [change.partition(";")[0] for change in changes], likeness.fingerprint(image))


def _extreme(width: int, height: int) -> bool:
    """Whether a picture is so narrow that no model takes it."""
    return max(width, height) > images.MAX_ASPECT * min(width, height)


def _written(frames: Iterable[Frame], problems: Iterable[Problem]) -> list[spaces.Written]:
    """All boxes as they were written, those that were refused or clipped too."""
    sizes = {str(frame.image): (frame.width, frame.height) for frame in frames}
    odd = [problem for problem in problems if problem.box and problem.image in sizes]
    lines = {source for problem in odd for source in (problem.source, problem.source.rpartition(":")[0])}
    sound = [(frame, record) for frame in frames for record in frame.records if record.source not in lines]
    written = [spaces.Written(record.box, frame.width, frame.height) for frame, record in sound]
    return written + [spaces.Written(problem.box, *sizes[problem.image]) for problem in odd]


def _repeated_ids(frames: Iterable[Frame]) -> Iterator[Problem]:
    first: dict[str, Frame] = {}
    for frame in frames:
        if (one := first.setdefault(frame.id, frame)) is not frame:
            reason = f"frame {frame.id} again, first {one.image}; rename one of them"
            yield Problem("error", str(frame.image), reason, str(frame.image))


def _never_taught(splits: Mapping[str, Split], root: str) -> list[Problem]:
    """Classes that are asked for elsewhere and that training has none of."""
    if "train" not in splits:
        return []
    return [
        Problem("warning", root, f"{answer} is the answer to {asked} questions of {name} and to none of train")
        for name, split in splits.items()
        for answer, asked in split.answers.items()
        if asked and answer in splits["train"].absent
    ]


def _tokens(frames: Sequence[Frame], model: Model) -> tuple[Tokens | None, list[Problem]]:
    """The longest questions, and a problem for each that is longer than the model was made for."""
    found = lengths.measure((f for f in frames if not _extreme(f.width, f.height)), model.encoder)
    if not found:
        return None, []
    long = [each for each in found if model.limit is not None and each.total > model.limit]
    longest = (max(getattr(each, part) for each in found) for part in ("prefix", "prompt", "completion", "total"))
    return Tokens(*longest, model.limit, len(long)), [
        Problem(
            "error",
            each.record.source,
            f"takes {each.total:,} tokens, {each.prefix:,} of them for its frame, and the model was made for "
            f"{model.limit:,}; lower max_pixels in preprocessor_config.json",
            str(each.frame.image),
            each.record.box,
        )
        for each in long
    ]


def _count(frames: Sequence[Frame]) -> Split:
    asked = [record for frame in frames for record in frame.records]
    kinds = Counter(vocabulary.KINDS[record.kind] for record in asked)
    answers = Counter(record.answer for record in asked)
    return Split(
        sequences=tuple(dict.fromkeys(frame.sequence for frame in frames)),
        frames=len(frames),
        questions=len(asked),
        kinds={name: kinds[name] for name in vocabulary.KINDS},
        answers={name: answers[name] for name in frames[0].classes},
    )
