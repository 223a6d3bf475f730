"""Looks through a data set before anything is trained on it: every label line, every image, every split."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track as progress_bar
from rich.table import Table

from surgery_r1_jax import floors, images, labels, location, records, vocabulary
from surgery_r1_jax.errors import InputError
from surgery_r1_jax.labels import Problem
from surgery_r1_jax.records import Frame

MAX_PRINTED = 50  # problems


@dataclass(frozen=True)
class Split:
    """What one split holds; `kinds` and `answers` count questions by kind and by answer class."""

    sequences: tuple[str, ...]
    frames: int
    questions: int
    kinds: dict[str, int]
    answers: dict[str, int]


@dataclass(frozen=True)
class Summary:
    """All that `inspect` found."""

    root: str
    frames: int
    questions: int
    splits: dict[str, Split]  # those that are not empty, by name
    image_sizes: dict[str, int]  # frames by "1280x1024"
    outside: int  # records whose box leaves the image
    repeated: int  # records that ask what their frame was asked before
    equal_images: tuple[tuple[str, str], ...]  # ids of frames of two splits with the same image file
    location_rule: location.LocationRule
    location_agreement: float
    location_questions: int
    floors: dict[str, dict[str, floors.Score]]  # by "train -> val", then by kind of question
    errors: int
    warnings: int
    problems: tuple[Problem, ...]


def inspect(
    root: str | Path,
    strict: bool = False,
    *,
    classes: tuple[str, ...] | None = None,
    boxes: str | None = None,
    track: Callable[[Iterable, int], Iterable] = lambda steps, total: steps,
) -> Summary:
    """Read all labels and decode all images below `root`; `track` may show how the decoding goes on.

    Raises: InputError only where `root` holds no data set; what is wrong inside is in the summary.
    """
    problems: list[Problem] = []
    frames = records.read(root, strict=strict, classes=classes, boxes=boxes, on_problem=problems.append)
    with ThreadPoolExecutor() as pool:
        decoded = track(pool.map(_image_problem, frames), len(frames))
        problems += [problem for problem in decoded if problem]

    by_split = {
        name: [frame for frame in frames if records.split_of_frame(frame) == name]
        for name in ("train", "dev", "val", "external")
    }
    by_split = {name: members for name, members in by_split.items() if members}
    equal_images = [
        pair
        for one, other in itertools.combinations(by_split.values(), 2)
        for pair in records.content_overlaps(one, other)
    ]
    files = {frame.id: str(frame.image) for frame in frames}
    problems += [
        Problem("error", files[theirs], f"the same image as {files[ours]}, which is in another split")
        for ours, theirs in equal_images
    ]
    rule, agreement, located = location.fit(frames)
    return Summary(
        root=str(root),
        frames=len(frames),
        questions=sum(len(frame.records) for frame in frames),
        splits={name: _count(members) for name, members in by_split.items()},
        image_sizes=dict(Counter(f"{frame.width}x{frame.height}" for frame in frames).most_common()),
        outside=sum(problem.reason.startswith(labels.OUTSIDE) for problem in problems),
        repeated=sum(problem.reason.startswith(records.REPEATED) for problem in problems),
        equal_images=tuple(equal_images),
        location_rule=rule,
        location_agreement=agreement,
        location_questions=located,
        floors={
            f"{source} -> {target}": floors.score(
                by_split[target], floors.question_only(by_split[source], by_split[target])
            )
            for source, target in itertools.product(by_split, by_split)
            if source in ("train", target)
        },
        errors=sum(problem.severity == "error" for problem in problems),
        warnings=sum(problem.severity == "warning" for problem in problems),
        problems=tuple(problems),
    )


def print_summary(summary: Summary, console: Console) -> None:
    """Print it as tables, then at most MAX_PRINTED problems, errors first."""

    def line(text: str) -> None:
        console.print(labels.printable(text), markup=False, highlight=False, soft_wrap=True)

    line(f"{summary.root}: {summary.frames} frames, {summary.questions} questions")
    if summary.splits:
        console.print(_split_table(summary), _class_table(summary), _floor_table(summary))
    sizes = ", ".join(f"{size} ({count})" for size, count in summary.image_sizes.items())
    line(f"image sizes (frames): {sizes or 'none'}")
    rule = summary.location_rule
    if summary.location_questions:
        holds = round(summary.location_agreement * summary.location_questions)
        line(
            f"location rule: against the centre of the {rule.reference}, top = {rule.top}; "
            f"holds for {holds} of {summary.location_questions} location answers"
        )
    line(f"questions whose box leaves the image: {summary.outside}")
    line(f"questions asked again in the same frame: {summary.repeated}")
    line(f"images that are in two splits: {len(summary.equal_images)}")
    ordered = sorted(summary.problems, key=lambda problem: problem.severity)  # "error" < "warning"
    for problem in ordered[:MAX_PRINTED]:
        line(f"{problem.severity}: {problem}")
    if len(ordered) > MAX_PRINTED:
        line(f"... and {len(ordered) - MAX_PRINTED} more problems")
    line(f"{summary.errors} errors, {summary.warnings} warnings")


def main(root: str | Path, strict: bool = False, json_path: str | Path | None = None, boxes: str | None = None) -> int:
    """Inspect, print, and write the summary as JSON where wanted; 1 if there are errors, else 0."""
    bar = Console(stderr=True)

    def track(steps: Iterable, total: int) -> Iterable:
        return progress_bar(steps, "decoding images", total, console=bar, transient=True, disable=not bar.is_terminal)

    summary = inspect(root, strict, boxes=boxes, track=track)
    print_summary(summary, Console())
    if json_path is not None:
        try:
            Path(json_path).write_text(json.dumps(dataclasses.asdict(summary), indent=2) + "\n", "utf-8")
        except OSError as error:
            raise InputError(f"{json_path}: cannot be written ({error.strerror}); take another path") from None
    return 1 if summary.errors else 0


def _image_problem(frame: Frame) -> Problem | None:
    """Decode the frame's image just as training will."""
    try:
        image = images.load(frame.image)
    except InputError as error:
        reason = str(error).removeprefix(f"{labels.printable(frame.image)}: ")
        return Problem("error", str(frame.image), reason)
    if image.size != (frame.width, frame.height):
        width, height = image.size
        return Problem("error", str(frame.image), f"decodes to {width}x{height}, its header says otherwise")
    return None


