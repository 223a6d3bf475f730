"""What a run would be, before it takes any accelerator time: sizes, token lengths, shapes, memory, and what is amiss.

Reads the configuration, the labels, config.json, tokenizer and preprocessor; of images only those of the first
batch; no weights. Labels and images are checked one by one by `data check`.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh

from surgery_r1_jax import (
    answer,
    boxes,
    checkpoint,
    errors,
    families,
    hf,
    lora,
    memory,
    milestones,
    model,
    options,
    pipeline,
    places,
    plan,
    programs,
    records,
    run,
    sharding,
)
from surgery_r1_jax.batch import FrameBatch
from surgery_r1_jax.examples import Encoder
from surgery_r1_jax.lengths import most_tokens
from surgery_r1_jax.records import Frame
from surgery_r1_jax.stream import Stream

SMALL = 50_000_000  # parameters up to which the step is compiled to know its memory
RANK = 64  # of the adapters that a folder is described with: VLM-R1's
CLOSE = 0.99  # mean IoU of true boxes with themselves, written and read back


class Lengths(NamedTuple):
    """Longest token sequences of a data set, and how its answers come back when a perfect model writes them."""

    prefix: int
    prompt: int
    completion: int  # with reasoning and the stop token
    lost: int  # answers or boxes that are not read back
    miou: float


def start(settings: options.SFT | options.GRPO, name: str | Path) -> int:
    """The `doctor` command on a configuration by its file's name. Raises InputError listing what would stop the run."""
    kind = "GRPO" if isinstance(settings, options.GRPO) else "SFT"
    folder = checkpoint.folder_of(settings.model)
    _require(folder, [places.fetched(source.root) for source in settings.data.sources])
    architecture, mesh = hf.read_config(folder), mesh_of(settings.compute.mesh)
    encoder = hf.encoder_of(folder, architecture)

    frames, (dev, _) = pipeline.read(settings.data), milestones.dev_frames(settings.data, settings.evaluation)
    settings = run.scheduled(settings, frames)
    print(f"{name}: {kind}, {settings.schedule.steps} steps of {settings.data.frames} frames")
    _section("model", settings.model, _model_rows(architecture, settings))
    _section("data", settings.data.name, _data_rows(settings, frames, dev))
    lengths = measure(frames, encoder)
    stream = stream_of(settings, frames, encoder)
    job = programs.Job(settings, architecture, mesh, largest_batch(stream))
    stopping = problem(job)
    _section("tokens", "longest of the training frames", _token_rows(frames, encoder, lengths, job))
    _section("shapes", "of a batch on all devices, the largest", _shape_rows(job))
    _section("padding", "of such a batch", _padding_rows(job.batch))
    _section("buckets", "rows that share a shape", [("", line) for line in stream.plan.lines()])
    _section("boxes", "written and read back", [("mean IoU", f"{lengths.miou:.4f}"), ("lost", f"{lengths.lost}")])
    small = sum(leaf.size for leaf in jax.tree.leaves(job.params)) < SMALL
    # Not every compiler tells the host's memory from the device's.
    exact = small and isinstance(mesh, Mesh) and not stopping and not settings.compute.offload
    needed = memory.compiled(job) if exact else memory.estimated(job)
    how = "the compiled step" if exact else "estimated, within a factor of two"
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    _section("memory", f"of a device, mesh {axes}, {how}", _memory_rows(needed))
    print()
    for line in warnings(job, lengths, folder, encoder, needed):
        print(f"warning: {line}")
    if stopping:
        raise errors.InputError(f"{name}: {stopping}")
    return 0


