#!/usr/bin/env python
"""SFT, LoRA SFT and GRPO of a released size with random weights on this machine: ours and TRL's, side by side.

One 1288 x 1036 frame; for SFT 6 branches of 256 tokens, for GRPO one question of 32 tokens and 8 completions of 256.
Both sides start from the same files and see the same tokens. Theirs is TRL without vLLM (`trl_peer.py`): a row for each
branch with the frame repeated. Every leg is a process of its own, so that each has the device to itself; one that runs
out of memory or fails otherwise is told as such. Legs that are in --out already are not measured again, so that it can
be done in several calls. The losses and the gradient norms of all legs are held against each other, and the exit status
is 1 where they differ or a leg failed. MFU counts what a leg itself computes: with the frame repeated that is more.

    .venv/bin/python -m pip install "trl>=1.16,<2"
    .venv/bin/python scripts/bench_training.py --work /tmp/bench                # a GPU; 3B wants an H200's memory
    .venv/bin/python scripts/bench_training.py --work /tmp/bench8 --size eighth  # a CPU; tiny: a rehearsal

`eighth` is 3B's dimensions divided by eight, layers by nine, and a smaller frame with shorter branches.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

HOME = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOME), str(HOME / "tests")]

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
    side: str  # ours, trl
    attention: str
    layout: str  # shared, or repeated for every branch


def frames_of(case: Case):
    """The frame with SFT's branches, and with the question alone."""
    import randomised

    frame = randomised.frame(0, grids=(case.grid,), lengths=[case.tokens] * case.branches)
    return frame, frame._replace(branches=[frame.branches[0][: case.question]])


def completions_of(case: Case) -> np.ndarray:
    """What takes the place of all that is drawn in GRPO's first step, so that the legs can be compared."""
    return np.random.default_rng(1).integers(20, 900, (case.samples, case.completion))


def worth_of(case: Case) -> np.ndarray:
    """The advantage of each completion of the question."""
    return np.linspace(-1, 1, case.samples, dtype=np.float32)


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


def write_model(work: Path, size: str, dtype: str) -> None:
    """A folder with random weights that both sides read."""
    import randomised

    from surgery_r1_jax import hf, model, sizes

    ids = dict(image_token_id=randomised.IMAGE, video_token_id=randomised.VIDEO)
    ids |= dict(vision_start_token_id=randomised.VISION_START, vision_end_token_id=randomised.VISION_END)
    if size == "tiny":
        made = randomised.configuration("qwen2_5_vl", tied=True)
    elif size == "eighth":
        made = eighth(ids)
    else:
        made = sizes.transformers_config(size, **ids)
    made.architectures = [f"{randomised.CLASSES[made.model_type]}ForConditionalGeneration"]
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

    from surgery_r1_jax import backends, checkpoint, grpo, lora, optim, options, run, sampling, sft, sharding

    work, dtype, mesh = args.work, args.dtype, sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    how = dict(dtype=dtype, attention=leg.attention, mesh=mesh.devices.shape, offload=args.offload)
    compute = options.Compute(remat=True, tower_remat=True, **how)
    adapted = options.Lora(rank=RANK * (leg.kind == "lora"), base="bfloat16" if dtype == "bfloat16" else "float32")
    common = dict(model=str(work / "model"), data=options.Data(root="-"), compute=compute, lora=adapted)
    common["optimizer"] = options.Optimizer(learning_rate=RATE, schedule="constant", warmup=0.0, clip_norm=CLIP)
    loaded = checkpoint.load_model(work / "model", mesh, dtype=adapted.kept)
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
    host, samples, _ = load_of(leg, case, loaded.config, adapted)
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
        everything = np.ones((1, loaded.config.text.vocab_size), bool)
        allowed = sharding.put_batch(everything, mesh)[0]
        words = sampling.Vocabulary(allowed.at[randomised.STOP].set(False), randomised.STOP, randomised.PAD)
        rows = case.samples // samples
        numbers = jnp.arange(rows, dtype=jnp.int32), jnp.zeros((rows, 1), jnp.int32)
        advantage = jnp.asarray(worth_of(case)).reshape(rows, samples)
        given = jnp.asarray(completions_of(case), jnp.int32).reshape(rows, samples, -1)

        def once(state):
            since = time.perf_counter()
            drawn = jax.block_until_ready(
                grpo.roll_out(graph, settings, state.params, prompts, jax.random.key(0), numbers, words)
            )
            rolled = time.perf_counter() - since
            nonlocal given
            first, given = given, None
            if first is not None:
                drawn = drawn._replace(tokens_BJT=first)
            batch = grpo.lay_out(prompts, drawn, samples)
            held = grpo.reference_logp(graph, settings, reference, batch, allowed)
            if first is not None:
                drawn = drawn._replace(logp_BJT=grpo.reference_logp(graph, settings, state.params, batch, allowed))
            experience = grpo.Experience(batch, drawn.mask_BJT, drawn.logp_BJT, held, advantage)
            state, stats = step(state, frozen, experience, allowed, np.int32(0))
            return state, jax.device_get(stats), {"rollout_s": rolled}

    seconds, told, more = [], [], {}
    for _ in range(args.repeats + 1):
        since = time.perf_counter()
        state, stats, more = once(state)
        seconds.append(time.perf_counter() - since)
        told.append([float(stats["loss"]), float(stats["grad_norm"])])
    device = mesh.devices.flat[0]
    most = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return more | {"steps_s": seconds, "told": told, "device": device.device_kind, "peak_gib": most and most / 2**30}


