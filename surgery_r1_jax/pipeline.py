"""Grain pipelines: frames on disk to batches, deterministic, sharded by process, restorable at any step.

A row is a frame with some of its questions. Rows and all extents are planned once, from token counts, before
anything is decoded; after that every batch has the same shape, so every program compiles once. The stream of
batches does not depend on how many processes share it out: each takes its part of every batch and reads no more.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from surgery_r1_jax import answer, batch, errors, examples, grid, options, records, vocabulary
from surgery_r1_jax.batch import FrameBatch, Gold, Shape
from surgery_r1_jax.examples import Branch, Encoder
from surgery_r1_jax.records import Box, Frame, Record

LONGEST_LANE = 3  # in longest branches


class Row(NamedTuple):
    """A frame and the questions asked of it together."""

    frame: int
    records: tuple[int, ...]


class Shard(NamedTuple):
    """Which of how many equal parts of every batch this process reads."""

    index: int = 0
    count: int = 1


def read(settings: options.Data) -> list[Frame]:
    """The frames of the configured split."""
    frames = records.split(records.read(settings.root, strict=settings.strict, boxes=settings.boxes), settings.split)
    if settings.limit and settings.limit < len(frames):
        frames = [frames[i] for i in np.linspace(0, len(frames) - 1, settings.limit).round().astype(int)]
    return frames


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


def plan_prefix(encoder: Encoder, frames: Sequence[Frame]) -> tuple[int, int]:
    """Windows and prefix tokens that hold every frame of the set."""
    grids = {encoder.patch_grid(frame) for frame in frames}
    merge = encoder.preprocessor.merge_size
    windows = max(grid.count_windows([g], encoder.window_side, merge) for g in grids)
    return windows, round_up(max(len(encoder.prefix_ids([g])) for g in grids), 8)


def plan_lanes(lengths: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Number and length of lanes that hold the branches of every row with the fewest slots.

    Longer lanes pack tighter but make every branch look past its neighbours; at most LONGEST_LANE branches' worth.
    """
    longest = max(map(max, lengths))
    most = min(max(map(sum, lengths)), LONGEST_LANE * longest)
    candidates = sorted({round_up(int(n), 8) for n in np.linspace(longest, max(longest, most), 16)})
    plans = [(max(len(examples.pack(row, room)) for row in lengths), room) for room in candidates]
    return min(plans, key=lambda plan: (plan[0] * plan[1], plan[1]))


def training(
    frames: Sequence[Frame],
    encoder: Encoder,
    settings: options.Data,
    targets: options.Targets,
    *,
    seed: int,
    shard: Shard = Shard(),
) -> tuple[grain.IterDataset, Shape]:
    """An endless shuffled stream of training batches (this process's frames of each) and their shape."""
    rows = plan_rows(frames, settings.questions, seed)
    branches = {
        row: [_branch(frames[row.frame], encoder, targets, seed, row.frame, index) for index in row.records]
        for row in rows
    }
    windows, prefix = plan_prefix(encoder, frames)
    lanes, lane_tokens = plan_lanes([[len(b) for b in group] for group in branches.values()])
    shape = Shape(
        windows=windows,
        prefix=prefix,
        lanes=lanes,
        lane_tokens=lane_tokens,
        scored=round_up(max(sum(len(b.completion) for b in group) for group in branches.values()), 8),
    )

    def example(row: Row) -> FrameBatch:
        return encoder.training(frames[row.frame], branches[row], shape)

    return _stream(rows, example, settings, seed, shard), shape


def rollouts(
    frames: Sequence[Frame], encoder: Encoder, settings: options.Data, *, seed: int, shard: Shard = Shard()
) -> tuple[grain.IterDataset, Shape]:
    """An endless shuffled stream of `(prompts, gold)` batches and their shape."""
    rows = plan_rows(frames, settings.questions, seed)
    shape = prompt_shape(frames, encoder, rows)
    return _stream(rows, _asking(frames, encoder, shape), settings, seed, shard), shape


def once(
    frames: Sequence[Frame], encoder: Encoder, settings: options.Data, shard: Shard = Shard()
) -> tuple[Iterator[tuple[FrameBatch, Gold]], int]:
    """Every question of every frame exactly once, in order, the last batch padded; and the number of batches.

    Answer and box are asked for whatever the records want, because they are judged together.
    """
    frames = [
        dataclasses.replace(frame, records=tuple(dataclasses.replace(record, want=None) for record in frame.records))
        for frame in frames
    ]
    rows = plan_rows(frames, settings.questions)
    shape = prompt_shape(frames, encoder, rows)
    batches = [rows[at : at + settings.frames] for at in range(0, len(rows), settings.frames)]
    prompts, _ = encoder.prompts(frames[0], 0, (), shape)
    filler = batch.padding_like(prompts), batch.padding_gold(shape.lanes)
    source = grain.MapDataset.source(batches)
    stream = _batches(source, _asking(frames, encoder, shape), settings, shard, filler)
    return iter(stream), len(batches)


