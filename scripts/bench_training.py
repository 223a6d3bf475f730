#!/usr/bin/env python
"""SFT, LoRA SFT and GRPO of a released size with random weights on this machine: ours and transformers', side by side.

One 1288 x 1036 frame; for SFT 6 branches of 256 tokens, for GRPO one question of 32 tokens and 8 completions of 256.
Both sides start from the same files and see the same tokens. Theirs is what TRL runs without vLLM: a row for each
branch with the frame repeated, generate, a pass of the reference, gradient checkpointing, PyTorch's AdamW. Every leg
is a process of its own, so that each has the device to itself; one that runs out of memory is told as such. The
losses and the gradient norms of all legs are held against each other, and the exit status is 1 where they differ.
MFU counts what a leg itself computes: with the frame repeated that is more.

    .venv/bin/python scripts/bench_training.py --work /tmp/bench                # a GPU; 3B wants an H200's memory
    .venv/bin/python scripts/bench_training.py --work /tmp/bench8 --size eighth  # a CPU; tiny: a rehearsal

`eighth` is 3B's dimensions divided by eight, layers by nine, and a smaller frame with shorter branches.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

RATE, CLIP, BETA, RANK = 1e-5, 1.0, 0.04, 64
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "out of memory")


class Case(NamedTuple):
    """What goes through the model."""

    grid: tuple[int, int]  # patches of the frame, height and width
    branches: int
    tokens: int  # of a branch
    question: int
    samples: int
    completion: int


CASES = {"tiny": Case((10, 14), 3, 16, 5, 3, 6), "eighth": Case((36, 46), 6, 64, 20, 8, 64)}
REAL = Case((74, 92), 6, 256, 32, 8, 256)


class Leg(NamedTuple):
    """One measurement."""

    kind: str  # sft, lora, grpo
    side: str  # ours, transformers
    attention: str
    layout: str  # shared, or repeated for every branch


def frames_of(case: Case, completions: np.ndarray | None = None):
    """The frame with SFT's branches, with the question, or with the question and these completions behind it."""
    import randomised

    lengths = [case.tokens] * case.branches
    frame = randomised.frame(0, grids=(case.grid,), lengths=lengths)
    question = frame.branches[0][: case.question]
    asked = frame._replace(branches=[question])
    if completions is None:
        return frame, asked
    return frame, frame._replace(branches=[np.concatenate([question, row]) for row in completions])


def load_of(leg: Leg, case: Case, architecture, adapted) -> tuple:
    """The batch of a leg on the host, completions to draw for each of its questions, and what a step on it takes."""
    import randomised
    from bench_branches import repeated

    from surgery_r1_jax import flops, speed

    cost, whole = flops.of_model(architecture, adapted), leg.layout == "repeated"
    frame, asked = frames_of(case)
    if leg.kind != "grpo":
        batch = randomised.batch(architecture, [frame])
        batch = repeated(batch) if whole else batch
        return batch, 0, speed.supervised(batch, cost)
    rows, samples = (case.samples, 1) if whole else (1, case.samples)
    batch, length = randomised.batch(architecture, [asked] * rows), np.full((rows, samples), case.completion)
    return batch, samples, speed.reinforced(batch, length, cost, most=case.completion, updates=1, reference=True)


def speed_of(done, seconds: float, peak: float | None) -> dict:
    """Completions a second, and the part of the device's peak that is put to use."""
    return {"completions_s": done.completions / seconds or None, "mfu": done.flops / seconds / peak if peak else None}


def write_model(work: Path, size: str, dtype: str) -> None:
    """A folder with random weights that both sides read."""
    import randomised

    from surgery_r1_jax import hf, model, sizes

    ids = dict(image_token_id=randomised.IMAGE, video_token_id=1011)
    ids |= dict(vision_start_token_id=randomised.VISION_START, vision_end_token_id=randomised.VISION_END)
    if size == "tiny":
        made = randomised.configuration("qwen2_5_vl", tied=True)
    elif size == "eighth":
        made = eighth(ids)
    else:
        made = sizes.transformers_config(size, **ids)
    made.save_pretrained(work / "side")
    architecture = hf.read_config(work / "side")
    hf.write_folder(work / "model", model.init(architecture, 0), architecture, work / "side", dtype=dtype)


