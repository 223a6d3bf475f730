"""Evaluation: greedy answers to every question of a split, each counted once, and what they are worth.

Decoding is one jitted program of one shape; scoring is a pure function of the predictions file, so that every
figure can be worked out again from it.
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from pydantic import Field

from surgery_r1_jax import (
    checkpoint,
    codec,
    config,
    examples,
    floors,
    grade,
    images,
    layers,
    metrics,
    model,
    pipeline,
    records,
    sampling,
    sharding,
    vocabulary,
)
from surgery_r1_jax.chat import Chat
from surgery_r1_jax.records import Frame


class Config(config.Config):
    """How a split is evaluated while training."""

    split: str = Field("dev", description="chooses the best checkpoint; val is only ever reported")
    frames: int = Field(16, ge=1, description="frames in a batch, over all processes")
    questions: int = Field(9, ge=1, description="most questions of a frame decoded together")
    limit: int = Field(0, ge=0, description="use only so many frames; 0: all")
    max_tokens: int = Field(256, ge=1)


class Runner(NamedTuple):
    """A model's graph with what is needed to ask it questions."""

    graph: object
    mesh: jax.sharding.Mesh
    encoder: examples.Encoder
    vocabulary: sampling.Vocabulary
    shard: pipeline.Shard


def encoder_of(folder: Path, settings: model.Config) -> examples.Encoder:
    """Tokenizer, preprocessor and box codec of a Hugging Face folder."""
    return examples.Encoder(
        chat=Chat.from_folder(folder),
        preprocessor=images.Preprocessor.from_folder(folder),
        codec=codec.RESIZED_PIXELS,
        window_side=settings.vision.window_side,
    )


def runner_of(
    folder: Path, settings: model.Config, mesh: jax.sharding.Mesh, compute: layers.Compute = layers.Compute()
) -> Runner:
    """Everything but the parameters."""
    encoder = encoder_of(folder, settings)
    graph, _ = model.build(settings, compute)
    allowed = encoder.chat.allowed(settings.text.vocab_size)
    words = sampling.Vocabulary(
        jax.device_put(allowed, sharding.replicated(mesh)), encoder.chat.stop_id, encoder.chat.pad_id
    )
    return Runner(graph, mesh, encoder, words, pipeline.Shard(jax.process_index(), jax.process_count()))


def predict(
    runner: Runner,
    params: dict,
    frames: Sequence[Frame],
    settings: pipeline.Config,
    max_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict]:
    """Answer every question greedily; one dict a question, in the order of the frames, on every process.

    Keys: frame, question, answer, box, pred_answer, pred_box, iou, text, reason. Boxes are unit xyxy.
    """
    batches, count = pipeline.once(frames, runner.encoder, settings, runner.shard)
    greedy = sampling.Config(max_tokens=max_tokens, temperature=0.0)
    found: dict[tuple[int, int], dict] = {}
    for done, (prompts, gold) in enumerate(batches, start=1):
        out = decode(runner.graph, params, sharding.put_batch(prompts, runner.mesh), runner.vocabulary, greedy)
        local = sharding.local_rows((out.tokens_BJT, out.stopped_BJ))
        graded = grade.grade(*local, gold, runner.encoder)
        for b, row in enumerate(gold.valid_BQ):
            for q in np.flatnonzero(row):
                number, index = int(gold.frame_B[b]), int(gold.record_BQ[b, q])
                found[number, index] = _prediction(frames[number], index, graded, int(b), int(q))
        if progress:
            progress(done, count)
    if runner.shard.count > 1:
        found = _gather(found)
    return [found[key] for key in sorted(found)]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _decode(graph, params, prompts, allowed_V, fixed):
    sampling_config, stop_id, pad_id = fixed
    net = model.bind(graph, params)
    words = sampling.Vocabulary(allowed_V, stop_id, pad_id)
    frames = jnp.zeros(prompts.prefix_ids_BP.shape[0], jnp.int32)  # greedy decoding draws nothing
    return sampling.rollout(net, prompts, jax.random.key(0), frames, words, sampling_config)


def decode(graph, params, prompts, words: sampling.Vocabulary, settings: sampling.Config) -> sampling.Rollout:
    """Greedy completions of a batch of prompts; compiled once a shape."""
    return _decode(graph, params, prompts, words.allowed_V, (settings, words.stop_id, words.pad_id))


def score(predictions: Sequence[dict]) -> dict:
    """The metrics of predictions: `metrics.table` and location accuracy in frames with several tools."""
    outcomes = outcomes_of(predictions)
    table = metrics.table(outcomes)
    tools = {}
    for row in predictions:
        kind, tool = vocabulary.question_kind(row["question"])
        tools.setdefault(row["frame"], set()).add(tool)
    several = np.array([len(tools[row["frame"]] - {None}) > 1 for row in predictions])
    located = outcomes.kind == vocabulary.KINDS.index("location")
    table["accuracy_location_multi_tool"] = metrics.summarise(outcomes, located & several)["accuracy"]
    return table