def prompt_shape(frames: Sequence[Frame], encoder: Encoder, rows: Sequence[Row]) -> Shape:
    """The shape that holds all questions of these rows, one a lane."""
    windows, prefix = plan_prefix(encoder, frames)
    longest = max(len(encoder.prompt(record, examples.wanted(record))) for frame in frames for record in frame.records)
    lanes = max(len(row.records) for row in rows)
    return Shape(windows=windows, prefix=prefix, lanes=lanes, lane_tokens=round_up(longest, 8), scored=0)


def fingerprint(frames: Sequence[Frame], *plan: object) -> str:
    """A hash of all labels and image bytes: a run is not resumed on other data.

    `plan` is what else decides the order, such as the configuration and the seed; it is hashed as it prints.
    """
    digest = hashlib.sha256(repr(plan).encode())
    for frame in frames:
        labels = [(record.question, record.answer, record.box, record.think, record.want) for record in frame.records]
        digest.update(json.dumps([frame.id, frame.width, frame.height, frame.classes, labels]).encode())
        digest.update(hashlib.sha256(Path(frame.image).read_bytes()).digest())
    return digest.hexdigest()


def coarse(box: Box, slack: float, rng: np.random.Generator) -> Box:
    """A box whose sides are pushed outwards by up to `slack` of its size, inside the frame."""
    x0, y0, x1, y1 = box
    w, h = x1 - x0, y1 - y0
    a, b, c, d = rng.uniform(0, slack, 4)
    return max(0.0, x0 - a * w), max(0.0, y0 - b * h), min(1.0, x1 + c * w), min(1.0, y1 + d * h)


def _branch(frame: Frame, encoder: Encoder, targets: options.Targets, seed: int, number: int, index: int) -> Branch:
    record = frame.records[index]
    # One coarse box for an instrument, whichever of its questions is asked.
    name = (_instrument(record) or "").encode()
    box = coarse(record.box, targets.box_slack, np.random.default_rng([seed, number, *name]))
    if record.want is not None:
        return encoder.branch(frame, record, box=box, think=True, want=record.want)
    random = np.random.default_rng([seed, number, index])
    think = random.random() < targets.reasoning
    alone = (targets.answer_only, targets.box_only)
    want = random.choice(len(answer.WANT), p=(*alone, 1 - sum(alone)))
    return encoder.branch(frame, record, box=box, think=bool(think), want=int(want))


def _instrument(record: Record) -> str | None:
    return record.answer if record.kind == vocabulary.TOOL else record.tool


def _asking(frames: Sequence[Frame], encoder: Encoder, shape: Shape) -> Callable[[Row], tuple[FrameBatch, Gold]]:
    return lambda row: encoder.prompts(frames[row.frame], row.frame, row.records, shape)


def _stream(rows: list[Row], example: Callable, settings: options.Data, seed: int, shard: Shard) -> grain.IterDataset:
    """Batches without end: every epoch has every row once, in an order of its own; a batch may lie in two epochs."""
    if len(rows) < settings.frames:
        raise errors.InputError(
            f"{settings.root}: {len(rows)} rows of frames do not fill a batch of {settings.frames}; lower data.frames"
        )
    # Without a number Grain repeats for so long that it cannot count batches of one frame.
    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(2**52 // len(rows))
    stream = _batches(order.batch(settings.frames, batch_fn=list), example, settings, shard)
    if settings.workers:
        from absl import flags

        flags.FLAGS.mark_as_parsed()  # else the workers stop at unparsed flags
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=settings.workers))
    return stream


def _batches(
    lists: grain.MapDataset, example: Callable, settings: options.Data, shard: Shard, filler: tuple = ()
) -> grain.IterDataset:
    """Lists of rows to this process's part of the batches that they make, filled up to the same size."""
    if settings.frames % shard.count:
        raise errors.InputError(
            f"data.frames {settings.frames} cannot be shared out over {shard.count} processes; take a multiple of them"
        )
    local = settings.frames // shard.count

    def make(rows: list[Row]):
        made = [example(row) for row in rows[shard.index * local :][:local]]
        return batch.stack(made + [filler] * (local - len(made)))

    options = grain.ReadOptions(num_threads=settings.threads, prefetch_buffer_size=2 * settings.threads)
    return lists.map(make).to_iter_dataset(options)