def eighth(ids: dict):
    """The architecture of bench_branches.py as transformers has it."""
    import transformers
    from bench_branches import ARCHITECTURE

    own, seen, axes = ARCHITECTURE.text, ARCHITECTURE.vision, ARCHITECTURE.text.rope_axes
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = {name: getattr(own, name) for name in (*names, "num_key_value_heads", "rms_norm_eps")}
    sections = [axes.count(axis) for axis in range(3)]
    text["rope_parameters"] = dict(rope_type="default", mrope_section=sections, rope_theta=own.rope_theta)
    names = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "window_size")
    tower = {name: getattr(seen, name) for name in (*names, "fullatt_block_indexes")}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=True, **ids)


def ours(leg: Leg, case: Case, args: argparse.Namespace) -> dict:
    """The programs of a run as its loop calls them."""
    import jax
    import jax.numpy as jnp
    import randomised

    from surgery_r1_jax import backends, checkpoint, flops, grpo, lora, optim, options, run, sampling, sft, sharding

    work, dtype, mesh = args.work, args.dtype, sharding.make_mesh()
    how = dict(dtype=dtype, attention=leg.attention, mesh=mesh.devices.shape, offload=args.offload)
    compute = options.Compute(remat=True, tower_remat=True, query_chunk=512, **how)
    adapted = options.Lora(rank=RANK * (leg.kind == "lora"), base="bfloat16" if dtype == "bfloat16" else "float32")
    common = dict(model=str(work / "model"), data=options.Data(root="-"), compute=compute, lora=adapted)
    common["optimizer"] = options.Optimizer(learning_rate=RATE, schedule="constant", warmup=0.0, clip_norm=CLIP)
    loaded = checkpoint.load_model(work / "model", mesh, dtype=adapted.base if adapted.rank else "float32")
    graph, abstract = lora.build(loaded.config, compute, adapted, backends.choose(compute, mesh))
    params, frozen, reference = loaded.params, {}, None
    if adapted.rank:
        params = lora.init(loaded.config, adapted, 0, lora.split(sharding.of_params(abstract, mesh))[0])
        frozen = loaded.params
    if leg.kind == "grpo":
        reference = grpo.frozen_copy(params, compute)
    tx = optim.transformation(common["optimizer"], 100, params, offload=args.offload)
    state = run.start_state(params, tx, mesh)
    moments = {sharding.is_offloaded(leaf.sharding) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1}
    assert moments == {args.offload}
    host, samples, done = load_of(leg, case, loaded.config, adapted)
    prompts = sharding.put_batch(host, mesh)
    if leg.kind != "grpo":
        settings = options.SFT(**common)
        step = run.keep_layout(functools.partial(sft.train_step, graph, tx, settings=settings), state)

        def once(state):
            state, stats = step(state, frozen, prompts, None)
            return state, jax.device_get(stats), {}
    else:
        sampler, objective = options.Sampler(max_tokens=case.completion), options.Objective(beta=BETA)
        settings = options.GRPO(**common, sampler=sampler, objective=objective)
        settings = settings.model_copy(update={"samples": samples})  # a run's are two or more
        step = run.keep_layout(functools.partial(grpo.update_step, graph, tx, settings), state)
        allowed = sharding.put_batch(np.arange(loaded.config.text.vocab_size)[None] < 1000, mesh)[0]
        words = sampling.Vocabulary(allowed, randomised.STOP, randomised.PAD)
        rows, kept = case.samples // samples, work / "drawn.npy"
        numbers = jnp.arange(rows, dtype=jnp.int32), jnp.zeros((rows, 1), jnp.int32)
        advantage = jnp.asarray(np.linspace(-1, 1, case.samples, dtype=np.float32)).reshape(rows, samples)
        given = jnp.asarray(np.load(kept)).reshape(rows, samples, -1) if kept.exists() else None

        def once(state):
            since = time.perf_counter()
            drawn = jax.block_until_ready(
                grpo.roll_out(graph, settings, state.params, prompts, jax.random.key(0), numbers, words)
            )
            rolled = time.perf_counter() - since
            nonlocal given
            first, given = given, None
            if first is not None:  # what the first leg drew, so that all of them can be compared
                drawn = drawn._replace(tokens_BJT=first)
            batch = grpo.lay_out(prompts, drawn, samples)
            held = grpo.reference_logp(graph, settings, reference, batch, allowed)
            if first is not None:
                drawn = drawn._replace(logp_BJT=grpo.reference_logp(graph, settings, state.params, batch, allowed))
            experience = grpo.Experience(batch, drawn.mask_BJT, drawn.logp_BJT, held, advantage)
            if not kept.exists():
                np.save(kept, np.asarray(drawn.tokens_BJT[0]))
            state, stats = step(state, frozen, experience, allowed, np.int32(0))
            return state, jax.device_get(stats), {"rollout_s": rolled}

    found = _timed(once, state, args.repeats)
    stats = mesh.devices.flat[0].memory_stats() or {}
    peak = flops.peak(mesh.devices.flat[0].device_kind)
    found["peak_gib"] = stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None
    return found | speed_of(done, found["seconds"], peak and peak * mesh.size)