def describe(path: str | Path) -> int:
    """`doctor --checkpoint`: what a folder is. Raises InputError where it is no model that is supported."""
    folder = checkpoint.folder_of(path)
    architecture = hf.read_config(folder)
    encoder, family = hf.encoder_of(folder, architecture), families.of(architecture)
    print(f"{errors.printable(path)}: {family.title}, model_type {family.model_type}")
    if found := checkpoint.adapters_of(path, architecture):
        adapted = found[0].lora
        numbers = sum(leaf.size for leaf in jax.tree.leaves(found[1]))
        about = [("rank", f"{adapted.rank}, {numbers:,} parameters"), ("in", ", ".join(adapted.targets))]
        _section("adapters", f"of {found[0].path}", about)
    stored, sizes = json.loads((folder / "config.json").read_text("utf-8")), _part_sizes(architecture)
    head = "the embedding" if architecture.tie_word_embeddings else "a matrix of its own"
    parts = [(part, f"{sizes[part]:>16,}") for part in model.PARTS] + [("all", f"{sizes.total():>16,}")]
    kept = [("stored as", str(stored.get("dtype") or stored.get("torch_dtype"))), ("head", head)]
    _section("parameters", "by part", parts + kept)
    seen = encoder.preprocessor
    unit = seen.patch_size * seen.merge_size
    limits = [("at least", seen.min_pixels), ("at most", seen.max_pixels)]
    pixels = [(name, f"{n:,} pixels, {n // unit**2:,} tokens") for name, n in limits]
    _section("images", f"a token is {unit} x {unit} pixels, {seen.merge_size**2} patches of {seen.patch_size}", pixels)
    _section("boxes", f"in {encoder.codec.units}", [])
    rows, tokens = architecture.text.vocab_size, encoder.chat.vocab_size
    _section("vocabulary", f"{rows:,} rows, {tokens:,} tokens, {rows - tokens:,} rows of padding, never drawn", [])
    devices, each = jax.device_count(), sizes.total() * 4
    adapters = sum(_part_sizes(architecture, options.Lora(rank=RANK)).values()) - sizes.total()
    needs = [
        ("weights", each, "float32"),
        ("SFT", 4 * each, "with gradients and two moments"),
        ("GRPO", 5 * each, "and a reference, where there is a KL term"),
        ("LoRA", each // 2 + 16 * adapters, f"either, weights in bfloat16, adapters of rank {RANK} in the decoder"),
    ]
    about = f"of a device, {devices} along fsdp, without activations; --config tells those of a run"
    _section("memory", about, [(name, f"{_gib(size // devices):>10} {what}") for name, size, what in needs])
    return 0


def mesh_of(shape: Sequence[int]) -> Mesh | AbstractMesh:
    """The mesh on this machine's devices, or an abstract one where it wants another number of them."""
    if -1 in shape or math.prod(shape) == jax.device_count():
        return sharding.make_mesh(shape)
    return AbstractMesh(tuple(shape), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def measure(frames: Sequence[Frame], encoder: Encoder) -> Lengths:
    """Write every true answer as a perfect model would, token by token, and read it back."""
    prompts, completions, ious, lost = [], [], [], 0
    for frame in frames:
        resized = encoder.preprocessor.resized(frame.width, frame.height)
        for record in frame.records:
            branch = encoder.branch(frame, record, think=True)
            prompts.append(len(branch.prompt))
            completions.append(len(branch.completion))
            parsed = answer.parse(encoder.chat.decode(branch.completion), classes=frame.classes)
            if parsed.reason is not answer.Reason.OK:
                lost += 1
                continue
            read = encoder.codec.decode(parsed.box, *resized)
            ious.append(float(boxes.iou(np.asarray(read), np.asarray(record.box), xp=np)))
    prefix = max(len(encoder.prefix_ids([grid])) for grid in {encoder.patch_grid(frame) for frame in frames})
    return Lengths(prefix, max(prompts), max(completions), lost, float(np.mean(ious or [0.0])))


def stream_of(settings: options.SFT | options.GRPO, frames: Sequence[Frame], encoder: Encoder) -> Stream:
    """The batches of the run, of all processes."""
    if isinstance(settings, options.GRPO):
        return pipeline.rollouts(frames, encoder, settings.data, seed=settings.seed)
    return pipeline.training(frames, encoder, settings.data, settings.targets, seed=settings.seed)


def largest_batch(stream: Stream) -> FrameBatch:
    """One of the largest shape: what the run must have room for."""
    found = stream[stream.first_of(stream.plan.largest)]
    return found if isinstance(found, FrameBatch) else found[0]


def problem(job: programs.Job) -> str | None:
    """What would stop the run, although the configuration is sound in itself."""
    frames, devices = job.settings.data.frames, job.frame_devices
    if frames % devices:
        return (
            f"data.frames {frames} cannot be spread over {devices} devices (data x fsdp); take a multiple of {devices}"
        )
    return None


def warnings(
    job: programs.Job, lengths: Lengths, folder: Path, encoder: Encoder, needed: memory.Bytes
) -> Iterator[str]:
    """What would not stop the run but spoil or slow it."""
    settings, architecture, devices = job.settings, job.architecture, job.frame_devices
    most = most_tokens(folder)
    completion = settings.sampler.max_tokens if isinstance(settings, options.GRPO) else lengths.completion
    if most and lengths.prefix + lengths.prompt + completion > most:
        yield (
            f"prefix, question and completion are {lengths.prefix} + {lengths.prompt} + {completion} tokens, the model "
            f"was made for {most}; "
            "lower max_pixels in preprocessor_config.json"
        )
    if settings.data.frames % (job.parts * devices):
        yield f"a part of a batch has {settings.data.frames // job.parts} frames for {devices} devices; some will idle"
    if isinstance(job.mesh, AbstractMesh):
        yield f"the mesh is for {job.mesh.size} devices, here are {jax.device_count()}"
    tensor = job.mesh.shape["tensor"]
    for key in ("num_attention_heads", "num_key_value_heads"):
        if getattr(architecture.text, key) % tensor:
            yield f"{key} {getattr(architecture.text, key)} does not divide by tensor {tensor}: a copy on each device"
    asked = {"evaluation.max_tokens": settings.evaluation.max_tokens}
    if isinstance(settings, options.GRPO):
        asked["sampler.max_tokens"] = settings.sampler.max_tokens
    for key, tokens in asked.items():
        if tokens < lengths.completion:
            yield f"{key} {tokens} cuts the longest true answer with reasoning, {lengths.completion} tokens"
    if lengths.lost:
        yield f"{lengths.lost} true answers are not read back from what the tokenizer makes of them"
    if lengths.miou < CLOSE:
        yield f"true boxes come back with a mean IoU of {lengths.miou:.3f}: the model sees too few pixels (max_pixels)"
    if architecture.image_token_id != encoder.chat.image_id:
        yield (
            f"config.json has image_token_id {architecture.image_token_id}, the tokenizer {encoder.chat.image_id}; "
            "take both from one checkpoint"
        )
    if not any(settings.optimizer.rates.model_dump().values()):
        yield "optimizer.rates are all 0: nothing is trained"
    if not any(folder.glob("*.safetensors")) and folder == checkpoint.here(settings.model):
        yield f"{folder} has no safetensors weights yet"
    for device in jax.devices()[:1]:
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if limit and needed.peak > limit:
            yield f"{_gib(needed.peak)} are needed, {_gib(limit)} are there: more devices, smaller batches, or remat"


def _require(folder: Path, roots: Sequence[Path]) -> None:
    """Refuse missing files of the model and missing data, both at once."""
    lines = []
    needed = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
    if missing := [name for name in needed if not (folder / name).is_file()]:
        lines.append(f"{folder}: no {', no '.join(missing)}; give a Hugging Face folder of a Qwen-VL model as model")
    for root in roots:
        if not root.is_dir():
            lines.append(f"{root}: no such folder; give a data set in the layout of EndoVis-18-VQLA as data.root")
    if lines:
        raise errors.InputError("\n".join(map(errors.printable, lines)))


def _part_sizes(architecture: model.Config, adapted: options.Lora = options.Lora()) -> Counter:
    """Numbers of parameters by part, with adapters where there are any."""
    sizes: Counter = Counter()
    for path, variable in nnx.to_flat_state(lora.build(architecture, options.Compute(), adapted)[1]):
        sizes[model.part_of(path)] += math.prod(variable.get_value().shape)
    return sizes


def _model_rows(architecture: model.Config, settings) -> list[tuple[str, str]]:
    """Parameters of each part and the rate it learns with."""
    sizes, rates = _part_sizes(architecture), settings.optimizer.rates
    trained = _part_sizes(architecture, settings.lora) - sizes if settings.lora.rank else sizes
    full = settings.optimizer.learning_rate
    rows = [
        (part, f"{sizes[part]:>14,} parameters, rate {getattr(rates, part) * full * bool(trained[part]):g}")
        for part in model.PARTS
    ]
    if settings.lora.rank:
        about = f"{trained.total():>14,} parameters of rank {settings.lora.rank}, the rest in {settings.lora.base}"
        rows.append(("adapters", about))
    return [*rows, ("all", f"{sizes.total():>14,} parameters, computed in {settings.compute.dtype}")]


def _data_rows(settings, frames: Sequence[Frame], dev: Sequence[Frame]) -> list[tuple[str, str]]:
    """Frames and questions of each split, and what the run takes of them."""
    every = pipeline.read_all(settings.data)
    rows = [(name, _counted(members)) for name, members in records.by_split(every).items()]
    rows.append(("trained on", f"{settings.data.split}: {_counted(frames)}"))
    rows.append(("chosen by", f"{settings.evaluation.split}: {_counted(dev)}"))
    batches = len(plan.plan_rows(frames, settings.data.questions)) / settings.data.frames
    return [*rows, ("passes", f"{settings.schedule.steps / batches:.1f} of {batches:.1f} steps each")]


def _counted(frames: Sequence[Frame]) -> str:
    return f"{len(frames):,} frames, {sum(len(frame.records) for frame in frames):,} questions"


def _token_rows(frames, encoder: Encoder, lengths: Lengths, job: programs.Job) -> list[tuple[str, str]]:
    sizes = {encoder.preprocessor.resized(frame.width, frame.height) for frame in frames}
    width, height = max(sizes, key=math.prod)
    unit = (encoder.preprocessor.patch_size * encoder.preprocessor.merge_size) ** 2
    rows = [
        ("image", f"{width * height // unit:,} at {width} x {height} pixels"),
        ("prefix", f"{lengths.prefix:,}"),
        ("prompt", f"{lengths.prompt:,}"),
        ("completion", f"{lengths.completion:,} true, with reasoning"),
    ]
    if job.samples:
        rows.append(("", f"{job.settings.sampler.max_tokens:,} at most when drawn"))
    return rows


def _shape_rows(job: programs.Job) -> list[tuple[str, str]]:
    shape, frames = job.shape, job.settings.data.frames
    values = job.batch.patches_BWSC.shape[-1]
    rows = [
        ("patches", (frames, shape.windows, job.architecture.vision.slots, values)),
        ("prefix", (frames, shape.prefix)),
        ("lanes", (frames, shape.lanes, shape.lane_tokens)),
        ("scored", (frames, shape.scored)),
    ]
    parts = [("parts", f"{job.parts}, one after the other")] if job.parts > 1 else []
    return [(name, " x ".join(f"{n:,}" for n in extents)) for name, extents in rows] + parts


def _padding_rows(batch) -> list[tuple[str, str]]:
    filled = {
        "patches": batch.patch_image_BWS > 0,
        "prefix": batch.prefix_mask_BP,
        "lanes": batch.branch_segment_BJT > 0,
        "scored": batch.score_weight_BL > 0,
    }
    return [(name, f"{1 - np.mean(used):.1%}") for name, used in filled.items() if used.size]


def _memory_rows(needed: memory.Bytes) -> list[tuple[str, str]]:
    rows = [(name, getattr(needed, name)) for name in memory.Bytes._fields if name not in ("offloaded", "how")]
    here = f"{_gib(needed.offloaded)} in its host's memory, as much for each of a host's devices"
    beside = [("offloaded", here)] * bool(needed.offloaded)
    return [(name, _gib(size)) for name, size in rows if size] + [("at most", _gib(needed.peak)), *beside]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _section(title: str, about: str, rows: Sequence[tuple[str, str]]) -> None:
    print(f"\n{title}: {errors.printable(about)}")
    for name, value in rows:
        print(f"  {name:<12}{errors.printable(value)}")
