import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_r1_jax import boxes

jitted = {name: jax.jit(getattr(boxes, name)) for name in ("area", "iou", "giou", "legacy_iou", "is_valid")}
FLOORS = {"iou": 0.0, "giou": -1.0, "legacy_iou": 0.0}

edge = st.floats(2**-20, 1, width=32) | st.integers(1, 1280).map(lambda pixel: float(np.float32(pixel / 1280)))
anything = st.floats(width=64) | st.sampled_from(
    (0.0, -0.0, 1.0, 200.0, 1e18, 1e38, 1e308, math.inf, -math.inf, math.nan)
)
any_box = st.tuples(anything, anything, anything, anything)


@st.composite
def unit_boxes(draw):
    """A box with an inside, in [0, 1], of float32 values."""
    x0, x1 = sorted(draw(st.lists(edge, min_size=2, max_size=2, unique=True)))
    y0, y1 = sorted(draw(st.lists(edge, min_size=2, max_size=2, unique=True)))
    return x0, y0, x1, y1


@st.composite
def near_pairs(draw):
    """Two boxes that share some edges, all edges but a few, or all."""
    a, b = draw(unit_boxes()), draw(unit_boxes())
    b = tuple(draw(st.sampled_from(pair)) for pair in zip(a, b, strict=True))
    return (a, b) if b[0] < b[2] and b[1] < b[3] else (a, a)


def exact(a, b, grow=0):
    """(IoU, GIoU) in rational numbers, from the definitions."""
    a, b = ([Fraction(edge) for edge in box] for box in (a, b))
    for box in (a, b):
        box[2:] = [edge + grow for edge in box[2:]]
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    inter = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    iou = inter / union if union else Fraction(0)
    return iou, iou - (hull - union) / hull if hull else Fraction(0)


def on_device(name, *pair):
    with np.errstate(over="ignore"):  # 1e308 becomes an infinite float32, on purpose
        return float(jitted[name](*(np.asarray(box, np.float32) for box in pair)))


def on_host(name, *pair):
    return float(getattr(boxes, name)(*(np.asarray(box, np.float64) for box in pair), np))


@pytest.mark.parametrize(
    ("a", "b", "iou", "giou", "legacy"),
    [
        ((0.1, 0.1, 0.4, 0.4), (0.1, 0.1, 0.4, 0.4), 1, 1, 1),
        ((0.1, 0.1, 0.4, 0.4), (0.2, 0.2, 0.5, 0.5), 2 / 7, 9 / 56, 72 / 97),
        ((0, 0, 0.2, 0.2), (0.8, 0.8, 1, 1), 0, -23 / 25, 1 / 17),
        ((0, 0, 1, 1), (0.25, 0.25, 0.75, 0.75), 1 / 4, 1 / 4, 9 / 16),
        ((0, 0, 0.5, 1), (0.5, 0, 1, 1), 0, 0, 1 / 2),
        ((0.2, 0.2, 0.6, 0.6), (0.3, 0.2, 0.7, 0.6), 3 / 5, 3 / 5, 13 / 15),
        ((0, 0, 0, 0), (0.25, 0.25, 0.75, 0.75), 0, -5 / 9, 9 / 43),
        ((0.3, 0.3, 0.3, 0.3), (0.3, 0.3, 0.3, 0.3), 0, 0, 1),
    ],
)
def test_the_worked_examples_come_out(a, b, iou, giou, legacy):
    for measure in (on_device, on_host):
        assert measure("iou", a, b) == pytest.approx(iou, abs=1e-6)
        assert measure("giou", a, b) == pytest.approx(giou, abs=1e-6)
        assert measure("legacy_iou", a, b) == pytest.approx(legacy, abs=1e-6)


@settings(deadline=None, max_examples=200)
@given(st.tuples(unit_boxes(), unit_boxes()) | near_pairs())
def test_they_equal_rational_arithmetic(pair):
    iou, giou = exact(*pair)
    legacy, _ = exact(*pair, grow=1)
    for measure, tolerance in ((on_device, 1e-6), (on_host, 1e-14)):
        assert abs(Fraction(measure("iou", *pair)) - iou) < tolerance
        assert abs(Fraction(measure("giou", *pair)) - giou) < tolerance
        assert abs(Fraction(measure("legacy_iou", *pair)) - legacy) < tolerance


@settings(deadline=None, max_examples=200)
@given(any_box | unit_boxes(), any_box | unit_boxes())
def test_they_keep_their_range_for_any_numbers(a, b):
    for measure in (on_device, on_host):
        for name, floor in FLOORS.items():
            assert floor <= measure(name, a, b) <= 1, (name, measure)
            assert measure(name, a, b) == measure(name, b, a), (name, measure)
        assert 0 <= measure("area", a) < math.inf


@settings(deadline=None, max_examples=200)
@given(st.tuples(unit_boxes(), unit_boxes()) | near_pairs())
def test_only_equal_boxes_reach_one(pair):
    a, b = pair
    for measure in (on_device, on_host):
        assert (measure("iou", a, b) == 1) == (a == b)
        assert (measure("giou", a, b) == 1) == (a == b)
        assert measure("iou", a, a) == measure("giou", a, a) == measure("legacy_iou", a, a) == 1


