#!/usr/bin/env python
"""What sharing a frame's prefix saves: an SFT step and a GRPO update, frame with branches against one branch a row.

Both sides are the same code with the same remat, query chunks and completion-only logits; only the layout differs.
Dimensions are those of the 3B model divided by eight (layers by nine). For each case the script prints seconds a
step, the compiler's peak memory, their ratios, and the ratio of floating-point operations (tower included), which
no layout can beat by much; and it checks that loss and gradient norm agree.

    .venv/bin/python scripts/bench_branches.py
    .venv/bin/python scripts/bench_branches.py --repeats 5 --out bench_branches.json
"""

import argparse
import functools
import json
import statistics
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from surgery_r1_jax import decoder, flops, grid, grpo, model, optim, options, sft, vision
from surgery_r1_jax.batch import FrameBatch

IMAGE, QUESTION, COMPLETION, TEXT = 1, 20, 64, 24  # image id; tokens of a question, a completion, a system prompt
ARCHITECTURE = model.Config(
    image_token_id=IMAGE,
    tie_word_embeddings=True,
    family="qwen2_5_vl",
    text=decoder.Config(
        vocab_size=18_944,
        hidden_size=256,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_axes=(0, 0, 1, 1, 1, 2, 2, 2),
    ),
    vision=vision.Config(
        depth=8,
        hidden_size=160,
        intermediate_size=428,
        num_heads=8,
        out_hidden_size=256,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=112,
        fullatt_block_indexes=(7,),
    ),
)
COMPUTE = options.Compute(remat=True, tower_remat=True, query_chunk=256)


class Case(NamedTuple):
    """One row of the table."""

    program: str  # "sft" or "grpo"
    vision_tokens: int
    branches: int


CASES = [Case(p, v, b) for p, b in (("sft", 5), ("grpo", 8)) for v in (256, 1024)]


def make_batch(vision_tokens: int, branches: int) -> FrameBatch:
    """One frame of noise with so many branches, as NumPy."""
    rng = np.random.default_rng(0)
    side = int(vision_tokens**0.5) * 2
    tower = ARCHITECTURE.vision
    layout = grid.arrange([(side, side)], side=tower.window_side, merge=2)
    ids = np.concatenate([rng.integers(2, 9000, TEXT), np.full(vision_tokens, IMAGE)]).astype(np.int32)
    positions, next_pos = grid.rope_positions(ids, IMAGE, [(side, side)], 2)
    unit = np.full(ids.size, -1, np.int32)
    unit[ids == IMAGE] = layout.unit_of_token
    T = QUESTION + COMPLETION
    tokens = rng.integers(2, 9000, (branches, T)).astype(np.int32)
    slots = np.arange(branches)[:, None] * T + QUESTION - 1 + np.arange(COMPLETION)
    patches = rng.normal(size=(*layout.source_WS.shape, tower.values_per_patch)).astype(np.float32)
    example = FrameBatch(
        patches,
        layout.hw_WS2,
        layout.image_WS,
        ids,
        unit,
        positions,
        np.ones(ids.size, bool),
        tokens,
        np.broadcast_to(next_pos + np.arange(T, dtype=np.int32), tokens.shape),
        np.ones_like(tokens),
        slots.reshape(-1).astype(np.int32),
        tokens[:, QUESTION:].reshape(-1),
        np.ones(slots.size, np.float32),
    )
    return FrameBatch(*(np.asarray(field)[None] for field in example))


def repeated(batch: FrameBatch) -> FrameBatch:
    """The same branches as rows of their own, the prefix repeated."""
    _, J, T = batch.branch_ids_BJT.shape
    rows = FrameBatch(*(np.repeat(field, J, axis=0) for field in batch))
    lanes = {
        name: getattr(batch, name)[0][:, None] for name in ("branch_ids_BJT", "branch_pos_BJT", "branch_segment_BJT")
    }
    score = {
        name: getattr(batch, name).reshape(J, -1) for name in ("score_slot_BL", "score_target_BL", "score_weight_BL")
    }
    score["score_slot_BL"] = score["score_slot_BL"] % T
    return rows._replace(**lanes, **score)


