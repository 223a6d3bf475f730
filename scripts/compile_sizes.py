#!/usr/bin/env python
"""What released sizes take on TPU slices, told by the TPU compiler on a CPU: nothing is run, no weights are needed.

Compiles the programs of a run (`surgery_r1_jax/programs.py`) on abstract arrays and prints the peak of bytes on a
device (what else lies there meanwhile included) or the compiler's refusal, what the devices send each other, stacks of
layers that are held whole, and the seconds of compiling. A frame has 1280 x 1024 pixels, which each family resizes in
its way; for SFT it has 6 branches of 256 tokens, for GRPO one question of 32 tokens and `samples` completions. Exit
status 1: a run does not fit, or takes more than its bar or five minutes to compile, or one that must not fit does, or a
stack is held whole. Needs libtpu: scripts/compile_sizes.sh makes an environment with it and calls this.

    scripts/compile_sizes.sh --size Qwen2.5-VL-3B --config configs/sft_3b.yaml --slice v5e:2x4
    scripts/compile_sizes.sh --size Qwen3-VL-8B --config configs/grpo_7b.yaml --sweep v5e
    scripts/compile_sizes.sh --out sizes.json      # every row of the README's table, in an hour
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No TPU is looked for: the compiler alone is wanted.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from surgery_r1_jax import hlo, model, options, programs, sharding, sizes
from surgery_r1_jax.batch import FrameBatch, Shape

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GIB = 2**30
HBM = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}  # GiB that a program may use on a chip
SLICES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
PIXELS = 1280, 1024  # of a frame, which each family resizes to whole units of its patches
TEXT = 90  # tokens around the image: system text and template
LANES = Shape(windows=0, prefix=0, lanes=6, lane_tokens=256, scored=6 * 256)  # of SFT; every token scored, the most
QUESTION = 32


class Case(NamedTuple):
    """A run on a slice."""

    size: str
    config: str  # file in configs/
    overrides: tuple[str, ...]
    slice: str  # "v5e:4x4", or "v5e" for the smallest that holds it
    mesh: tuple[int, int, int] = (1, -1, 1)  # data, fsdp, tensor
    frames: int = 1  # on each of the devices that frames are spread over
    bar: float = math.inf  # GiB that no program may exceed; 0: at least one must be refused
    effort: float = -1.0  # of the compiler at quick programs


TOWER = "--optimizer.rates.tower=1"
WITHOUT = "--compute.remat=false", "--compute.tower_remat=false"
OFFLOAD = "--compute.offload=true"
LORA = "--lora.rank=64", "--lora.base=bfloat16"
REFUSED = 0.0
README = [
    Case("Qwen2.5-VL-3B", "sft_3b.yaml", (TOWER,), "v5e:2x4", bar=11),
    Case("Qwen2.5-VL-3B", "sft_3b.yaml", (TOWER,), "v5e:2x4", bar=11, effort=0),
    Case("Qwen2.5-VL-3B", "sft_3b.yaml", (TOWER, *WITHOUT), "v5e:2x4", bar=REFUSED),
    Case("Qwen2.5-VL-3B", "sft_3b.yaml", (TOWER,), "v5e:2x2", bar=REFUSED),
    Case("Qwen2.5-VL-3B", "sft_3b.yaml", (TOWER, OFFLOAD), "v5e:2x2"),
    Case("Qwen2.5-VL-3B", "sft_3b.yaml", (TOWER, OFFLOAD), "v5e:2x2", effort=0),
    Case("Qwen2.5-VL-3B", "grpo_3b.yaml", (TOWER,), "v5e"),
    Case("Qwen2.5-VL-3B", "grpo_3b.yaml", (TOWER, OFFLOAD), "v5e"),
    Case("Qwen2.5-VL-7B", "sft_7b.yaml", (TOWER,), "v5e"),
    Case("Qwen2.5-VL-7B", "sft_7b.yaml", (TOWER, OFFLOAD), "v5e"),
    Case("Qwen2.5-VL-7B", "grpo_7b.yaml", (TOWER,), "v5e:4x4", bar=13),
    Case("Qwen2.5-VL-7B", "grpo_7b.yaml", (TOWER,), "v5e:4x4", bar=13, effort=0),
    Case("Qwen2.5-VL-7B", "grpo_7b.yaml", (TOWER,), "v5e:4x4", frames=2),
    Case("Qwen2.5-VL-7B", "grpo_7b.yaml", (TOWER,), "v5e:4x4", frames=2, effort=0),
    Case("Qwen2.5-VL-7B", "grpo_7b.yaml", (TOWER,), "v5e:2x4", bar=REFUSED),
    Case("Qwen2.5-VL-7B", "grpo_7b.yaml", (TOWER, OFFLOAD), "v5e:2x4"),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", LORA, "v5e:8x8", bar=10),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", LORA, "v5e:8x8", bar=10, effort=0),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", (*LORA, *WITHOUT), "v5e:8x8", bar=REFUSED),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", LORA, "v5e:4x8"),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", LORA, "v5e:4x8", effort=0),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", LORA, "v5p:2x2x4", bar=17),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", LORA, "v5p:2x2x4", effort=0),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", (*LORA, OFFLOAD), "v5p:2x2x4", bar=17, effort=0),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", (*LORA, *WITHOUT), "v5p:2x2x4", bar=REFUSED),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", (TOWER,), "v5p:4x4x4", bar=30),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", (TOWER,), "v5p:4x4x4", bar=30, effort=0),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", (TOWER,), "v5p:2x2x2", bar=REFUSED),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", (TOWER,), "v5p:2x2x4"),
    Case("Qwen3-VL-8B", "sft_7b.yaml", (TOWER,), "v5e"),
    Case("Qwen3-VL-8B", "sft_7b.yaml", (TOWER,), "v5e:4x4", effort=0),
    Case("Qwen3-VL-8B", "grpo_7b.yaml", (TOWER,), "v5e"),
    Case("Qwen3-VL-8B", "grpo_7b.yaml", (TOWER,), "v5e:4x4", effort=0),
    Case("Qwen3-VL-8B", "sft_7b.yaml", (TOWER, OFFLOAD), "v5e"),
    Case("Qwen3-VL-8B", "grpo_7b.yaml", (TOWER, OFFLOAD), "v5e"),
]


def job_of(case: Case) -> programs.Job:
    """The run with its mesh on the chips of the slice."""
    chips = topologies.get_topology_desc(case.slice, platform="tpu").devices
    mesh = sharding.make_mesh(case.mesh, chips)
    frames = case.frames * sharding.frame_devices(mesh)
    given = {"data.frames": frames, "accumulate": 1, "compute.mesh": list(case.mesh)}
    settings = options.load(CONFIGS / case.config, [*(f"--{k}={v}" for k, v in given.items()), *case.overrides])
    architecture = sizes.architecture(case.size)
    lanes = LANES if isinstance(settings, options.SFT) else asked(1)
    return programs.Job(settings, architecture, mesh, batch_of(architecture, lanes, frames))


def asked(questions: int) -> Shape:
    """Lanes that hold a question each."""
    return LANES._replace(lanes=questions, lane_tokens=QUESTION, scored=1)


def batch_of(architecture: model.Config, lanes: Shape, frames: int) -> FrameBatch:
    """Frames of PIXELS as near as patches come to it, with their system text."""
    unit = architecture.vision.patch_size * architecture.vision.spatial_merge_size
    image = tuple(round(n / unit) * unit for n in PIXELS)
    return programs.blank_batch(architecture, image, TEXT, lanes, frames)


def compiled(case: Case, only: set[str]) -> list[dict]:
    """A row for each of the run's programs."""
    job = job_of(case)
    rows, limit = [], HBM[case.slice.partition(":")[0]]
    listed = programs.of(job) | {"evaluation": programs.evaluation(evaluated(job))}
    about = case._asdict() | {"mesh": list(job.mesh.shape.values()), "query_chunk": job.settings.compute.query_chunk}
    about |= {"kind": type(job.settings).__name__, "bar": case.bar if math.isfinite(case.bar) else limit}
    about |= {name: getattr(job.settings.compute, name) for name in ("remat", "offload")}
    for name, program in listed.items():
        if only and name not in only:
            continue
        row = about | {"program": name, "beside_gib": program.beside / GIB}
        lowered = program.lower()
        since, busy = time.monotonic(), time.process_time()
        try:
            how = dict(exec_time_optimization_effort=case.effort, xla_tpu_user_reserved_hbm_bytes=program.beside)
            made = lowered.compile(how)
        except jax.errors.JaxRuntimeError as refusal:
            if "RESOURCE_EXHAUSTED" not in str(refusal):
                raise
            row |= {"fits": False, "peak_gib": None, "refusal": reason(str(refusal))}
        else:
            peak, text = programs.peak(made) + program.beside, made.as_text()
            row |= {"fits": peak / GIB <= limit, "peak_gib": peak / GIB}
            row["sent"] = {kind: sent._asdict() for kind, sent in hlo.collectives(text).items()}
            row["whole_stacks"] = hlo.whole_stacks(text, programs.stacks(job))
        row |= {"compile_s": time.monotonic() - since, "compile_cpu_s": time.process_time() - busy}
        rows.append(row)
        print(line(row), flush=True)
    return rows


