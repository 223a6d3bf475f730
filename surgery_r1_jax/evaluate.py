"""Evaluation: greedy answers to every question of a split, each counted once, and what they are worth.

Decoding is one jitted program of one shape; scoring is a pure function of the predictions file, so that every
figure can be worked out again from it.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from surgery_r1_jax import (
    backends,
    checkpoint,
    errors,
    examples,
    files,
    floors,
    grade,
    hf,
    images,
    metrics,
    model,
    options,
    pipeline,
    places,
    plan,
    records,
    sampling,
    sharding,
    stream,
    vocabulary,
)
from surgery_r1_jax.records import Box, Frame, Record


class Runner(NamedTuple):
    """A model's graph with what is needed to ask it questions."""

    graph: nnx.GraphDef
    mesh: jax.sharding.Mesh
    encoder: examples.Encoder
    vocabulary: sampling.Vocabulary
    shard: stream.Shard


def runner_of(
    folder: Path,
    settings: model.Config,
    mesh: jax.sharding.Mesh,
    compute: options.Compute = options.Compute(),
    graph: nnx.GraphDef | None = None,
    classes: tuple[str, ...] | None = None,
    pictures: images.Kept | None = None,
) -> Runner:
    """Everything but the parameters; a model with adapters brings its own graph."""
    encoder = hf.encoder_of(folder, settings, classes)
    if pictures is not None:
        encoder = dataclasses.replace(encoder, pictures=pictures)
    graph = graph or model.build(settings, compute, backends.choose(compute, mesh))[0]
    allowed = encoder.chat.allowed(settings.text.vocab_size)
    words = sampling.Vocabulary(
        jax.device_put(allowed, sharding.replicated(mesh)), encoder.chat.stop_id, encoder.chat.pad_id
    )
    return Runner(graph, mesh, encoder, words, stream.Shard(jax.process_index(), jax.process_count()))


class Given(NamedTuple):
    """What was given for a question."""

    answer: str | None
    box: Box | None
    text: str = ""
    reason: str = ""  # name of an answer.Reason


def predict(
    runner: Runner,
    params: dict,
    frames: Sequence[Frame],
    settings: options.Data,
    max_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict]:
    """Answer every question greedily; one dict a question, in the order of the frames, on every process.

    Keys: frame, question, answer, box, pred_answer, pred_box, iou, text, reason. Boxes are unit xyxy, what could not
    be read is None. The batch is rounded up to what the mesh divides; `progress` is told (batches done, batches).
    """
    devices = sharding.frame_devices(runner.mesh)
    settings = settings.model_copy(update={"frames": plan.round_up(settings.frames, devices)})
    batches, count = pipeline.once(frames, runner.encoder, settings, runner.shard)
    greedy = options.Sampler(max_tokens=max_tokens, temperature=0.0)
    progress = progress or (lambda done, count: None)
    progress(0, count)
    found: dict[tuple[int, int], Given] = {}
    for done, (prompts, gold) in enumerate(batches, start=1):
        out = decode(runner.graph, params, sharding.put_batch(prompts, runner.mesh), runner.vocabulary, greedy)
        graded = grade.grade(*sharding.local_rows((out.tokens_BJT, out.stopped_BJ)), gold, runner.encoder)
        for b, q in zip(*np.nonzero(gold.valid_BQ), strict=True):
            parsed, size = graded.parsed[b][q], gold.resized_B2[b].tolist()
            found[int(gold.frame_B[b]), int(gold.record_BQ[b, q])] = Given(
                answer=None if parsed.answer < 0 else runner.encoder.classes[parsed.answer],
                box=None if parsed.box is None else runner.encoder.codec.decode(parsed.box, *size),
                text=graded.texts[b][q],
                reason=parsed.reason.name,
            )
        progress(done, count)
    if runner.shard.count > 1:
        found = _gather(found)
    return _rows(
        (frames[number], frames[number].records[index], found[number, index]) for number, index in sorted(found)
    )


def predict_blank(
    runner: Runner, params: dict, frames: Sequence[Frame], settings: options.Data, max_tokens: int
) -> list[dict]:
    """What `predict` would give if every frame were grey. Frames of a size are alike then: each asks every question
    that any of them asks, once.
    """
    asked: dict[tuple[int, int], dict[str, Record]] = {}
    for frame in frames:
        asked.setdefault((frame.width, frame.height), {}).update({r.question: r for r in frame.records})
    grey = [
        Frame(f"{width}x{height}", "grey", Path(), width, height, tuple(of_question.values()))
        for (width, height), of_question in asked.items()
    ]
    unseeing = runner._replace(encoder=dataclasses.replace(runner.encoder, blank=True))
    found = {
        (row["frame"], row["question"]): Given(row["pred_answer"], row["pred_box"], row["text"], row["reason"])
        for row in predict(unseeing, params, grey, settings, max_tokens)
    }
    return _rows(
        (frame, record, found[f"{frame.width}x{frame.height}", record.question])
        for frame in frames
        for record in frame.records
    )


@functools.partial(jax.jit, static_argnums=(0, 4))
def greedily(graph, params, prompts, allowed_V, fixed):
    """`decode` with what is fixed of it apart: sampler, stop token and padding."""
    sampling_config, stop_id, pad_id = fixed
    net = model.bind(graph, params)
    words = sampling.Vocabulary(allowed_V, stop_id, pad_id)
    frames = jnp.zeros(prompts.prefix_ids_BP.shape[0], jnp.int32)  # greedy decoding draws nothing
    return sampling.rollout(net, prompts, jax.random.key(0), frames, words, sampling_config)


