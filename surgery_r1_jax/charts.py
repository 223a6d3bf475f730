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
SPEED = (
    ("Tokens/s", "train", "speed/tokens_per_s", (), False),
    ("Frames/s", "train", "speed/frames_per_s", (), False),
    ("Completions/s", "train", "speed/completions_per_s", (), False),
    ("Seconds a step", "train", "speed/step_s", (), False),
    ("MFU", "train", "speed/mfu", (), False),
    ("Padding of prefixes", "train", "padding/prefix", (), True),
    ("Padding of branches", "train", "padding/branch", (), True),
    ("Device memory, GiB", "train", "memory/used_gib", (), False),
)
# Phases of a run as speed.py names them, from the bottom of the chart, and how they are called on the page.
PHASES = {
    "update": "update",
    "rollout": "rollout",
    "reward": "parsing and rewards",
    "data_wait": "waiting for data",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "compile": "compiling",
    "other": "other",
}


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


class Area(NamedTuple):
    """What one phase takes of the time: its share of the whole, and its band in the chart as a polygon."""

    phase: str
    label: str
    share: float
    outline: Line


class TimeSplit(NamedTuple):
    """Where the time of a run went: bands on top of each other, which together are all of it."""

    areas: list[Area]
    x_ticks: list[Tick]


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


def panels(curve: Sequence[dict], entries: Sequence[tuple] = PANELS) -> list[Panel]:
    """A chart for each of the entries of which the curve has at least two finite values; 0 is always in view."""
    drawn = (_panel(curve, *entry) for entry in entries)
    return [panel for panel in drawn if panel is not None]


def time_split(curve: Sequence[dict], most: int = 60) -> TimeSplit | None:
    """The shares of the phases over the steps; None for a curve that does not tell them.

    A line of the log stands for the steps since the line before. Where there are more than `most`, neighbours are
    joined, by the time that each took.
    """
    rows = [row for row in curve if any(finite(row.get(f"time/{phase}")) is not None for phase in PHASES)]
    rows = [row for row in rows if (finite(row.get("step")) or 0) > 0 and finite(row.get("elapsed_s")) is not None]
    if not rows:
        return None
    ends_N, until_N = (np.array([finite(row[key]) for row in rows]) for key in ("step", "elapsed_s"))
    seconds_N = np.maximum(np.diff(until_N, prepend=0.0), 1e-9)
    spent_NX = np.array([[finite(row.get(f"time/{phase}")) or 0.0 for phase in PHASES] for row in rows])
    spent_NX *= (seconds_N / np.maximum(spent_NX.sum(1), 1e-9))[:, None]
    first_N = np.arange(0, len(rows), math.ceil(len(rows) / most))  # of the lines that are joined
    joined_NX = np.add.reduceat(spent_NX, first_N)
    edges = np.append(0.0, ends_N[np.append(first_N[1:], len(rows)) - 1]) / ends_N[-1]
    top_NX = 1 - np.cumsum(joined_NX / joined_NX.sum(1, keepdims=True), axis=1)
    low_NX = np.hstack([np.ones((len(top_NX), 1)), top_NX[:, :-1]])

    def line(height_N: np.ndarray) -> Line:
        """From left to right, level between two edges."""
        return list(zip(np.repeat(edges, 2)[1:-1].tolist(), np.repeat(height_N, 2).tolist(), strict=True))

    shares = spent_NX.sum(0) / spent_NX.sum()
    areas = [
        Area(phase, label, float(shares[x]), line(top_NX[:, x]) + line(low_NX[:, x])[::-1])
        for x, (phase, label) in enumerate(PHASES.items())
        if shares[x] > 0
    ]
    return TimeSplit(areas, [Tick(x / ends_N[-1], f"{x:g}") for x in _round_numbers(0.0, ends_N[-1])])


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