def program(case: Case, batch: FrameBatch):
    """The compiled step and its arguments behind the state."""
    graph, _ = model.build(ARCHITECTURE, COMPUTE)
    params = model.init(ARCHITECTURE, 0)
    data = options.Data(root="", frames=batch.prefix_ids_BP.shape[0])
    plan = options.Schedule(steps=100)
    if case.program == "sft":
        settings = options.SFT(model="", data=data, schedule=plan)
        tx = optim.transformation(settings.optimizer, 100, params)
        dynamic = ({}, batch, None)
        step = functools.partial(sft.train_step, graph, tx, settings=settings)
    else:
        settings = options.GRPO(model="", data=data, schedule=plan, sampler=options.Sampler(max_tokens=COMPLETION))
        tx = optim.transformation(settings.optimizer, 100, params)
        shape = (*batch.branch_ids_BJT.shape[:2], COMPLETION)
        count = shape[0] * shape[1]
        advantage = np.linspace(-1, 1, count, dtype=np.float32).reshape(shape[:2])
        zeros = np.zeros(shape, np.float32)
        experience = grpo.Experience(batch, np.ones(shape, bool), zeros - 9.8, zeros, advantage)
        dynamic = ({}, experience, jnp.ones(ARCHITECTURE.text.vocab_size, bool), np.int32(0))
        step = functools.partial(grpo.update_step, graph, tx, settings)
    lowered = jax.jit(step, donate_argnums=0).lower(optim.start(params, tx), *dynamic)
    return lowered.compile(), optim.start(params, tx), dynamic


def measure(case: Case, batch: FrameBatch, repeats: int) -> dict:
    """Median seconds, peak bytes and the first step's loss and gradient norm."""
    compiled, state, dynamic = program(case, batch)
    seconds, first = [], None
    for _ in range(repeats + 1):
        since = time.perf_counter()
        state, stats = compiled(state, *dynamic)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - since)
        first = first or {name: float(stats[name]) for name in ("loss", "grad_norm")}
    memory = compiled.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return first | {"seconds": statistics.median(seconds[1:]), "peak_bytes": peak - memory.alias_size_in_bytes}


def compare(case: Case, repeats: int) -> dict:
    """Both layouts of a case, one after the other in this process."""
    shared = make_batch(case.vision_tokens, case.branches)
    flat = repeated(shared)
    ours, theirs = measure(case, shared, repeats), measure(case, flat, repeats)
    for name in ("loss", "grad_norm"):
        if not np.isclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6):
            sys.exit(f"{case}: {name} differs between the layouts: {ours[name]} and {theirs[name]}")
    cost = flops.of_model(ARCHITECTURE).training
    bound = flops.count(cost, flops.of_batch(flat)) / flops.count(cost, flops.of_batch(shared))
    speedup = theirs["seconds"] / ours["seconds"]
    return case._asdict() | {
        "shared_s": ours["seconds"],
        "flat_s": theirs["seconds"],
        "speedup": speedup,
        "flop_bound": bound,
        "of_bound": speedup / bound,
        "memory_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
        "shared_mib": ours["peak_bytes"] / 2**20,
        "flat_mib": theirs["peak_bytes"] / 2**20,
    }


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each side (default 3)")
    parser.add_argument("--out", help="also write the rows as JSON")
    args = parser.parse_args()
    rows = []
    for case in CASES:
        rows.append(compare(case, args.repeats))
        print({name: round(x, 3) if isinstance(x, float) else x for name, x in rows[-1].items()}, flush=True)
    table = Table(*("program", "vision tokens", "branches", "flat s", "shared s", "speed-up", "FLOP bound"))
    for name in ("of bound", "flat MiB", "shared MiB", "memory ratio"):
        table.add_column(name, justify="right")
    for r in rows:
        times = f"{r['flat_s']:.2f}", f"{r['shared_s']:.2f}", f"{r['speedup']:.2f}", f"{r['flop_bound']:.2f}"
        memory = f"{r['of_bound']:.2f}", f"{r['flat_mib']:.0f}", f"{r['shared_mib']:.0f}", f"{r['memory_ratio']:.2f}"
        table.add_row(r["program"], str(r["vision_tokens"]), str(r["branches"]), *times, *memory)
    Console(width=140).print(table)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
