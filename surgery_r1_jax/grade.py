"""Completions to numbers: decode, parse, and line up with the gold of their questions.

The one place where text of the model meets the gold; what leaves it are arrays [B, J] for the jitted rewards and
the parsed texts for people. Each process grades its own rows.
"""

from typing import NamedTuple

import numpy as np

from surgery_r1_jax import answer
from surgery_r1_jax.batch import ANSWER, BOX, Gold
from surgery_r1_jax.examples import Encoder
from surgery_r1_jax.rewards import Judged


class Graded(NamedTuple):
    """Completions of a batch as numbers, and as texts for tables and reports."""

    judged: Judged  # NumPy arrays [B, J]
    texts: list[list[str]]  # [B][J], "" for padding lanes
    parsed: list[list[answer.Parsed | None]]


def grade(tokens_BJT: np.ndarray, stopped_BJ: np.ndarray, gold: Gold, encoder: Encoder, samples: int = 1) -> Graded:
    """Judge completions; lane q * samples + g answers question q."""
    B, J, _ = tokens_BJT.shape
    gold_answer, gold_box, kind, wants, valid = (
        np.repeat(field, samples, axis=1)
        for field in (gold.answer_BQ, gold.box_BQ4, gold.kind_BQ, gold.want_BQ, gold.valid_BQ)
    )
    pred = np.full((B, J), -1, np.int32)
    box, box_ok = np.zeros((B, J, 4), np.float32), np.zeros((B, J), bool)
    format_ok, think_answer = np.zeros((B, J), bool), np.full((B, J), -1, np.int32)
    think_box = np.zeros((B, J, answer.MAX_THINK_BOXES, 4), np.float32)
    think_box_ok = np.zeros((B, J, answer.MAX_THINK_BOXES), bool)
    texts = [[""] * J for _ in range(B)]
    parsed: list[list[answer.Parsed | None]] = [[None] * J for _ in range(B)]
    for b, j in zip(*np.nonzero(valid), strict=True):
        text = encoder.chat.decode(tokens_BJT[b, j])
        read = answer.parse(text, want=int(wants[b, j]), truncated=not stopped_BJ[b, j], classes=encoder.classes)
        texts[b][j], parsed[b][j] = text, read
        width, height = (int(n) for n in gold.resized_B2[b])
        pred[b, j], format_ok[b, j] = read.answer, read.format_ok
        think_answer[b, j] = read.think_answers[kind[b, j]]
        if read.box is not None:
            box[b, j], box_ok[b, j] = encoder.codec.decode(read.box, width, height), True
        for k, trace in enumerate(read.think_boxes):
            think_box[b, j, k], think_box_ok[b, j, k] = encoder.codec.decode(trace, width, height), True
    organ_box = np.broadcast_to(gold.organ_box_B4[:, None], (B, J, 4))
    judged = Judged(
        answer=pred,
        gold_answer=gold_answer,
        box=box,
        box_ok=box_ok,
        gold_box=gold_box,
        format_ok=format_ok,
        kind=kind,
        wants_answer=wants != BOX,
        wants_box=wants != ANSWER,
        think_answer=think_answer,
        think_box=think_box,
        think_box_ok=think_box_ok,
        organ_box=organ_box.astype(np.float32),
        organ_ok=np.broadcast_to(gold.organ_ok_B[:, None], (B, J)),
        valid=valid,
    )
    return Graded(judged, texts, parsed)