def _count(frames: list[Frame]) -> Split:
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


def _table(title: str, *columns: str) -> Table:
    """A table whose first column is text and the others numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _split_table(summary: Summary) -> Table:
    kinds = [name for name in vocabulary.KINDS if any(split.kinds[name] for split in summary.splits.values())]
    table = _table("Splits", "split", "frames", "questions", *kinds, "sequences")
    for name, split in summary.splits.items():
        sequences = " ".join(sequence.removeprefix("seq_") for sequence in split.sequences)
        counts = (split.frames, split.questions, *(split.kinds[kind] for kind in kinds))
        table.add_row(name, *map(str, counts), sequences)
    return table


def _class_table(summary: Summary) -> Table:
    table = _table("Answers", "class", *summary.splits)
    for name in next(iter(summary.splits.values())).answers:
        table.add_row(name, *(str(split.answers[name]) for split in summary.splits.values()))
    return table


def _floor_table(summary: Summary) -> Table:
    kinds = [name for name in vocabulary.KINDS if any(name in scores for scores in summary.floors.values())]
    title = "Floors in %: majority answer and median box of the same question"
    table = _table(title, "guessed from -> on", "questions", "mIoU", "accuracy", *kinds)
    for name, scores in summary.floors.items():
        accuracies = [f"{100 * scores[kind].accuracy:.1f}" if kind in scores else "-" for kind in kinds]
        overall = scores["all"]
        table.add_row(
            name,
            str(overall.questions),
            f"{100 * overall.miou:.1f}",
            f"{100 * overall.accuracy:.1f}",
            *accuracies,
        )
    return table
