"""One self-contained HTML page about a run: what was learned, how, and where it still fails.

This module turns metrics, predictions and learning curves into plain values; `report.html.jinja` next to it draws
them. No script, no network, no time stamp: the same input gives the same bytes. Whatever a model wrote is escaped
by the template, and its control characters are spelt out.
"""

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from PIL import Image

from surgery_r1_jax import cards, charts, files, images, metrics, pictures, places, records, vocabulary
from surgery_r1_jax.cards import Stage
from surgery_r1_jax.errors import InputError

PICTURE_BYTES = 2_800_000  # for all pictures together; base64 adds a third

Pictures = Callable[[str], Image.Image | None]

# key, label, which way is better (0: neither)
METRICS = (
    ("accuracy", "Accuracy", 1),
    ("accuracy_no_organ", "Accuracy without organ questions", 1),
    ("macro_f1", "Macro-F1", 1),
    ("miou", "mIoU", 1),
    ("miou_legacy", "mIoU, legacy formula", 1),
    ("joint_rate", "Joint rate", 1),
    ("illusion_rate", "Illusion rate", -1),
    ("parse_failure_rate", "Parse failure rate", -1),
    ("n", "Questions, n", 0),
)


def write(
    path: str | Path,
    *,
    title: str,
    stages: Sequence[Stage],
    floors: dict[str, dict],
    images: Pictures,
    facts: dict[str, str],
    notes: Sequence[str] = (),
    examples: int = 12,
    seed: int = 0,
) -> None:
    """Writes the page, whole or not at all.

    `floors` maps a floor's name to metrics under the same keys as a stage's; any may be missing. `images` gives
    the picture of a frame id, or None where there is none to show. `examples` bounds the questions shown stage by
    stage; half as many are shown of each kind of failure.
    Raises: InputError without stages or for a stage without predictions.
    """
    if not stages or not all(stage.predictions for stage in stages):
        raise InputError(f"{path}: a stage without predictions cannot be reported; evaluate it first")
    examples_by_frame = cards.side_by_side(stages, examples, seed)
    failures = cards.failures(stages, max(1, examples // 2), seed)
    shown = [card for questions in examples_by_frame.values() for question in questions for card in question]
    shown += [card for group in failures for card in group.cards]
    page = template("report.html.jinja").render(
        title=title,
        facts=facts,
        notes=notes,
        seed=seed,
        in_place=metrics.IN_PLACE,
        stages=stages,
        floors=list(floors),
        outcomes=cards.OUTCOMES,
        shares=[_shares(stage) for stage in stages],
        examples=examples_by_frame,
        tables=_tables(stages, floors),
        curves=[charts.panels(stage.curve) for stage in stages],
        speed=[(charts.time_split(stage.curve), charts.panels(stage.curve, charts.SPEED)) for stage in stages],
        restarts=[_restarts(stage) for stage in stages],
        histograms=[charts.histogram(stage.name, stage.predictions) for stage in stages],
        confusion=_confusion(stages[-1]),
        failures=failures,
        frames=embedded(dict.fromkeys(card.frame for card in shown), images),
        full_marks=max((card.rewards.get("total", 0.0) for card in shown), default=0.0),
        colours={"truth": pictures.TRUTH, "prediction": pictures.PREDICTION},
    )
    path = places.place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, page)


def run(run_dirs: Sequence[Path], out: Path, *, data: Path | None = None) -> int:
    """The page about some evaluated runs, in their order; returns the exit status.

    A run is given by the FILE.json that `evaluate` wrote, with FILE.predictions.jsonl beside it, or by a folder with
    metrics.json and predictions.jsonl; metrics.jsonl in the same folder is its learning curve, if it was trained, and
    sessions.jsonl tells of its starts. Of the summary "floors", "facts", "notes", "classes", "split", "boxes" and
    "data" are taken, the last being the data set's folder where none is given here. Without data the page has no
    pictures. Scores are counted afresh from the predictions.
    """
    stages, floors, facts, notes, boxes = [], {}, {}, {}, None
    for each in map(_evaluated, map(places.place, run_dirs)):
        known = _object(each.summary, each.summary.read_bytes()) if each.summary.exists() else {}
        floors |= known.get("floors", {})
        facts |= {key: str(known[key]) for key in ("data", "split") if key in known} | known.get("facts", {})
        notes |= dict.fromkeys(known.get("notes", []))
        data, boxes = data or known.get("data"), boxes or known.get("boxes")
        classes = known.get("classes")
        stages.append(_stage(each, classes if isinstance(classes, list) else vocabulary.EXTENDED_CLASSES))
    frames = {frame.id: frame for frame in records.read(data, boxes=boxes)} if data else {}
    write(
        out,
        title="Surgery-R1: " + ", ".join(stage.name for stage in stages),
        stages=stages,
        floors=floors,
        images=lambda frame: images.load(frames[frame].image) if frame in frames else None,
        facts=facts,
        notes=list(notes),
    )
    return 0


class Evaluated(NamedTuple):
    """The files of a run that was evaluated."""

    name: str
    summary: Path
    predictions: Path
    folder: Path  # that of the run


def _evaluated(given: Path) -> Evaluated:
    """A run given by its folder or by its evaluation's file."""
    if given.suffix == ".json":
        folder = places.absolute(given).parent
        return Evaluated(folder.name, given, given.with_suffix(".predictions.jsonl"), folder)
    return Evaluated(given.name, given / "metrics.json", given / "predictions.jsonl", given)


def _stage(run: Evaluated, classes: Sequence[str]) -> Stage:
    """The run as a stage of the page."""
    outcomes = metrics.from_predictions(run.predictions, classes)
    predictions = _lines(run.predictions)
    for row, iou in zip(predictions, outcomes.iou.tolist(), strict=True):
        row["iou"] = iou
    logs = (run.folder / name for name in ("metrics.jsonl", "sessions.jsonl"))
    return Stage(run.name, metrics.table(outcomes), predictions, *(_lines(log) if log.exists() else [] for log in logs))


def _lines(file: Path) -> list[dict]:
    """The objects of a file with one of them per line."""
    lines = file.read_bytes().splitlines()
    return [_object(f"{file}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def _object(where: Path | str, text: bytes) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object; restore the file or evaluate again")
    return value


@functools.cache
def template(name: str) -> jinja2.Template:
    """A page's template: all it prints is escaped, and no character of it is invisible."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: pictures.visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _restarts(stage: Stage) -> str | None:
    """What became of the time of a run that was started more than once, in words."""
    if len(stage.starts) < 2:
        return None

    def seconds(rows: list[dict], key: str) -> list[float]:
        return [charts.finite(row.get(key)) or 0.0 for row in rows]

    work = _duration(max(seconds(stage.curve, "elapsed_s"), default=0.0))
    lost, down = (_duration(sum(seconds(stage.starts, key))) for key in ("lost_s", "down_s"))
    return f"{len(stage.starts)} starts: {work} in the run, {lost} lost by going back to checkpoints, {down} down."


def _duration(seconds: float) -> str:
    """In the unit in which it is easily read."""
    unit, size = next(((unit, size) for unit, size in (("h", 3600), ("min", 60)) if seconds >= 2 * size), ("s", 1))
    return f"{seconds / size:.{int(size > 1)}f} {unit}"


def _shares(stage: Stage) -> dict:
    """How the stage's predictions divide over the outcomes."""
    counts, total = Counter(map(cards.outcome, stage.predictions)), len(stage.predictions)
    parts = [{"outcome": key, "n": counts[key], "share": counts[key] / total} for key in cards.OUTCOMES if counts[key]]
    return {"stage": stage.name, "total": total, "joint": counts["joint"] / total, "parts": parts}


def _tables(stages: Sequence[Stage], floors: dict[str, dict]) -> list[dict]:
    """The metrics over all questions, then over those of each type; a metric that nobody has makes no row."""
    ours, bounds = [stage.metrics for stage in stages], list(floors.values())
    tables = [{"name": "All questions", "rows": [_row(*metric, ours, bounds) for metric in METRICS]}]
    for kind in dict.fromkeys(kind for numbers in ours for kind in numbers.get("by_kind", {})):
        sides = [[numbers.get("by_kind", {}).get(kind, {}) for numbers in side] for side in (ours, bounds)]
        rows = [_row(*metric, *sides) for metric in METRICS]
        tables.append({"name": f"{kind} questions", "rows": rows})
    return [table | {"rows": [row for row in table["rows"] if row["known"]]} for table in tables]


def _row(key: str, label: str, better: int, ours: list[dict], bounds: list[dict]) -> dict:
    """One metric: a cell per stage, marked where it is the best or no better than the best floor; then the floors."""
    values = [charts.finite(numbers.get(key)) for numbers in ours]
    below = [charts.finite(numbers.get(key)) for numbers in bounds]
    compared = [value * better for value in values if value is not None] if better else []
    best = max(compared) if len(set(compared)) > 1 else None
    floor = max((value for value in below if value is not None), default=-math.inf) if better > 0 else -math.inf
    cells = [
        {
            "value": value,
            "best": None not in (value, best) and value * better == best,
            "low": value is not None and value <= floor,
        }
        for value in values
    ]
    known = any(value is not None for value in values + below)
    return {"key": key, "label": label, "better": better, "cells": cells, "floors": below, "known": known}


def _confusion(stage: Stage) -> dict:
    """True answers (rows) against given answers (columns, None last), in the official order of the classes."""
    order = {name: index for index, name in enumerate(vocabulary.EXTENDED_CLASSES)}
    pairs = Counter((row["answer"], row["pred_answer"]) for row in stage.predictions)

    def ranked(names: Iterable[str | None]) -> list[str | None]:
        return sorted(set(names), key=lambda name: (name is None, order.get(name, len(order)), name or ""))

    truths = ranked(truth for truth, _ in pairs)
    columns = ranked([*truths, *(given for _, given in pairs)])
    rows = [{"truth": truth, "counts": [pairs[truth, given] for given in columns]} for truth in truths]
    return {"columns": columns, "rows": rows}


def embedded(names: Iterable[str], images: Pictures) -> dict[str, dict]:
    """Every picture once: a short id, its size on the page and its JPEG, which is None where there is none to show."""
    names = list(names)
    limit = min(120_000, PICTURE_BYTES // max(1, len(names)))
    frames = {}
    for index, name in enumerate(names):
        image = images(name)
        width, height = image.size if image else (5, 4)
        url = pictures.data_url(image, limit=limit) if image else None
        frames[name] = {"id": f"frame-{index}", "width": 480, "height": round(480 * height / width), "url": url}
    return frames