def outcomes_of(predictions: Sequence[dict]) -> metrics.Outcomes:
    """Prediction rows as the arrays that `metrics` works on."""
    nothing = (0.0, 0.0, 0.0, 0.0)
    frames = {name: number for number, name in enumerate(dict.fromkeys(row["frame"] for row in predictions))}
    return metrics.compare(
        pred_answer=[vocabulary.class_index(row["pred_answer"] or "") for row in predictions],
        gold_answer=[vocabulary.class_index(row["answer"]) for row in predictions],
        pred_box=[row["pred_box"] or nothing for row in predictions],
        box_ok=[row["pred_box"] is not None for row in predictions],
        gold_box=[row["box"] for row in predictions],
        kind=[vocabulary.question_kind(row["question"])[0] for row in predictions],
        frame=[frames[row["frame"]] for row in predictions],
    )


def floor_metrics(train: Sequence[Frame], frames: Sequence[Frame]) -> dict:
    """What the question alone is worth: its usual answer and its median box in the training split."""
    guesses = iter(floors.question_only(train, frames))
    rows = []
    for frame in frames:
        for record in frame.records:
            guess, box = next(guesses)
            rows.append(
                dict(frame=frame.id, question=record.question, answer=record.answer, box=record.box)
                | dict(pred_answer=guess, pred_box=box)
            )
    return score(rows)


def write_predictions(path: Path, predictions: Sequence[dict]) -> None:
    """One JSON line a question, written beside the target and renamed."""
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in predictions))
    os.replace(part, path)


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
) -> int:
    """Evaluate a checkpoint on a split: FILE.json with the metrics and floors, FILE.predictions.jsonl."""
    from rich.console import Console
    from rich.progress import Progress

    out = Path(out)
    every = records.read(data, strict=strict)
    chosen = records.split(every, split)
    mesh = sharding.make_mesh()
    loaded = checkpoint.load_model(checkpoint_dir, mesh)
    runner = runner_of(loaded.folder, loaded.config, mesh, layers.Compute(dtype=dtype))
    frames = pipeline.round_up(frames, mesh.shape["data"] * mesh.shape["fsdp"])
    settings = pipeline.Config(root=str(data), split=split, frames=frames, questions=9, threads=2)
    report: dict = {"checkpoint": str(checkpoint_dir), "data": str(data), "split": split, "floors": {}}
    with Progress(console=Console(stderr=True)) as bar:
        for name, grey in (("model", False), ("blank_image", True))[: 1 + blank]:
            task = bar.add_task(f"evaluate {split}, {name.replace('_', ' ')}", total=None)
            seen = runner._replace(encoder=_with_blank(runner.encoder, grey))
            step = lambda done, count, task=task: bar.update(task, completed=done, total=count)  # noqa: E731
            predictions = predict(seen, loaded.params, chosen, settings, max_tokens, step)
            if grey:
                report["floors"]["blank_image"] = score(predictions)
            else:
                report |= score(predictions)
                answers = predictions
    train = [f for f in every if records.split_of(f.sequence) == "train"]
    if train:
        report["floors"]["question_only"] = floor_metrics(train, chosen)
    if jax.process_index() == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_predictions(out.with_suffix(".predictions.jsonl"), answers)
        out.write_text(json.dumps(report, indent=2) + "\n")
        print_scores({"model": report, **report["floors"]}, title=f"{split}: {report['n']} questions")
    return 0


def print_scores(columns: dict[str, dict], title: str) -> None:
    """A table of metrics, one column a model or floor."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", title=title, title_justify="left")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    first = next(iter(columns.values()))
    for key, value in first.items():
        if isinstance(value, float) and key != "n":
            cells = (columns[name].get(key) for name in columns)
            table.add_row(key, *("-" if cell is None else f"{cell:.4f}" for cell in cells))
    Console().print(table)


def _with_blank(encoder: examples.Encoder, blank: bool) -> examples.Encoder:
    import dataclasses

    return dataclasses.replace(encoder, blank=blank)


def _prediction(frame: Frame, index: int, graded: grade.Graded, b: int, q: int) -> dict:
    record, parsed, judged = frame.records[index], graded.parsed[b][q], graded.judged
    right_box = [round(float(edge), 6) for edge in judged.box[b, q]] if judged.box_ok[b, q] else None
    row = dict(
        frame=frame.id,
        question=record.question,
        answer=record.answer,
        box=[round(edge, 6) for edge in record.box],
        pred_answer=None if parsed.answer < 0 else vocabulary.CLASSES[parsed.answer],
        pred_box=right_box,
    )
    row["iou"] = round(float(outcomes_of([row]).iou[0]), 6)
    return row | dict(text=graded.texts[b][q], reason=parsed.reason.name)


def _gather(found: dict) -> dict:
    """The predictions of all processes, on each."""
    own = json.dumps([[list(key), row] for key, row in found.items()]).encode()
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.frombuffer(own.ljust(int(sizes.max()), b" "), np.uint8)
    parts = multihost_utils.process_allgather(padded)
    rows = [pair for part in np.atleast_2d(parts) for pair in json.loads(part.tobytes())]
    return {tuple(key): row for key, row in rows}
