from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_r1_jax.codec import PER_MILLE, RESIZED_PIXELS

LABELS = Path(__file__).resolve().parents[2] / "shared" / "data" / "endovis18" / "labels_train.txt"
CODECS = (RESIZED_PIXELS, PER_MILLE)

codecs = st.sampled_from(CODECS)
sides = st.integers(28, 4000)
edges = st.floats(0, 1)


def grid(codec, width, height):
    return (width, height) if codec is RESIZED_PIXELS else (1000, 1000)


def iou(a_N4, b_N4):
    a_N4, b_N4 = np.asarray(a_N4, np.float64), np.asarray(b_N4, np.float64)
    low_N2, high_N2 = np.maximum(a_N4[:, :2], b_N4[:, :2]), np.minimum(a_N4[:, 2:], b_N4[:, 2:])
    inter_N = np.clip(high_N2 - low_N2, 0, None).prod(-1)
    areas_N = (a_N4[:, 2:] - a_N4[:, :2]).prod(-1) + (b_N4[:, 2:] - b_N4[:, :2]).prod(-1)
    return inter_N / (areas_N - inter_N)


@pytest.fixture(scope="module")
def label_edges_N4():
    """The 9,014 boxes of EndoVis-18-VQLA's training labels as pixel edges, 0..1280 and 0..1024."""
    if not LABELS.is_file():
        pytest.skip(f"{LABELS} is not on this machine")
    boxes_N4 = np.array([line.split("|")[3].split(",") for line in LABELS.read_text().splitlines()], int) - 1
    assert len(boxes_N4) == 9014
    return np.clip(boxes_N4, 0, [1280, 1024, 1280, 1024])


@pytest.mark.parametrize(
    ("codec", "width", "height", "least_iou"),
    [
        (RESIZED_PIXELS, 1288, 1036, 0.997),
        (RESIZED_PIXELS, 700, 560, 0.994),
        (PER_MILLE, 1288, 1036, 0.995),
    ],
)
def test_real_boxes_survive_encoding_and_decoding(label_edges_N4, codec, width, height, least_iou):
    size_4 = np.array([1280, 1024, 1280, 1024])
    boxes = [tuple(box) for box in (label_edges_N4 / size_4).tolist()]
    units = [codec.encode(box, width, height) for box in boxes]
    decoded = [codec.decode(box, width, height) for box in units]
    assert iou(boxes, decoded).mean() >= least_iou
    # Half a quantum, in whole numbers and so exactly: |unit - edge / size * steps| <= 1/2.
    steps_4 = np.array(grid(codec, width, height) * 2)
    assert (2 * np.abs(np.array(units) * size_4 - label_edges_N4 * steps_4) <= size_4).all()


@settings(deadline=None, derandomize=True)
@given(codecs, sides, sides, edges, edges, edges, edges)
def test_an_encoded_box_keeps_its_edges_and_never_collapses(codec, width, height, xa, xb, ya, yb):
    box = (min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb))
    x0, y0, x1, y1 = codec.encode(box, width, height)
    columns, rows = grid(codec, width, height)
    assert 0 <= x0 < x1 <= columns
    assert 0 <= y0 < y1 <= rows
    for low, high, first, last, steps in (
        (box[0], box[2], x0, x1, columns),
        (box[1], box[3], y0, y1, rows),
    ):
        low, high = Fraction(low) * steps, Fraction(high) * steps
        bound = Fraction(1, 2) if high - low >= 1 else 1
        assert max(abs(first - low), abs(last - high)) <= bound + Fraction(1, 10**9)


@settings(deadline=None, derandomize=True)
@given(codecs, sides, sides, st.data())
def test_encoding_undoes_decoding(codec, width, height, data):
    columns, rows = grid(codec, width, height)
    x0, y0 = data.draw(st.integers(0, columns - 1)), data.draw(st.integers(0, rows - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, columns)), data.draw(st.integers(y0 + 1, rows))
    assert codec.encode(codec.decode((x0, y0, x1, y1), width, height), width, height) == (x0, y0, x1, y1)


@pytest.mark.parametrize("codec", CODECS)
def test_the_whole_frame_is_the_whole_grid(codec):
    units = codec.encode((0.0, 0.0, 1.0, 1.0), 700, 560)
    assert units == (0, 0, *grid(codec, 700, 560))
    assert codec.decode(units, 700, 560) == (0.0, 0.0, 1.0, 1.0)


def test_a_box_smaller_than_a_quantum_becomes_the_quantum_that_holds_it():
    box = (10.1 / 700, 559.9 / 560, 10.2 / 700, 1.0)
    assert RESIZED_PIXELS.encode(box, 700, 560) == (10, 559, 11, 560)
    assert RESIZED_PIXELS.encode((0.0, 0.0, 1e-9, 1e-9), 700, 560) == (0, 0, 1, 1)
    assert RESIZED_PIXELS.encode((1 - 1e-9, 1 - 1e-9, 1.0, 1.0), 700, 560) == (699, 559, 700, 560)


def test_decoding_takes_decimals_and_clips_nothing():
    assert RESIZED_PIXELS.decode((7.0, 14.5, 1400, 1120), 700, 560) == (0.01, 14.5 / 560, 2.0, 2.0)
    assert PER_MILLE.decode((10, 20, 1500, 40), 700, 560) == (0.01, 0.02, 1.5, 0.04)


def test_the_wrong_grid_ruins_a_perfect_box():
    rng = np.random.default_rng(0)
    size_N2 = rng.uniform(0.05, 0.5, (2000, 2))
    low_N2 = rng.uniform(0, 1 - size_N2)
    boxes = [tuple(box) for box in np.concatenate([low_N2, low_N2 + size_N2], -1).tolist()]
    misread = [PER_MILLE.decode(RESIZED_PIXELS.encode(box, 1288, 1036), 1288, 1036) for box in boxes]
    assert iou(boxes, misread).mean() < 0.6
    misread = [RESIZED_PIXELS.decode(RESIZED_PIXELS.encode(box, 700, 560), 1280, 1024) for box in boxes]
    assert iou(boxes, misread).mean() < 0.1  # the size of the resized image, not of the original
