"""`data check`: what was found in a data set, as tables on the console, as JSON and as a page.

The exit status is 1 where there are errors.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import track as progress_bar
from rich.table import Table

from surgery_r1_jax import check, errors, files, labels, lengths, recordfile, records, vocabulary
from surgery_r1_jax.check import Summary
from surgery_r1_jax.errors import InputError

MAX_PRINTED = 50  # problems


def main(
    root: str | Path,
    strict: bool = False,
    *,
    json_path: str | Path | None = None,
    html_path: str | Path | None = None,
    model: str | Path | None = None,
    boxes: str | None = None,
) -> int:
    """Inspect, print, and write the summary as JSON and as a page where wanted; 1 if there are errors, else 0.

    `model` is a Hugging Face folder, or a run's, whose tokens the questions are counted in.
    """
    bar = Console(stderr=True)

    def track(steps: Iterable, total: int) -> Iterable:
        return progress_bar(steps, "decoding images", total, console=bar, transient=True, disable=not bar.is_terminal)

    measured = None if model is None else _model(model)
    problems: list[labels.Problem] = []
    frames = records.read(root, strict=strict, boxes=boxes, on_problem=problems.append)
    space = recordfile.space(root, boxes)
    summary = check.examine(root, frames, problems, strict=strict, space=space, model=measured, track=track)
    print_summary(summary, Console())
    if json_path is not None:
        _write(json_path, json.dumps(dataclasses.asdict(summary), indent=2) + "\n")
    if html_path is not None:
        from surgery_r1_jax import data_page  # seconds: it shares the report's machinery

        _write(html_path, data_page.render(summary, frames, notes(summary)))
    return 1 if summary.errors else 0


def _model(path: str | Path) -> check.Model:
    from surgery_r1_jax import checkpoint, hf  # seconds: jax

    folder = checkpoint.folder_of(path)
    return check.Model(hf.encoder_of(folder, hf.read_config(folder)), lengths.most_tokens(folder))


def _write(path: str | Path, text: str) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text)
    except OSError as error:
        raise InputError(f"{errors.printable(path)}: cannot be written ({error.strerror}); take another path") from None


def print_summary(summary: Summary, console: Console) -> None:
    """Print it as tables, then at most MAX_PRINTED problems, errors first."""

    def line(text: str) -> None:
        console.print(errors.printable(text), markup=False, highlight=False, soft_wrap=True)

    line(f"{summary.root}: {summary.frames} frames, {summary.questions} questions")
    if summary.splits:
        console.print(_split_table(summary), _class_table(summary), _floor_table(summary))
    for text in notes(summary):
        line(text)
    ordered = sorted(summary.problems, key=lambda problem: problem.severity)  # "error" < "warning"
    for problem in ordered[:MAX_PRINTED]:
        line(f"{problem.severity}: {problem}")
    if len(ordered) > MAX_PRINTED:
        line(f"... and {len(ordered) - MAX_PRINTED} more problems")
    line(f"{summary.errors} errors, {summary.warnings} warnings")


def notes(summary: Summary) -> list[str]:
    """What the tables do not tell, a line each."""
    lines = [
        f"answers that {name} has none of: {', '.join(s.absent)}" for name, s in summary.splits.items() if s.absent
    ]
    lines.append(f"image sizes (frames): {_counted(summary.image_sizes)}")
    if summary.changed_images:
        lines.append(f"images that reading changes (frames): {_counted(summary.changed_images)}")
    rule = summary.location_rule
    if summary.location_questions:
        holds = round(summary.location_agreement * summary.location_questions)
        lines.append(
            f"location rule: against the centre of the {rule.reference}, top = {rule.top}; "
            f"holds for {holds} of {summary.location_questions} location answers"
        )
    if tokens := summary.tokens:
        most = "does not say how many it takes" if tokens.limit is None else f"takes {tokens.limit:,}"
        lines.append(
            f"tokens at most: frame {tokens.prefix:,}, question {tokens.prompt:,}, answer {tokens.completion:,}, "
            f"together {tokens.total:,}; the model {most}"
        )
    lines.append(f"questions whose box leaves the image: {summary.outside}")
    lines.append(f"questions asked again in the same frame: {summary.repeated}")
    lines.append(
        f"images that are in two splits: {len(summary.equal_images)}, that look alike: {len(summary.near_images)}"
    )
    return lines


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none"


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