def evaluated(job: programs.Job) -> programs.Job:
    """The same run with a batch of its evaluation, as many frames as are trained on."""
    questions = asked(job.settings.evaluation.questions)
    return job._replace(batch=batch_of(job.architecture, questions, job.settings.data.frames))


def reason(refusal: str) -> str:
    """How much more than there is a program asks for."""
    found = re.search(r"Used ([\d.]+\w+) of ([\d.]+\w+) hbm|\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)", refusal)
    return "{} of {}".format(*filter(None, found.groups())) if found else refusal.splitlines()[0][:120]


def line(row: dict) -> str:
    """A row as it comes."""
    told = f"{row['peak_gib']:.2f} GiB" if row["peak_gib"] else f"refused ({row['refusal']})"
    what = f"{row['size']} {row['kind']} {row['program']} on {row['slice']} {'x'.join(map(str, row['mesh']))}"
    return f"{what} {' '.join(row['overrides'])}: {told}, {row['compile_s']:.0f} s"


def met(rows: list[dict]) -> bool:
    """Whether a run takes no more than it may, compiled soon enough, or is refused where it must be."""
    if rows[0]["bar"] == REFUSED:
        return not all(row["fits"] for row in rows)
    return all(row["fits"] and row["peak_gib"] <= row["bar"] and row["compile_s"] <= SLOWEST_S for row in rows)


