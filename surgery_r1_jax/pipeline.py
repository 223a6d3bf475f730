"""Frames to batches: what is read, what is taught of it, and the streams of training, rollouts and evaluation.

Rows and shapes are planned by `plan`, once and before anything is decoded; `stream` makes the batches. They do not
depend on how many processes share them out: each takes its part of every batch and reads no more.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from PIL import Image

from surgery_r1_jax import answer, augment, batch, errors, examples, location, options, plan, records, vocabulary
from surgery_r1_jax.batch import FrameBatch, Gold, Shape
from surgery_r1_jax.examples import Branch, Encoder
from surgery_r1_jax.plan import Row, Size
from surgery_r1_jax.records import Box, Frame, Record
from surgery_r1_jax.stream import Shard, Stream

LONGER = 8  # tokens by which an answer may grow when its frame is changed; one that grows more is left as it was

# A frame with its resized picture, and both changed in the same way: the frame's size stays as it is.
Change = Callable[[Frame, Image.Image, np.random.Generator], tuple[Frame, Image.Image]]


def read_all(settings: options.Data) -> list[Frame]:
    """The frames of all sources and splits. Raises: InputError for sources with different answers."""
    frames: list[Frame] = []
    for number, source in enumerate(settings.sources):
        found = records.read(source.root, strict=settings.strict, boxes=source.boxes)
        frames += [dataclasses.replace(frame, source=number) for frame in found]
        if found and found[0].classes != frames[0].classes:
            raise errors.InputError(
                f"{source.root}: its answers are not those of {settings.sources[frames[0].source].root} "
                f"({len(found[0].classes)}, {len(frames[0].classes)}); write the same classes into both data.json"
            )
    return frames


def read(settings: options.Data) -> list[Frame]:
    """The frames of the configured split, of all sources."""
    frames = records.split(read_all(settings), settings.split)
    if settings.limit and settings.limit < len(frames):
        frames = [frames[i] for i in np.linspace(0, len(frames) - 1, settings.limit).round().astype(int)]
    return frames


def steps(frames: Sequence[Frame], settings: options.Data, schedule: options.Schedule) -> options.Schedule:
    """The schedule in steps. An epoch is as many rows as all sources have together."""
    if schedule.epochs is None:
        return schedule
    rows = len(plan.plan_rows(frames, settings.questions))
    return schedule.model_copy(
        update={"steps": max(1, round(schedule.epochs * rows / settings.frames)), "epochs": None}
    )


def changing(frames: Sequence[Frame], settings: options.Data) -> Change | None:
    """How frames are changed at random, if the configuration wants it; each source has its own rule of locations."""
    if not settings.augment.on:
        return None
    sources = range(len(settings.sources))
    rules = [location.settled([frame for frame in frames if frame.source == source]) for source in sources]
    return lambda frame, picture, rng: augment.apply(frame, picture, settings.augment, rng, rule=rules[frame.source])


def training(
    frames: Sequence[Frame],
    encoder: Encoder,
    settings: options.Data,
    targets: options.Targets,
    *,
    seed: int,
    shard: Shard = Shard(),
) -> Stream:
    """An endless shuffled stream of training batches, of which this process makes its part.

    How a frame is changed, where the configuration wants it, follows from the seed and the row's place in the stream.
    """
    change = changing(frames, settings)

    def branches(frame: Frame, row: Row) -> list[Branch]:
        return [_branch(frame, encoder, targets, seed, row.frame, index) for index in row.records]

    def size(image: tuple[int, int], made: Sequence[Branch], longer: int = 0) -> Size:
        lengths = tuple(len(branch) + longer for branch in made)
        return Size(*image, lengths, sum(len(branch.completion) + longer for branch in made))

    rows = plan.plan_rows(frames, settings.questions, seed)
    planned = {row: branches(frames[row.frame], row) for row in rows}
    images, room = plan.image_sizes(encoder, frames), LONGER if change else 0
    found = _plan(
        frames, rows, [size(images[row.frame], planned[row], room) for row in rows], plan.PACKED, encoder, settings
    )

    def example(row: Row, shape: Shape, place: int) -> FrameBatch:
        frame, made, picture = frames[row.frame], planned[row], None
        if change:
            changed, seen = change(frame, encoder.picture(frame), np.random.default_rng([seed, place]))
            anew = branches(changed, row)
            if plan.fits(size(plan.image_size(encoder, changed), anew), shape):
                frame, made, picture = changed, anew, seen
        return encoder.training(frame, made, shape, picture)

    return Stream(found, example, settings, seed, shard)


def rollouts(
    frames: Sequence[Frame], encoder: Encoder, settings: options.Data, *, seed: int, shard: Shard = Shard()
) -> Stream:
    """An endless shuffled stream of `(prompts, gold)` batches, of which this process makes its part.

    Where frames are changed, what completions are judged against is changed with them.
    """
    change = changing(frames, settings)
    rows = plan.plan_rows(frames, settings.questions, seed)
    sizes = _prompt_sizes(frames, encoder, rows, LONGER if change else 0)
    found = _plan(frames, rows, sizes, plan.APART, encoder, settings)

    def example(row: Row, shape: Shape, place: int) -> tuple[FrameBatch, Gold]:
        frame, picture = frames[row.frame], None
        if change:
            changed, seen = change(frame, encoder.picture(frame), np.random.default_rng([seed, place]))
            image = plan.image_size(encoder, changed)
            if plan.fits(Size(*image, tuple(_prompt_lengths(changed, row, encoder))), shape):
                frame, picture = changed, seen
        return encoder.prompts(frame, row.frame, row.records, shape, picture)

    return Stream(found, example, settings, seed, shard)


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
    part = shard.part(settings)
    rows = plan.plan_rows(frames, settings.questions)
    shape = plan.shape_of(_prompt_sizes(frames, encoder, rows), plan.APART)
    prompts, _ = encoder.prompts(frames[0], 0, (), shape)
    filler = batch.padding_like(prompts), batch.padding_gold(shape.lanes)

    def make(at: int):
        chosen = rows[at : at + settings.frames][part]
        made = [encoder.prompts(frames[row.frame], row.frame, row.records, shape) for row in chosen]
        return batch.stack(made + [filler] * (part.stop - part.start - len(made)))

    starts = range(0, len(rows), settings.frames)
    reading = grain.ReadOptions(num_threads=settings.threads, prefetch_buffer_size=2 * settings.threads)
    return iter(grain.MapDataset.source(starts).map(make).to_iter_dataset(reading)), len(starts)


def fingerprint(frames: Sequence[Frame], *rest: object, images: Sequence[bytes] | None = None) -> str:
    """A hash of all labels and image bytes: a run is not resumed on other data.

    `rest` is what else decides the batches, such as the plan and the seed; it is hashed as it prints. `images` are
    the `image_hashes`, where they are known.
    """
    digest = hashlib.sha256(repr(rest).encode())
    for frame, image in zip(frames, image_hashes(frames) if images is None else images, strict=True):
        labels = [(record.question, record.answer, record.box, record.think, record.want) for record in frame.records]
        digest.update(json.dumps([frame.id, frame.width, frame.height, frame.classes, labels]).encode())
        digest.update(image)
    return digest.hexdigest()


def image_hashes(frames: Sequence[Frame]) -> Iterator[bytes]:
    """The SHA-256 of every image file."""
    return (hashlib.sha256(frame.image.read_bytes()).digest() for frame in frames)


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


def _prompt_lengths(frame: Frame, row: Row, encoder: Encoder) -> Iterator[int]:
    """Tokens of each question of a row."""
    for record in (frame.records[index] for index in row.records):
        yield len(encoder.prompt(record, examples.wanted(record)))


def _prompt_sizes(frames: Sequence[Frame], encoder: Encoder, rows: Sequence[Row], longer: int = 0) -> list[Size]:
    """The room that the questions of rows take, each with so many tokens more."""
    images = plan.image_sizes(encoder, frames)
    lengths = (_prompt_lengths(frames[row.frame], row, encoder) for row in rows)
    return [
        Size(*images[row.frame], tuple(tokens + longer for tokens in each))
        for row, each in zip(rows, lengths, strict=True)
    ]


def _plan(
    frames: Sequence[Frame],
    rows: Sequence[Row],
    sizes: Sequence[Size],
    layout: plan.Layout,
    encoder: Encoder,
    settings: options.Data,
) -> plan.Plan:
    """The plan of rows with their sizes, source by source. Raises: InputError for a source without any."""
    of_source: list[list[int]] = [[] for _ in settings.sources]
    for i, row in enumerate(rows):
        of_source[frames[row.frame].source].append(i)
    for source, members in zip(settings.sources, of_source, strict=True):
        if not members:
            raise errors.InputError(f"{source.root}: no frames in split {settings.split}; take it out of data.mix")
    return plan.make(
        [[rows[i] for i in members] for members in of_source],
        [[sizes[i] for i in members] for members in of_source],
        layout,
        weights=[source.weight for source in settings.sources],
        frames=settings.frames,
        most=settings.buckets,
        window_tokens=encoder.window_side**2,
    )