def decode(graph, params, prompts, words: sampling.Vocabulary, settings: options.Sampler) -> sampling.Rollout:
    """Greedy completions of a batch of prompts; compiled once a shape."""
    return greedily(graph, params, prompts, words.allowed_V, (settings, words.stop_id, words.pad_id))


def score(predictions: Sequence[dict], classes: Sequence[str] = vocabulary.CLASSES) -> dict:
    """The metrics of predictions: `metrics.table`, and location accuracy in frames with several instruments if any."""
    outcomes = metrics.of_rows(predictions, classes)
    tools: dict[str, set] = {}
    for row in predictions:
        kind, tool = vocabulary.question_kind(row["question"])
        if kind in (vocabulary.STATE, vocabulary.LOCATION):
            tools.setdefault(row["frame"], set()).add(tool)
    several = np.array([len(tools.get(row["frame"], ())) > 1 for row in predictions], bool)
    located = metrics.summarise(outcomes, several & (outcomes.kind == vocabulary.LOCATION))
    more = {"accuracy_location_multi_tool": located["accuracy"]} if located["n"] else {}
    return metrics.known(metrics.table(outcomes), classes) | more


def floor_metrics(train: Sequence[Frame], frames: Sequence[Frame]) -> dict:
    """What the question alone is worth: its usual answer and its median box in the training split."""
    guesses = floors.question_only(train, frames)
    asked = ((frame, record) for frame in frames for record in frame.records)
    rows = _rows((*question, Given(*guess)) for question, guess in zip(asked, guesses, strict=True))
    return score(rows, frames[0].classes)


def write_predictions(path: Path, predictions: Sequence[dict]) -> None:
    """One JSON line a question."""
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in predictions))


def run(
    checkpoint_dir: str | Path,
    data: str | Path,
    split: str,
    out: str | Path,
    *,
    frames: int = 16,
    max_tokens: int = 256,
    dtype: str = "float32",
    blank: bool = True,
    strict: bool = False,
    boxes: str | None = None,
) -> int:
    """Evaluate a checkpoint on a split: FILE.json with metrics, intervals and floors, FILE.predictions.jsonl.

    `frames` is the batch, `dtype` the precision of computing; `blank` adds the grey image to the floors; `boxes` is
    what those of a table of records are written in, where the data set does not say.
    """
    from rich.console import Console
    from rich.progress import Progress

    out = places.reached(out)
    out = out.with_suffix("") if out.suffix == ".json" else out
    targets = [out.with_name(out.name + end) for end in (".json", ".predictions.jsonl")]
    for file in targets:  # before the work, not after it
        if file.is_dir():
            raise errors.InputError(f"{file}: is a folder; name another file")
        file.parent.mkdir(parents=True, exist_ok=True)
    every = records.read(data, strict=strict, boxes=boxes)
    chosen, train = records.split(every, split), [f for f in every if records.split_of_frame(f) == "train"]
    classes = chosen[0].classes
    mesh = sharding.make_mesh()
    loaded = checkpoint.load_model(checkpoint_dir, mesh)
    runner = runner_of(loaded.folder, loaded.config, mesh, options.Compute(dtype=dtype), classes=classes)
    asking = loaded.params, chosen, options.Data(root=str(data), split=split, frames=frames, questions=9), max_tokens
    main = jax.process_index() == 0
    with Progress(console=Console(stderr=True), disable=not main) as bar:
        task = bar.add_task(f"answering {split}", total=None)
        predictions = predict(runner, *asking, lambda done, count: bar.update(task, completed=done, total=count))
    scores, beside = score(predictions, classes), {}
    if blank:
        beside["blank_image"] = score(predict_blank(runner, *asking), classes)
    if train:
        beside["question_only"] = floor_metrics(train, chosen)
    if main:
        about = dict(checkpoint=str(checkpoint_dir), data=str(data), split=split, max_tokens=max_tokens, dtype=dtype)
        about |= dict(classes=classes) | (dict(boxes=boxes) if boxes else {})
        intervals = metrics.known(metrics.intervals(metrics.of_rows(predictions, classes)), classes)
        files.write_json(targets[0], about | scores | {"intervals": intervals, "floors": beside})
        write_predictions(targets[1], predictions)
        print_scores({"model": scores} | beside, title=f"{split}: {scores['n']} questions")
    return 0


def print_scores(columns: dict[str, dict], title: str) -> None:
    """A table of metrics, one column a model or floor."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("metric", no_wrap=True), title=title, title_justify="left")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    first = next(iter(columns.values()))
    for key, value in first.items():
        if isinstance(value, float):
            cells = (columns[name].get(key) for name in columns)
            table.add_row(key, *("-" if cell is None else f"{cell:.3f}" for cell in cells))
    Console().print(table)


def _rows(given: Iterable[tuple[Frame, Record, Given]]) -> list[dict]:
    """Prediction rows: a question, its gold, and what was given for it."""
    rows = [
        dict(
            frame=frame.id,
            question=record.question,
            answer=record.answer,
            box=list(record.box),
            pred_answer=found.answer,
            pred_box=None if found.box is None else list(found.box),
            iou=0.0,
            text=found.text,
            reason=found.reason,
        )
        for frame, record, found in given
    ]
    for row, iou in zip(rows, metrics.of_rows(rows).iou.tolist(), strict=True):
        row["iou"] = iou
    return rows


def _gather(found: dict[tuple[int, int], Given]) -> dict[tuple[int, int], Given]:
    """What all processes found, on each."""
    own = json.dumps([[key, given] for key, given in found.items()]).encode()
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.frombuffer(own.ljust(int(sizes.max()), b" "), np.uint8)
    parts = multihost_utils.process_allgather(padded)
    pairs = [pair for part in np.atleast_2d(parts) for pair in json.loads(part.tobytes())]
    return {tuple(key): Given(*given) for key, given in pairs}