def leg_of(leg: Leg, case: Case, args: argparse.Namespace) -> dict:
    """One measurement: the median of all steps but the first, and what they put to use of the device."""
    from surgery_r1_jax import flops, hf, options

    if leg.side == "ours":
        found = ours(leg, case, args)
    else:
        import trl_peer

        found = trl_peer.train(leg, case, args, rate=RATE, beta=BETA, clip=CLIP, rank=RANK)
    adapted = options.Lora(rank=RANK * (leg.kind == "lora"))
    done = load_of(leg, case, hf.read_config(args.work / "model"), adapted)[-1]
    seconds, peak = statistics.median(found["steps_s"][1:]), flops.peak(found["device"])
    speed = {"completions_s": done.completions / seconds or None, "mfu": peak and done.flops / seconds / peak}
    return found | speed | {"seconds": seconds}


def measured(leg: Leg, words: list[str], work: Path) -> dict:
    """A leg in a process of its own."""
    environ = {"JAX_COMPILATION_CACHE_DIR": str(work / "xla")} | os.environ | {"HF_HUB_OFFLINE": "1"}
    if leg.side == "trl":
        environ["JAX_PLATFORMS"] = "cpu"  # the device's memory is its own
    program = [sys.executable, __file__, *words, "--leg", ",".join(leg)]
    done = subprocess.run(program, env=environ, capture_output=True, text=True)
    if done.returncode == 0:
        return leg._asdict() | json.loads(done.stdout.splitlines()[-1])
    if any(sign in done.stderr for sign in OUT_OF_MEMORY):
        return leg._asdict() | {"refused": "out of memory"}
    print(done.stderr[-3000:], file=sys.stderr)
    return leg._asdict() | {"refused": "FAILED"}


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
    parser.add_argument("--work", type=Path, required=True, help="folder for the weights, kept for more calls")
    parser.add_argument("--size", default="Qwen2.5-VL-3B", help="released, eighth or tiny (default: %(default)s)")
    parser.add_argument("--kinds", default="sft,lora,grpo", help="default: %(default)s")
    parser.add_argument("--attention", default="auto", help="of our side, such as xla,cudnn (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 for a released size")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each leg (default: %(default)s)")
    parser.add_argument("--offload", action="store_true", help="our side keeps its moments in the host's memory")
    parser.add_argument("--no-peer", action="store_true", help="leave TRL out")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    parser.add_argument("--leg", help=argparse.SUPPRESS)
    args = parser.parse_args()
    case = CASES.get(args.size, REAL)
    args.dtype = args.dtype or ("float32" if args.size in CASES else "bfloat16")
    if args.leg == "weights":
        write_model(args.work, args.size, args.dtype)
        return 0
    if args.leg:
        print(json.dumps(leg_of(Leg(*args.leg.split(",")), case, args)))
        return 0

    from rich.console import Console
    from rich.table import Table

    args.work /= f"{args.size}_{args.dtype}"
    args.work.mkdir(parents=True, exist_ok=True)
    words = ["--work", str(args.work), "--size", args.size, "--dtype", args.dtype, "--repeats", str(args.repeats)]
    words += ["--offload"] * args.offload
    if not (args.work / "model" / "config.json").is_file():
        subprocess.run([sys.executable, __file__, *words, "--leg", "weights"], check=True)
    attentions = args.attention.split(",")
    rows = json.loads(args.out.read_text()) if args.out and args.out.is_file() else []
    for kind in args.kinds.split(","):
        legs = [Leg(kind, "ours", attention, "shared") for attention in attentions]
        legs += [Leg(kind, "ours", attentions[-1], "repeated")]
        legs += [Leg(kind, "trl", "sdpa", "repeated")] * (not args.no_peer)
        for leg in legs:
            if leg in [Leg(*(row[name] for name in Leg._fields)) for row in rows]:
                continue
            rows.append(measured(leg, words, args.work))
            print(rows[-1], flush=True)
            if args.out:
                args.out.write_text(json.dumps(rows, indent=2) + "\n")
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
    lines = differing(rows, args.dtype)
    lines += [f"{row['kind']} {row['side']} failed" for row in rows if row.get("refused") == "FAILED"]
    print(*lines, sep="\n")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