def theirs(leg: Leg, case: Case, args: argparse.Namespace) -> dict:
    """The same by transformers, PyTorch's AdamW and, for adapters, peft."""
    import randomised
    import torch
    import transformers

    from surgery_r1_jax import flops, hf, options

    device = "cuda" if torch.cuda.is_available() else "cpu"
    work, low = args.work, args.dtype == "bfloat16"

    def load(kept):
        load = transformers.AutoModelForImageTextToText.from_pretrained
        return load(work / "model", dtype=kept, attn_implementation=leg.attention).to(device)

    frozen = torch.bfloat16 if low else torch.float32
    net = load(frozen if leg.kind == "lora" else torch.float32)
    reference = load(frozen).eval() if leg.kind == "grpo" else None
    if leg.kind == "lora":
        import peft

        where = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        net = peft.get_peft_model(net, peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=where))
        net.enable_input_require_grads()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    learning = [p for p in net.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(learning, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, fused=device == "cuda")
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=low)

    def inputs(frame):
        rows = torch.tensor(np.stack([frame.flat(i) for i in range(len(frame.branches))]), device=device)
        patches = torch.tensor(frame.patches, device=device).repeat(len(rows), 1)
        return dict(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            pixel_values=patches,
            image_grid_thw=torch.tensor([[1, *case.grid]] * len(rows), device=device),
            mm_token_type_ids=(rows == randomised.IMAGE).long(),
        )

    def logp(net, given, count):
        """Log-probabilities of the last tokens of each row."""
        logits = net(**given, logits_to_keep=count + 1, use_cache=False).logits[:, :-1].float()
        if leg.kind == "grpo":
            logits[..., 1000:] = -torch.inf  # what ours never draws
        return logits.log_softmax(-1).gather(-1, given["input_ids"][:, -count:, None])[..., 0]

    def descend(loss):
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learning, CLIP)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return {"loss": loss.item(), "grad_norm": norm.item()}

    frame, asked = frames_of(case)
    if leg.kind != "grpo":
        given = inputs(frame)

        def once(_):
            net.train()
            with autocast():
                loss = -logp(net, given, case.tokens - 1).mean()
            return None, descend(loss), {}
    else:
        prompt = inputs(asked._replace(branches=asked.branches * case.samples))
        drawn = work / "drawn.npy"  # by our side, unless it ran out of memory
        some = np.random.default_rng(0).integers(20, 900, (case.samples, case.completion))
        given = inputs(frames_of(case, np.load(drawn) if drawn.exists() else some)[1])
        advantage = torch.linspace(-1, 1, case.samples, device=device)[:, None]
        net.generation_config.eos_token_id = None
        count = case.completion

        def once(_):
            since = time.perf_counter()
            net.eval()
            with torch.no_grad(), autocast():
                net.generate(**prompt, do_sample=True, max_new_tokens=count, min_new_tokens=count)
                if device == "cuda":
                    torch.cuda.synchronize()
                rolled = time.perf_counter() - since
                held = logp(reference, given, count)
            net.train()
            with autocast():
                new = logp(net, given, count)
            away = held - new
            gain = torch.exp(new - new.detach()) * advantage
            loss = -(gain - BETA * (torch.exp(away) - away - 1)).mean(-1).mean()
            return None, descend(loss), {"rollout_s": rolled}

    found = _timed(once, None, args.repeats)
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    adapted = options.Lora(rank=RANK * (leg.kind == "lora"))
    done = load_of(leg, case, hf.read_config(work / "model"), adapted)[-1]
    peak = flops.peak(torch.cuda.get_device_name()) if device == "cuda" else None
    return found | speed_of(done, found["seconds"], peak)


def _timed(once: Callable, state, repeats: int) -> dict:
    """Median seconds of a step after the first, and what the steps told."""
    seconds, told, more = [], [], {}
    for _ in range(repeats + 1):
        since = time.perf_counter()
        state, stats, more = once(state)
        seconds.append(time.perf_counter() - since)
        told.append([float(stats["loss"]), float(stats["grad_norm"])])
    return {"seconds": statistics.median(seconds[1:]), "first_s": seconds[0], "told": told} | more