SLOWEST_S = 300  # to compile a program in
PROGRAMS = "update", "rollout", "reference", "evaluation"
HEADS = ["run", "slice", "frames a chip", "bar, GiB", "update: peak GiB", "rollout", "reference", "evaluation"]
HEADS += ["update: gathered, reduced, other GiB sent", "compile s"]


def cells(rows: list[dict]) -> list[str]:
    """A run in the table, of a row for each of its programs."""
    first, of_program = rows[0], {row["program"]: row for row in rows}
    adapted = "LoRA " * any("lora.rank" in setting for setting in first["overrides"])
    how = ", no remat" * (not first["remat"]) + ", offloaded" * first["offload"]
    how += f", effort {first['effort']:g}" * (first["effort"] != Case._field_defaults["effort"])
    mesh = "x".join(map(str, first["mesh"]))
    chips = math.prod(first["mesh"])
    update = of_program.get("update", {})
    sent = {kind: each["bytes"] / GIB for kind, each in update.get("sent", {}).items()}
    gathered, reduced = sent.pop("all-gather", 0), sent.pop("all-reduce", 0) + sent.pop("reduce-scatter", 0)
    return [
        f"{first['size']} {adapted}{first['kind']}{how}",
        first["slice"] + f", {mesh}" * (mesh != f"1x{chips}x1"),
        str(first["frames"]),
        "refused" if first["bar"] == REFUSED else f"{first['bar']:.4g}",
        *(peak(of_program.get(name)) for name in PROGRAMS),
        f"{gathered:.0f}, {reduced:.0f}, {sum(sent.values()):.1f}" if update.get("peak_gib") else "",
        f"{max(row['compile_s'] for row in rows):.0f}",
    ]


