"""Which rows there are, and the few shapes that hold them all: planned once, from token counts alone.

A row is a frame with some of its questions. Rows that take about as much room share a bucket, a bucket has one
shape, and every batch holds rows of one bucket: so a program compiles once a bucket, and little of it is padding.
"""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from surgery_r1_jax import examples, grid
from surgery_r1_jax.batch import Shape
from surgery_r1_jax.examples import Encoder
from surgery_r1_jax.records import Frame

LEAST_BATCHES = 4  # in a bucket
LITTLE = 0.002  # of all tokens, padding and images with them: what a split has to save at least
REACH = 4096  # a token that looks at so many others costs about twice as much as one that looks at none


class Row(NamedTuple):
    """A frame and the questions asked of it together."""

    frame: int
    records: tuple[int, ...]


class Size(NamedTuple):
    """The room that a row takes."""

    windows: int
    prefix: int  # tokens
    branches: tuple[int, ...]  # tokens of each
    scored: int = 0  # of them


class Bucket(NamedTuple):
    """Rows that share a shape."""

    shape: Shape
    rows: tuple[tuple[Row, ...], ...]  # of each source, without padding
    turns: tuple[int, ...]  # of each source: rows drawn of it, relative to what is drawn of all buckets
    prefix_tokens: float  # of a row in the mean, without padding
    branch_tokens: float


class Plan(NamedTuple):
    """All that decides, with the seed, which rows a batch has and how they lie in it."""

    frames: int  # rows of a batch
    buckets: tuple[Bucket, ...]

    @property
    def rows(self) -> int:
        """Rows of all sources together: an epoch."""
        return sum(len(rows) for bucket in self.buckets for rows in bucket.rows)

    @property
    def largest(self) -> int:
        """Number of the bucket whose rows take the most room."""
        taken = [b.shape.prefix + b.shape.lanes * b.shape.lane_tokens for b in self.buckets]
        return taken.index(max(taken))

    @property
    def padding(self) -> dict[str, float]:
        """Shares of all prefix and of all branch slots that hold nothing, in the long run."""
        turns = [sum(bucket.turns) for bucket in self.buckets]
        return _padding(self.buckets, turns)

    def lines(self) -> Iterator[str]:
        """The plan for people: a line for each bucket and one for all."""
        shares = [sum(bucket.turns) for bucket in self.buckets]
        for bucket, share in zip(self.buckets, shares, strict=True):
            shape, padding = bucket.shape, _padding([bucket], [1])
            yield (
                f"shape of {share / sum(shares):6.1%} of the batches: {shape.windows} windows, prefix "
                f"{shape.prefix}, lanes {shape.lanes} x {shape.lane_tokens}; {_told(padding)}"
            )
        yield f"{len(self.buckets)} shapes, {self.rows} rows; {_told(self.padding)}"


class Layout(NamedTuple):
    """How the branches of a row lie in the lanes of a batch."""

    lanes: Callable[[Sequence[Sequence[int]]], tuple[int, int]]  # lanes and their length that hold all these rows
    reach: Callable[[Sequence[int]], tuple[int, int]]  # two numbers of a row; largest times largest is about as much


