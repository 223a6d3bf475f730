"""The border between host and device: frames with branches as arrays of fixed shape.

    prefix  (system, instruction, image)   one a frame
       |-- lane 0: branch 1 | branch 2 | padding
       |-- lane 1: branch 1 | padding

Before these arrays things may be ragged and may raise; behind them nothing is and nothing does. Letters: B
frames, W windows, S patch slots of a window, C values of a patch, P prefix tokens, Q questions, J lanes, T lane
tokens, L scored tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ANSWER, BOX, BOTH = range(3)  # what a prompt asks for: indices into answer.WANT


class FrameBatch(NamedTuple):
    """What the model computes on; one example has the same fields without B."""

    patches_BWSC: np.ndarray  # float32, normalised pixels; zeros in empty slots
    patch_hw_BWS2: np.ndarray  # int32, row and column of the patch in its image
    patch_image_BWS: np.ndarray  # int32, 1-based image of the frame, 0 = empty slot
    prefix_ids_BP: np.ndarray  # int32
    prefix_unit_BP: np.ndarray  # int32, merged unit that takes the token's place, -1 for text
    prefix_pos_B3P: np.ndarray  # int32, temporal, row and column position
    prefix_mask_BP: np.ndarray  # bool
    branch_ids_BJT: np.ndarray  # int32
    branch_pos_BJT: np.ndarray  # int32, from max prefix position + 1 in every branch
    branch_segment_BJT: np.ndarray  # int32, branch within the lane from 1, 0 = padding
    score_slot_BL: np.ndarray  # int32, j * T + t of the token whose vector predicts the target
    score_target_BL: np.ndarray  # int32
    score_weight_BL: np.ndarray  # float32, 0 = padding


class Gold(NamedTuple):
    """What completions are judged against; padding questions are not valid, padding frames have number -1."""

    answer_BQ: np.ndarray  # int32 class, -1 = padding
    box_BQ4: np.ndarray  # float32, unit xyxy
    kind_BQ: np.ndarray  # int32 index into vocabulary.KINDS
    want_BQ: np.ndarray  # int32 index into answer.WANT
    organ_box_B4: np.ndarray  # float32
    organ_ok_B: np.ndarray  # bool
    valid_BQ: np.ndarray  # bool
    resized_B2: np.ndarray  # int32, width and height of the image as the model sees it
    frame_B: np.ndarray  # int32, number of the frame in the data set
    record_BQ: np.ndarray  # int32, number of the record within its frame


class Shape(NamedTuple):
    """The fixed extents of a batch of examples."""

    windows: int
    prefix: int
    lanes: int
    lane_tokens: int
    scored: int


def padding_gold(questions: int) -> Gold:
    """Gold of a frame that is not there."""
    integers = lambda *shape: np.zeros(shape, np.int32)  # noqa: E731
    return Gold(
        answer_BQ=integers(questions) - 1,
        box_BQ4=np.zeros((questions, 4), np.float32),
        kind_BQ=integers(questions),
        want_BQ=integers(questions) + BOTH,
        organ_box_B4=np.zeros(4, np.float32),
        organ_ok_B=np.bool_(False),
        valid_BQ=np.zeros(questions, bool),
        resized_B2=integers(2) + 1,
        frame_B=np.int32(-1),
        record_BQ=integers(questions) - 1,
    )


def padding_like(example):
    """An example of the same shape in which every frame, lane and score is padding."""
    return type(example)(*(np.zeros_like(field) for field in example))


def stack(parts: Sequence):
    """Examples to one batch, field by field, through nested tuples."""
    first = parts[0]
    if isinstance(first, tuple):
        fields = [stack(field) for field in zip(*parts, strict=True)]
        return type(first)(*fields) if hasattr(first, "_fields") else tuple(fields)
    return np.stack(parts)
