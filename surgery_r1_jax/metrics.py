"""The numbers of an evaluation, by the same code for a live run and for its predictions file.

    arrays ----------------------------------> compare ---> Outcomes ---> table | summarise | intervals
    predictions of a live run ---> of_rows ------^
    predictions file ------> from_predictions ---^

Everything is counted on the host: integers, and float64 IoUs added up exactly (`math.fsum`). So order,
padding, batch size and mesh cannot change a single bit.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from surgery_r1_jax import boxes, places, vocabulary
from surgery_r1_jax.errors import InputError

IN_PLACE = 0.5
"""IoU from which a box counts as in the right place."""


class Outcomes(NamedTuple):
    """What became of each question; NumPy arrays [N]. Rows with valid False are padding and count nowhere."""

    answer: np.ndarray  # class index, -1 where no class could be read
    gold_answer: np.ndarray
    iou: np.ndarray  # float64, 0 where no box could be read
    legacy_iou: np.ndarray
    boxed: np.ndarray  # bool: a box could be read
    kind: np.ndarray  # index into vocabulary.KINDS
    frame: np.ndarray  # any number per frame
    valid: np.ndarray


def compare(*, pred_answer, gold_answer, pred_box, box_ok, gold_box, kind, valid=None, frame=None) -> Outcomes:
    """Hold predictions against gold: arrays of one leading shape, boxes [..., 4] in [0, 1] of the frame.

    `valid` defaults to all rows, less those without a gold answer; `frame` to one frame per row.
    """
    answer_N, gold_answer_N, kind_N, box_ok_N = (
        np.asarray(array).reshape(-1) for array in (pred_answer, gold_answer, kind, box_ok)
    )
    box_N4, gold_box_N4 = (np.asarray(array, np.float64).reshape(-1, 4) for array in (pred_box, gold_box))
    boxed_N = box_ok_N.astype(bool) & boxes.is_valid(box_N4, np)
    valid_N = gold_answer_N >= 0
    if valid is not None:
        valid_N &= np.asarray(valid).reshape(-1).astype(bool)
    return Outcomes(
        answer=np.where(answer_N < 0, -1, answer_N),
        gold_answer=gold_answer_N,
        iou=np.where(boxed_N, boxes.iou(box_N4, gold_box_N4, np), 0.0),
        legacy_iou=np.where(boxed_N, boxes.legacy_iou(box_N4, gold_box_N4, np), 0.0),
        boxed=boxed_N,
        kind=kind_N,
        frame=np.arange(len(answer_N)) if frame is None else np.asarray(frame).reshape(-1),
        valid=valid_N,
    )


def table(outcomes: Outcomes) -> dict:
    """`summarise` over all questions and, under "by_kind", over those of each kind that occurs."""
    parts = {name: summarise(outcomes, outcomes.kind == code) for code, name in enumerate(vocabulary.KINDS)}
    for part in parts.values():
        del part["accuracy_no_organ"]  # of one kind it is its accuracy or nothing
    return {**summarise(outcomes), "by_kind": {name: part for name, part in parts.items() if part["n"]}}


def summarise(outcomes: Outcomes, mask=None) -> dict[str, float]:
    """The metrics over the valid questions, or over those in the mask [N]; a share of nothing is 0.

    accuracy            share of right answers
    accuracy_no_organ   the same without organ questions, whose answer never varies
    macro_f1            mean F1 over the classes in gold or predictions; unreadable is a class too (official)
    macro_f1_true       mean F1 over the classes in gold
    macro_f1_18         mean F1 over the 18 classes; one that is in neither gold nor predictions has 0
    miou                mean IoU over all questions; an unreadable box counts 0
    miou_legacy         the same by the formula that the field prints (`boxes.legacy_iou`)
    parse_failure_rate  share of questions whose answer or box could not be read
    joint_rate          share with the right answer and IoU >= IN_PLACE
    illusion_rate       share with IoU < IN_PLACE among the right answers
    agreement_rate      share where answer and place are both right or both wrong, so not always good
    n                   number of questions
    """
    rows = outcomes.valid if mask is None else outcomes.valid & np.asarray(mask).reshape(-1).astype(bool)
    return _metrics(Outcomes(*(array[rows] for array in outcomes)))


def intervals(
    outcomes: Outcomes, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """(low, high) of each metric by the percentile bootstrap over frames, not over questions."""
    counted = Outcomes(*(array[outcomes.valid] for array in outcomes))
    _, code_N = np.unique(counted.frame, return_inverse=True)
    frames = np.split(np.argsort(code_N, kind="stable"), np.cumsum(np.bincount(code_N))[:-1])
    random = np.random.default_rng(seed)
    samples = []
    for _ in range(draws):
        rows = np.concatenate([frames[i] for i in random.integers(len(frames), size=len(frames))])
        samples.append(_metrics(Outcomes(*(array[rows] for array in counted))))
    tail = (1 - level) / 2
    return {
        name: tuple(np.quantile([sample[name] for sample in samples], (tail, 1 - tail)).tolist())
        for name in samples[0]
        if name != "n"
    }


def known(scores: dict, classes: Sequence[str]) -> dict:
    """The scores that mean something: without `macro_f1_18` where the answers are not the official classes."""
    if tuple(classes[: len(vocabulary.CLASSES)]) == vocabulary.CLASSES:
        return scores
    kept = {name: value for name, value in scores.items() if name != "macro_f1_18"}
    return kept | {name: {k: known(v, classes) for k, v in kept[name].items()} for name in kept if name == "by_kind"}


def of_rows(rows: Sequence[Mapping], classes: Sequence[str] = vocabulary.CLASSES) -> Outcomes:
    """The outcomes of predictions, one mapping per question.

    Keys: frame, question, answer, box (unit xyxy), pred_answer and pred_box (None where unreadable).
    """
    classes = tuple(classes)
    gold_answer = [vocabulary.class_index(row["answer"], classes) for row in rows]
    asked = [vocabulary.question_kind(row["question"])[0] for row in rows]
    return compare(
        pred_answer=[
            -1 if row["pred_answer"] is None else vocabulary.class_index(row["pred_answer"], classes) for row in rows
        ],
        gold_answer=gold_answer,
        pred_box=[row["pred_box"] or (0.0,) * 4 for row in rows],
        box_ok=[row["pred_box"] is not None for row in rows],
        gold_box=[row["box"] for row in rows],
        kind=[
            kind if kind >= 0 else vocabulary.class_kind(gold, classes)
            for kind, gold in zip(asked, gold_answer, strict=True)
        ],
        frame=np.unique([row["frame"] for row in rows], return_inverse=True)[1],
    )


def from_predictions(path: str | Path, classes: Sequence[str] = vocabulary.CLASSES) -> Outcomes:
    """`of_rows` of a predictions file, one JSON object per line; stored scores are never read.

    Raises InputError that names the file and line of the first bad one.
    """
    try:
        lines = places.place(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot read the predictions: {error.strerror}") from None
    numbered = ((f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip())
    rows = [_row(line, where, tuple(classes)) for where, line in numbered]
    if not rows:
        raise InputError(f"{path}: holds no predictions; write them with an evaluation")
    return of_rows(rows, classes)


def _metrics(outcomes: Outcomes) -> dict[str, float]:
    right = outcomes.answer == outcomes.gold_answer
    placed = outcomes.iou >= IN_PLACE
    read = (outcomes.answer >= 0) & outcomes.boxed
    movable = outcomes.kind != vocabulary.ORGAN
    f1_by_label, labels, in_gold = _f1(outcomes.answer, outcomes.gold_answer)
    official = (labels >= 0) & (labels < len(vocabulary.CLASSES))
    return {
        "accuracy": _mean(right),
        "accuracy_no_organ": _mean(right[movable]),
        "macro_f1": _mean(f1_by_label),
        "macro_f1_true": _mean(f1_by_label[in_gold]),
        "macro_f1_18": math.fsum(f1_by_label[official]) / len(vocabulary.CLASSES),
        "miou": _mean(outcomes.iou),
        "miou_legacy": _mean(outcomes.legacy_iou),
        "parse_failure_rate": _mean(~read),
        "illusion_rate": _mean(~placed[right]),
        "joint_rate": _mean(right & placed),
        "agreement_rate": _mean(right == placed),
        "n": len(right),
    }


def _mean(values: np.ndarray) -> float:
    """The mean, correctly rounded but for the division, whatever the order; 0 of nothing."""
    return math.fsum(values.tolist()) / max(len(values), 1)


def _f1(answer: np.ndarray, gold_answer: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F1 of every label in gold or predictions, those labels, and which of them are in gold.

    As scikit-learn's precision_recall_fscore_support: on these labels its zero_division never touches F1.
    """
    labels, codes = np.unique(np.concatenate([gold_answer, answer]), return_inverse=True)
    gold, given = codes[: len(gold_answer)], codes[len(gold_answer) :]
    in_gold, in_given, hits = (
        np.bincount(which, minlength=len(labels)) for which in (gold, given, gold[gold == given])
    )
    return 2 * hits / (in_gold + in_given), labels, in_gold > 0