def plan_rows(frames: Sequence[Frame], questions: int, seed: int | None = None) -> list[Row]:
    """Share each frame's records out over as few rows as possible, of nearly equal size; seeded order if asked."""
    rows = []
    for number, frame in enumerate(frames):
        order = np.arange(len(frame.records))
        if seed is not None:
            order = np.random.default_rng([seed, number]).permutation(order)
        count = -(-len(order) // questions)
        rows += [Row(number, tuple(int(i) for i in part)) for part in np.array_split(order, count) if part.size]
    return rows


def round_up(n: int, multiple: int) -> int:
    """The next multiple, at least one."""
    return max(1, -(-n // multiple)) * multiple


def image_size(encoder: Encoder, frame: Frame) -> tuple[int, int]:
    """Windows and prefix tokens of a frame."""
    patches = encoder.patch_grid(frame)
    windows = grid.count_windows([patches], encoder.window_side, encoder.preprocessor.merge_size)
    return windows, len(encoder.prefix_ids([patches]))


def image_sizes(encoder: Encoder, frames: Sequence[Frame]) -> list[tuple[int, int]]:
    """`image_size` of every frame; those of equal pictures are worked out once."""
    known = {(frame.width, frame.height): frame for frame in frames}
    sizes = {sides: image_size(encoder, frame) for sides, frame in known.items()}
    return [sizes[frame.width, frame.height] for frame in frames]


def plan_lanes(lengths: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Number and length of lanes that hold the branches of every row at the least cost.

    Longer lanes pack tighter, but every branch looks past its neighbours.
    """
    longest, most = max(map(max, lengths)), max(map(sum, lengths))
    candidates = sorted({round_up(int(n), 8) for n in np.linspace(longest, most, 16)})
    plans = [(max(len(examples.pack(row, room)) for row in lengths), room) for room in candidates]
    return min(plans, key=lambda plan: (plan[0] * plan[1] * (REACH + plan[1]), plan[1]))


def one_a_lane(lengths: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Number and length of lanes that hold every row with each branch in a lane of its own."""
    return max(map(len, lengths)), round_up(max(map(max, lengths)), 8)


PACKED = Layout(plan_lanes, lambda lengths: (sum(lengths), 1))
APART = Layout(one_a_lane, lambda lengths: (len(lengths), max(lengths)))


def shape_of(sizes: Sequence[Size], layout: Layout) -> Shape:
    """The shape that holds all these rows."""
    lanes, lane_tokens = layout.lanes([size.branches for size in sizes])
    scored = max(size.scored for size in sizes)
    return Shape(
        windows=max(size.windows for size in sizes),
        prefix=round_up(max(size.prefix for size in sizes), 8),
        lanes=lanes,
        lane_tokens=lane_tokens,
        scored=round_up(scored, 8) if scored else 0,
    )


def fits(size: Size, shape: Shape) -> bool:
    """Whether a row of packed branches goes into a shape."""
    return (
        size.windows <= shape.windows
        and size.prefix <= shape.prefix
        and size.scored <= shape.scored
        and max(size.branches) <= shape.lane_tokens
        and len(examples.pack(size.branches, shape.lane_tokens)) <= shape.lanes
    )


def make(
    rows: Sequence[Sequence[Row]],
    sizes: Sequence[Sequence[Size]],
    layout: Layout,
    *,
    weights: Sequence[float],
    frames: int,
    most: int,
    window_tokens: int,
) -> Plan:
    """At most `most` buckets for the rows of some sources, which are drawn in proportion to their weights.

    All buckets but one hold whole batches of `frames` rows, so that an epoch of them ends where it should.
    `window_tokens` are the merged units of a window.
    """
    source = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    flat, room = [row for part in rows for row in part], [size for part in sizes for size in part]
    share = [Fraction(weight) / len(part) for weight, part in zip(weights, rows, strict=True)]  # of a row
    extents = np.array([(s.windows * window_tokens, s.prefix, *layout.reach(s.branches)) for s in room], float)
    weight = np.array([float(share[s]) for s in source])
    scale = np.lcm.reduce([s.denominator for s in share], dtype=object)
    buckets = []
    for members in group(extents, weight, frames=frames, most=most):
        parts = [[int(i) for i in members if source[i] == s] for s in range(len(rows))]
        mean = lambda tokens, w=weight[members]: float(np.average(tokens, weights=w))  # noqa: E731
        buckets.append(
            Bucket(
                shape_of([room[i] for i in members], layout),
                tuple(tuple(flat[i] for i in part) for part in parts),
                tuple(int(share[s] * scale) * len(part) for s, part in enumerate(parts)),
                mean([room[i].prefix for i in members]),
                mean([sum(room[i].branches) for i in members]),
            )
        )
    return Plan(frames, tuple(buckets))


def group(extents: np.ndarray, weight: np.ndarray, *, frames: int, most: int) -> list[np.ndarray]:
    """Indices of the rows of each bucket, grown like a decision tree: ever the split that saves the most tokens.

    `extents` [N, 4] are image tokens, prefix tokens and two numbers whose product is about the branches' tokens;
    `weight` [N] says how often each row comes.
    """
    parts = [np.arange(len(extents))]
    splits = [_split(parts[0], extents, weight, frames)]
    enough = LITTLE * weight.sum() * _tokens(extents.max(0))
    while len(parts) < most:
        at = max(range(len(parts)), key=lambda i: splits[i][0])
        saved, below, above = splits[at]
        if saved <= enough:
            break
        parts[at : at + 1] = below, above
        splits[at : at + 1] = (_split(part, extents, weight, frames) for part in (below, above))
    return [np.sort(part) for part in parts]


def _tokens(extents: np.ndarray) -> np.ndarray:
    """Slots that a row of these extents takes: the image's in the tower and in the prefix, and the branches'."""
    return extents[..., 0] + extents[..., 1] + extents[..., 2] * extents[..., 3]


def _split(part: np.ndarray, extents: np.ndarray, weight: np.ndarray, frames: int):
    """The most weighted tokens that cutting a bucket in two can save, and the two parts.

    A cut lies at a whole batch, and leaves a few batches on either side.
    """
    best = (0.0, part, part[:0])
    least = LEAST_BATCHES * frames
    cuts = np.arange(least, len(part) - least + 1, frames)
    if not cuts.size:
        return best
    whole = weight[part].sum() * _tokens(extents[part].max(0))
    for axis in range(extents.shape[1]):
        order = part[np.argsort(extents[part, axis], kind="stable")]
        below = np.maximum.accumulate(extents[order])[cuts - 1]
        above = np.maximum.accumulate(extents[order[::-1]])[::-1][cuts]
        weight_below = np.cumsum(weight[order])[cuts - 1]
        cost = weight_below * _tokens(below) + (weight[part].sum() - weight_below) * _tokens(above)
        at = int(cost.argmin())
        if whole - cost[at] > best[0]:
            best = (float(whole - cost[at]), order[: cuts[at]], order[cuts[at] :])
    return best


def _padding(buckets: Sequence[Bucket], turns: Sequence[int]) -> dict[str, float]:
    """Empty shares of these buckets' prefix and branch slots, each as often as it has turns."""
    mean = lambda values: sum(value * turn for value, turn in zip(values, turns, strict=True)) / sum(turns)  # noqa: E731
    prefix = mean([b.prefix_tokens for b in buckets]) / mean([b.shape.prefix for b in buckets])
    slots = mean([b.shape.lanes * b.shape.lane_tokens for b in buckets])
    return {"prefix_padding": 1 - prefix, "branch_padding": 1 - mean([b.branch_tokens for b in buckets]) / slots}


def _told(padding: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in padding.items())
