"""The geometry of the report's small charts: what stands where, in [0,1] of the plotting area, y downwards."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np

Line = list[tuple[float, float]]

# label, split and key in metrics.jsonl, keys of a band around it, whether the scale is at least 0 to 1
PANELS = (
    ("Loss", "train", "loss", (), False),
    ("Joint rate on dev", "dev", "joint_rate", (), True),
    ("Accuracy on dev", "dev", "accuracy", (), True),
    ("mIoU on dev", "dev", "miou", (), True),
    ("Reward", "train", "reward", (), False),
    ("Format reward", "train", "rewards/format/mean", (), True),
    ("Accuracy reward", "train", "rewards/accuracy/mean", (), True),
    ("IoU reward", "train", "rewards/iou/mean", (), True),
    ("Coherence reward", "train", "rewards/coherence/mean", (), True),
    ("KL to reference", "train", "kl", (), False),
    ("Entropy", "train", "entropy", (), False),
    (
        "Completion length",
        "train",
        "completions/mean_length",
        ("completions/min_length", "completions/max_length"),
        False,
    ),
    ("Groups without a signal", "train", "frac_reward_zero_std", (), True),
    ("Gradient norm", "train", "grad_norm", (), False),
)


class Tick(NamedTuple):
    """A labelled place on an axis."""

    at: float
    text: str


class Panel(NamedTuple):
    """One metric over the training steps: every value, their running mean and, where there is one, a band."""

    label: str
    raw: Line
    smooth: Line
    band: Line
    first: float
    last: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    dropped: int  # values that are not finite


class Histogram(NamedTuple):
    """How the IoU of a stage's predictions is spread; those without a readable box stand apart."""

    stage: str
    counts: list[int]  # per bin of equal width over [0,1]
    boxless: int
    total: int
    median: float | None  # of those with a box

    @property
    def peak(self) -> float:
        """The highest bar, as a share of all predictions."""
        return max(self.counts) / self.total


def finite(value: object) -> float | None:
    """The value as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond every float
        return None
    return number if math.isfinite(number) else None


def histogram(stage: str, predictions: Sequence[dict], bins: int = 20) -> Histogram:
    """The histogram of the predictions' `iou`."""
    boxed = [finite(row["iou"]) or 0.0 for row in predictions if row["pred_box"] is not None]
    counts = Counter(min(bins - 1, int(iou * bins)) for iou in boxed)
    return Histogram(
        stage,
        [counts[index] for index in range(bins)],
        len(predictions) - len(boxed),
        len(predictions),
        median(boxed) if boxed else None,
    )


def panels(curve: Sequence[dict]) -> list[Panel]:
    """A chart for each entry of `PANELS` of which the curve has at least two finite values; 0 is always in view."""
    drawn = (_panel(curve, *entry) for entry in PANELS)
    return [panel for panel in drawn if panel is not None]


def _panel(curve: Sequence[dict], label: str, split: str, key: str, band: tuple[str, ...], unit: bool) -> Panel | None:
    rows = [row for row in curve if key in row and row.get("split", "train") == split]
    points = _points(rows, key)
    if len(points) < 2:
        return None
    smooth, edges = _smooth(points), [_points(rows, edge) for edge in band]
    values = [value for line in (points, *edges) for _, value in line]
    left, right = points[0][0], points[-1][0]
    bottom, top = min(0.0, *values), max(1.0 if unit else 0.0, *values)
    width, height = (right - left) or 1.0, (top - bottom) or 1.0

    def placed(line: Line) -> Line:
        return [((x - left) / width, (top - y) / height) for x, y in _thinned(line)]

    return Panel(
        label,
        placed(points),
        placed(smooth),
        placed(edges[0]) + placed(edges[1])[::-1] if edges and all(edges) else [],
        smooth[0][1],
        smooth[-1][1],
        [Tick((x - left) / width, f"{x:g}") for x in _round_numbers(left, right)],
        [Tick((top - y) / height, f"{y:g}") for y in _round_numbers(bottom, top)],
        len(rows) - len(points),
    )


def _points(rows: Iterable[dict], key: str) -> Line:
    """(step, value) where both are finite numbers, in the order of the steps."""
    pairs = ((finite(row.get("step")), finite(row.get(key))) for row in rows)
    return sorted(pair for pair in pairs if None not in pair)


def _smooth(points: Line) -> Line:
    """The mean over a centred window of a tenth of the points, which lags behind nothing."""
    window = np.ones(1 + 2 * (len(points) // 20))
    x_N, y_N = np.transpose(points)
    mean_N = np.convolve(y_N, window, "same") / np.convolve(np.ones_like(y_N), window, "same")
    return list(zip(x_N.tolist(), mean_N.tolist(), strict=True))


def _thinned(points: Line, most: int = 300) -> Line:
    """At most `most` points: of every stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return points
    stretch = math.ceil(2 * len(points) / most)
    parts = (points[start : start + stretch] for start in range(0, len(points), stretch))
    extremes = ({min(part, key=_y), max(part, key=_y)} for part in parts)
    return [point for pair in extremes for point in sorted(pair)]


def _y(point: tuple[float, float]) -> float:
    return point[1]


def _round_numbers(low: float, high: float, most: int = 4) -> list[float]:
    """At most `most` + 1 numbers of the range, 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low or 1.0) / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if high - low <= power * factor * most)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