def _row(line: bytes, where: str, classes: tuple[str, ...]) -> dict:
    """The row of one line, with its boxes as floats, after checking all that `of_rows` reads."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not a JSON object on one line; restore the file or evaluate again") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {_short(row)}")
    for key in ("frame", "question", "answer", "box", "pred_answer", "pred_box"):
        if key not in row:
            raise InputError(f"{where}: key '{key}' is missing; evaluate again to write it")
    for key in ("frame", "question", "answer", "pred_answer"):
        if not isinstance(row[key], str) and (key != "pred_answer" or row[key] is not None):
            raise InputError(f"{where}: '{key}' must be a string, found {_short(row[key])}")
    if vocabulary.class_index(row["answer"], classes) < 0:
        raise InputError(f"{where}: 'answer' {_short(row['answer'])} is none of the {len(classes)} classes")
    box = _box(row["box"], f"{where}: 'box'")
    if not boxes.is_valid(np.array(box), np):
        raise InputError(f"{where}: 'box' must have x0 < x1 and y0 < y1, found {_short(row['box'])}")
    pred_box = None if row["pred_box"] is None else _box(row["pred_box"], f"{where}: 'pred_box'")
    return row | {"box": box, "pred_box": pred_box}


def _box(value: object, what: str) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != 4 or not all(type(edge) in (int, float) for edge in value):
        raise InputError(f"{what} must be four numbers [x0, y0, x1, y1] in 0..1, found {_short(value)}")
    try:
        return tuple(map(float, value))
    except OverflowError:  # an integer beyond every float
        return (math.inf,) * 4


def _short(value: object) -> str:
    return f"{json.dumps(value):.60}"