def peak(row: dict | None) -> str:
    """What a program takes."""
    if row is None:
        return ""
    if row["peak_gib"] is None:
        return f"refused: {row['refusal']}"
    return f"{row['peak_gib']:.1f}" + ", too much" * (not row["fits"])


def markdown(runs: list[list[dict]]) -> str:
    """The table for the README."""
    lines = [HEADS, ["---"] * len(HEADS), *map(cells, runs)]
    return "\n".join("| " + " | ".join(each) + " |" for each in lines) + "\n"


def sweep(case: Case, only: set[str]) -> Iterator[list[dict]]:
    """The slices of a family from the smallest up to the first that holds every program of the run."""
    for size in SLICES[case.slice]:
        rows = compiled(case._replace(slice=f"{case.slice}:{size}"), only)
        if all(row["fits"] for row in rows):
            yield rows
            return
        yield [row | {"bar": REFUSED} for row in rows]  # is smaller than what holds it
    sys.exit(f"no slice of {case.slice} holds it")


def main() -> int:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="what else is given as --section.key=value is a setting of the run",
    )
    parser.add_argument("--size", choices=sizes.RELEASED, help="default: every row of the README's table")
    parser.add_argument("--config", default="sft_3b.yaml", help="a file in configs/")
    parser.add_argument("--slice", default="v5e:2x4", help="such as v5e:2x4 or v5p:2x2x4")
    parser.add_argument("--sweep", choices=SLICES, help="instead: from the smallest slice up to one that holds it")
    parser.add_argument("--mesh", default="1,-1,1", help="chips along data, fsdp and tensor; -1: what is left")
    parser.add_argument("--frames", type=int, default=1, help="frames on each chip that frames are spread over")
    parser.add_argument("--programs", default="", help="only these, such as update,rollout,reference,evaluation")
    parser.add_argument("--effort", type=float, default=-1.0, help="XLA's, at quick programs, -1 to 1; a run has 0")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON, and beside it the table as Markdown")
    args, overrides = parser.parse_known_args()
    only = {name for name in args.programs.split(",") if name}
    cases = README
    if args.size:
        mesh = tuple(int(n) for n in args.mesh.split(","))
        config, chosen = Path(args.config).name, args.sweep or args.slice
        cases = [Case(args.size, config, tuple(overrides), chosen, mesh, args.frames, effort=args.effort)]
    elif overrides:
        sys.exit("settings go with --size")
    runs: list[list[dict]] = []
    for case in cases:
        for rows in [compiled(case, only)] if ":" in case.slice else sweep(case, only):
            runs.append(rows)
            if args.out:
                args.out.write_text(json.dumps(list(itertools.chain(*runs)), indent=2) + "\n")
                args.out.with_suffix(".md").write_text(markdown(runs))
    table = Table(*HEADS)
    for rows in runs:
        table.add_row(*cells(rows))
    Console(width=200).print(table)
    faults = [f"{' '.join(cells(rows)[:2])}: not as its bar says" for rows in runs if not met(rows)]
    for row in itertools.chain(*runs):
        if whole := row.get("whole_stacks"):
            faults.append(f"{row['size']} {row['kind']} {row['program']} holds whole: {', '.join(whole)}")
    print("\n".join(faults) or "all as it must be")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