@pytest.mark.parametrize("edge", [1 - 2**-24, 1 - 2**-53])
@pytest.mark.parametrize("box", [(0, 0, 1, None), (1e-30, 0, 1, 1)])
def test_a_box_one_rounding_step_away_is_not_equal(box, edge):
    whole, other = (0, 0, 1, 1), tuple(edge if value is None else value for value in box)
    for measure in (on_host,) if edge > 1 - 2**-30 else (on_host, on_device):
        assert 0.999999 < measure("iou", whole, other) < 1
        assert 0.999999 < measure("giou", whole, other) < 1


MALFORMED = [
    *((bad, 0.1, 0.6, 0.7) for bad in (math.nan, math.inf, -math.inf, 1e38, -1e308, 1e308)),
    *((0.1, 0.1, 0.6, bad) for bad in (math.nan, math.inf, -math.inf, 1e38, 1e308)),
    (0.6, 0.1, 0.1, 0.7),
    (0.1, 0.7, 0.6, 0.1),
    (0.6, 0.7, 0.1, 0.1),
    (1, 1, 0, 0),
    (9, 9, -9, -9),
    (math.nan,) * 4,
    (-math.inf, -math.inf, math.inf, math.inf),
]


@pytest.mark.parametrize("box", MALFORMED)
def test_a_malformed_box_scores_lowest_with_everything(box):
    for measure, name in itertools.product((on_device, on_host), FLOORS):
        assert measure(name, box, (0.1, 0.1, 0.6, 0.7)) == FLOORS[name]
        assert measure(name, box, (0, 0, 1, 1)) == FLOORS[name]
        assert measure(name, box, box) == FLOORS[name]
    assert not on_device("is_valid", box) and not on_host("is_valid", box)
    assert on_device("area", box) == on_host("area", box) == 0


@pytest.mark.parametrize("box", [(0.3, 0.3, 0.3, 0.3), (0.3, 0.1, 0.3, 0.9), (0.1, 0.5, 0.9, 0.5), (-0.0, 0, 0, 1)])
def test_points_and_lines_are_not_valid_and_overlap_nothing(box):
    for measure in (on_device, on_host):
        assert not measure("is_valid", box)
        assert measure("iou", box, box) == measure("iou", box, (0, 0, 1, 1)) == 0


@pytest.mark.parametrize("scale", [1e-9, 1.0, 200.0, 1e15])
def test_boxes_of_any_size_get_their_honest_overlap(scale):
    a, b = np.array((0.2, 0.2, 0.6, 0.6)) * scale, np.array((0.3, 0.2, 0.7, 0.6)) * scale
    for measure in (on_device, on_host):
        assert measure("is_valid", a)
        assert measure("iou", a, b) == pytest.approx(0.6, abs=1e-6)
        assert measure("giou", a, b) == pytest.approx(0.6, abs=1e-6)


def test_a_box_200_times_the_frame_overlaps_little():
    assert on_device("iou", (-100, -100, 100, 100), (0, 0, 1, 1)) == pytest.approx(1 / 40_000, rel=1e-5)


@settings(deadline=None, max_examples=100)
@given(unit_boxes(), unit_boxes())
def test_the_legacy_formula_never_falls_below_iou(a, b):
    for measure in (on_device, on_host):
        assert measure("legacy_iou", a, b) >= measure("iou", a, b) - 1e-6


@settings(deadline=None, max_examples=100)
@given(*[st.integers(-8, 8)] * 2, *[st.lists(st.integers(0, 64), min_size=4, max_size=4)] * 2)
def test_moving_both_boxes_changes_neither_iou_nor_giou(dx, dy, a, b):
    a, b = (np.array([*np.minimum(box[:2], box[2:]), *np.maximum(box[:2], box[2:])]) / 64 for box in (a, b))
    shift = np.array((dx, dy, dx, dy))
    for measure, name in itertools.product((on_device, on_host), ("iou", "giou")):
        assert measure(name, a + shift, b + shift) == measure(name, a, b)


def test_jit_and_leading_axes_change_nothing():
    random = np.random.default_rng(0)
    a, b = np.sort(random.random((2, 5, 7, 2, 2), np.float32), axis=-2).reshape(2, 5, 7, 4)
    for name in FLOORS:
        whole = np.asarray(jitted[name](a, b))
        assert whole.shape == (5, 7) and whole.dtype == np.float32
        on_host_57 = getattr(boxes, name)(a.astype(np.float64), b.astype(np.float64), np)
        np.testing.assert_allclose(whole, on_host_57, atol=1e-6)
        np.testing.assert_array_equal(whole[2], jitted[name](a[2], b[2]))
    np.testing.assert_allclose(jitted["giou"](a, b), boxes.giou(a, b), atol=1e-6)
    np.testing.assert_array_equal(jitted["iou"](a[0], b[0, 0]), jitted["iou"](a[0], np.tile(b[0, 0], (7, 1))))


def test_bfloat16_boxes_are_measured_in_float32():
    a, b = jnp.array((0.1, 0.1, 0.4, 0.4), jnp.bfloat16), jnp.array((0.2, 0.2, 0.5, 0.5), jnp.bfloat16)
    for name in FLOORS:
        value = jitted[name](a, b)
        assert value.dtype == jnp.float32
        assert value == jitted[name](a.astype(jnp.float32), b.astype(jnp.float32))


def test_area_is_width_times_height():
    assert on_host("area", (0.25, 0.5, 0.75, 0.75)) == on_device("area", (0.25, 0.5, 0.75, 0.75)) == 0.125
