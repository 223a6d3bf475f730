"""Which predictions a report shows, by rules that nobody can bend, and what it says about each.

Every draw is by the report's seed, over predictions in a fixed order, before anyone has seen the answers.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from surgery_r1_jax import answer, charts, metrics, pictures, vocabulary
from surgery_r1_jax.records import Box

LONGEST_TEXT = 2000  # characters of one completion that are shown

# Every prediction has exactly one outcome.
OUTCOMES = {
    "joint": "right answer, right place",
    "illusion": "right answer, wrong place",
    "place": "wrong answer, right place",
    "neither": "both wrong",
    "unread": "no answer readable",
}


@dataclass(frozen=True)
class Stage:
    """One model to report on.

    `metrics` are those of `metrics.table`, `predictions` the lines of predictions.jsonl, `curve` those of
    metrics.jsonl and `starts` those of sessions.jsonl, none for a model that was not trained.
    """

    name: str
    metrics: dict
    predictions: list[dict]
    curve: list[dict] = field(default_factory=list)
    starts: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class Card:
    """One prediction as the page shows it; boxes that cannot be drawn are None."""

    stage: str
    frame: str
    question: str
    answer: str
    given: str | None
    truth: Box | None
    prediction: Box | None
    iou: float
    outcome: str
    think: str
    text: str
    left_out: int  # characters of the text that are not shown
    reason: str
    rewards: dict[str, float]


@dataclass(frozen=True)
class Failures:
    """A kind of failure: how many predictions fail so, and some of them."""

    name: str
    rule: str
    total: int
    of: int
    cards: list[Card]


def outcome(row: dict) -> str:
    """The outcome of one prediction, a key of `OUTCOMES`."""
    right, placed = row["pred_answer"] == row["answer"], _iou(row) >= metrics.IN_PLACE
    if right or placed:
        return "joint" if right and placed else "illusion" if right else "place"
    return "unread" if row["pred_answer"] is None else "neither"


def side_by_side(stages: Sequence[Stage], most: int, seed: int) -> dict[str, list[list[Card]]]:
    """Random frames, each with one random question per type, at most `most` in all; a question is a card per stage."""
    rng = random.Random(seed)
    tables = [{_identity(row): row for row in stage.predictions} for stage in stages]
    frames: dict[str, dict[int, list[tuple]]] = {}
    for identity in sorted(set.intersection(*map(set, tables))):
        frame, question, *_ = identity
        kind, _ = vocabulary.question_kind(question)
        frames.setdefault(frame, {}).setdefault(kind, []).append(identity)
    drawn: dict[str, list[list[Card]]] = {}
    for frame in rng.sample(sorted(frames), len(frames)):
        chosen = [rng.choice(alike) for _, alike in sorted(frames[frame].items())][:most]
        most -= len(chosen)
        if chosen:
            drawn[frame] = [
                [_card(stage, table[identity]) for stage, table in zip(stages, tables, strict=True)]
                for identity in chosen
            ]
    return drawn


def failures(stages: Sequence[Stage], most: int, seed: int) -> list[Failures]:
    """Up to `most` random cards of each kind of failure of the last stage."""
    last = stages[-1]
    rows = sorted(last.predictions, key=_identity)
    groups = [("Illusions", "The answer is right, the place is not", [r for r in rows if outcome(r) == "illusion"])]
    if len(stages) > 1:
        before = {_identity(row) for row in stages[-2].predictions if outcome(row) == "joint"}
        lost = [row for row in rows if _identity(row) in before and outcome(row) != "joint"]
        rule = f"Right answer in the right place from {stages[-2].name}, no longer from {last.name}"
        groups.append(("Unlearned", rule, lost))
    groups.append(("Unreadable", "No answer could be read", [r for r in rows if outcome(r) == "unread"]))
    rng = random.Random(seed)
    return [
        Failures(
            name,
            rule,
            len(found),
            len(rows),
            [_card(last, row) for row in rng.sample(found, min(most, len(found)))],
        )
        for name, rule, found in groups
    ]


def _identity(row: dict) -> tuple:
    """What makes two predictions answers to the same question: all of its gold, for a frame may ask twice."""
    return row["frame"], row["question"], row["answer"], tuple(row["box"])


def _card(stage: Stage, row: dict) -> Card:
    text = row.get("text") or ""
    rewards = {name: charts.finite(value) for name, value in (row.get("rewards") or {}).items()}
    return Card(
        stage=stage.name,
        frame=row["frame"],
        question=row["question"],
        answer=row["answer"],
        given=row["pred_answer"],
        truth=pictures.drawable(row["box"]),
        prediction=pictures.drawable(row["pred_box"]),
        iou=_iou(row),
        outcome=outcome(row),
        think=answer.parse(text).think[:LONGEST_TEXT],
        text=text[:LONGEST_TEXT],
        left_out=max(0, len(text) - LONGEST_TEXT),
        reason=row.get("reason") or "",
        rewards={name: value for name, value in rewards.items() if value is not None},
    )


def _iou(row: dict) -> float:
    return charts.finite(row["iou"]) or 0.0