def measured(leg: Leg, words: list[str]) -> dict:
    """A leg in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *words, "--leg", ",".join(leg)], capture_output=True, text=True)
    if done.returncode == 0:
        return leg._asdict() | json.loads(done.stdout.splitlines()[-1])
    if not any(sign in done.stderr for sign in OUT_OF_MEMORY):
        sys.exit(f"{leg}:\n{done.stderr[-3000:]}")
    return leg._asdict() | {"refused": "out of memory"}


def differing(rows: list[dict], dtype: str) -> list[str]:
    """Where the legs do not agree: in the first step, and where nothing is drawn at random in all of them."""
    bound, lines = 0.03 if dtype == "bfloat16" else 1e-3, []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        told = [row for row in rows if row["kind"] == kind and "told" in row]
        if len(told) < 2:
            lines.append(f"{kind}: nothing to compare with")
        steps = slice(None) if kind == "sft" else slice(1)
        # An adapter's first matrix is drawn by each side: the first loss does not depend on it, the gradient does.
        what = slice(1) if kind == "lora" else slice(None)
        for row in told[1:]:
            ours, other = (np.asarray(each["told"])[steps, what] for each in (told[0], row))
            if not np.allclose(ours, other, rtol=bound, atol=bound / 10):
                name = " ".join(row[name] for name in Leg._fields)
                lines.append(f"{name} tells {other.tolist()}, ours {ours.tolist()}")
    return lines


def main() -> int:
    """Measure, print the table; 1 if the sides differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new folder, for the weights")
    parser.add_argument("--size", default="Qwen2.5-VL-3B", help="released, eighth or tiny (default: %(default)s)")
    parser.add_argument("--kinds", default="sft,lora,grpo", help="default: %(default)s")
    parser.add_argument("--attention", default="auto", help="of our side, such as xla,cudnn (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 for a released size")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each leg (default: %(default)s)")
    parser.add_argument("--offload", action="store_true", help="our side keeps its moments in the host's memory")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    parser.add_argument("--leg", help=argparse.SUPPRESS)
    args = parser.parse_args()
    case = CASES.get(args.size, REAL)
    args.dtype = args.dtype or ("float32" if args.size in CASES else "bfloat16")
    if args.leg == "weights":
        write_model(args.work, args.size, args.dtype)
        return 0
    if args.leg:
        leg = Leg(*args.leg.split(","))
        measure = ours if leg.side == "ours" else theirs
        print(json.dumps(measure(leg, case, args)))
        return 0

    from rich.console import Console
    from rich.table import Table

    args.work.mkdir(parents=True)
    words = ["--work", str(args.work), "--size", args.size, "--dtype", args.dtype, "--repeats", str(args.repeats)]
    words += ["--offload"] * args.offload
    subprocess.run([sys.executable, __file__, *words, "--leg", "weights"], check=True)
    attentions, rows = args.attention.split(","), []
    for kind in args.kinds.split(","):
        legs = [Leg(kind, "ours", attention, "shared") for attention in attentions]
        legs += [Leg(kind, "ours", attentions[-1], "repeated")]
        legs += [Leg(kind, "transformers", "sdpa", "repeated")] * (not args.no_peer)
        for leg in legs:
            rows.append(measured(leg, words))
            print(rows[-1], flush=True)
    table = Table("kind", "side", "attention", "frame")
    for name in ("s a step", "of it rollout", "completions/s", "times ours", "MFU", "peak GiB"):
        table.add_column(name, justify="right")
    told = lambda value, form: "" if value is None else format(value, form)  # noqa: E731
    for row in rows:
        own = [r["seconds"] for r in rows if (r["kind"], r["side"]) == (row["kind"], "ours") and "told" in r]
        ratio = row["seconds"] / min(own) if own and "told" in row else None
        names = ("seconds", ".3f"), ("rollout_s", ".3f"), ("completions_s", ".1f"), ("ratio", ".2f"), ("mfu", ".1%")
        figures = row | {"ratio": ratio}
        cells = [told(figures.get(name), form) for name, form in (*names, ("peak_gib", ".1f"))]
        cells[0] = row.get("refused", cells[0])
        table.add_row(*(row[name] for name in Leg._fields), *cells)
    Console(width=140).print(table)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")
    lines = differing(rows, args.dtype)
    print(*lines, sep="\n")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
