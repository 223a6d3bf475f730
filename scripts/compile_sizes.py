#!/usr/bin/env python
"""What released sizes take on TPU slices, told by the TPU compiler on a CPU: nothing is run, no weights are needed.

Compiles the programs of a run (`surgery_r1_jax/programs.py`) on abstract arrays and prints, a line each, the peak of
bytes on a device (what else lies there meanwhile included), whether that fits, what the devices send each other,
stacks of layers that are held whole, and the seconds of compiling. A frame is 1288 x 1036 pixels; for SFT it has 6
branches of 256 tokens, for GRPO one question of 32 tokens and `samples` completions. Needs libtpu:
scripts/compile_sizes.sh makes an environment with it and calls this.

    scripts/compile_sizes.sh --size Qwen2.5-VL-3B --config configs/sft_3b.yaml --slice v5e:2x4
    scripts/compile_sizes.sh --size Qwen3-VL-8B --config configs/grpo_7b.yaml --sweep v5e
    scripts/compile_sizes.sh --out sizes.json      # every row of the README's table, in half an hour
"""

import argparse
import functools
import json
import os
import re
import sys
import time
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
PIXELS = 1288, 1036  # what Qwen-VL makes of a frame of 1280 x 1024, on the nearest whole units of its patches
TEXT = 90  # tokens around the image: system text and template
LANES = Shape(windows=0, prefix=0, lanes=6, lane_tokens=256, scored=6 * 256)  # of SFT; every token scored, the most
QUESTION = 32


class Case(NamedTuple):
    """A run on a slice."""

    size: str
    config: str  # file in configs/
    overrides: tuple[str, ...]
    slice: str  # "v5e:4x4"
    mesh: tuple[int, int, int]  # data, fsdp, tensor
    frames: int = 1  # on each of the devices that frames are spread over


ALL, TOWER = (1, -1, 1), "--optimizer.rates.tower=1"
WITHOUT = "--compute.remat=false", "--compute.tower_remat=false"
OFFLOAD = "--compute.offload=true"
LORA = "--lora.rank=64", "--lora.base=bfloat16"
README = [
    Case("Qwen2.5-VL-3B", "sft_3b.yaml", (TOWER,), "v5e:2x4", ALL),
    Case("Qwen2.5-VL-3B", "sft_3b.yaml", (TOWER, *WITHOUT), "v5e:2x4", ALL),
    Case("Qwen2.5-VL-3B", "sft_3b.yaml", (TOWER,), "v5e:2x2", ALL),
    Case("Qwen2.5-VL-3B", "sft_3b.yaml", (TOWER, OFFLOAD), "v5e:2x2", ALL),
    Case("Qwen2.5-VL-7B", "grpo_7b.yaml", (TOWER,), "v5e:4x4", ALL),
    Case("Qwen2.5-VL-7B", "grpo_7b.yaml", (TOWER,), "v5e:4x4", ALL, 2),
    Case("Qwen2.5-VL-7B", "grpo_7b.yaml", (TOWER,), "v5e:2x4", ALL),
    Case("Qwen2.5-VL-7B", "grpo_7b.yaml", (TOWER, OFFLOAD), "v5e:2x4", ALL),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", LORA, "v5e:8x8", ALL),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", (*LORA, *WITHOUT), "v5e:8x8", ALL),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", LORA, "v5e:4x8", ALL),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", LORA, "v5p:2x2x4", ALL),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", (TOWER,), "v5p:4x4x4", ALL),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", (TOWER,), "v5p:2x2x2", ALL),
    Case("Qwen2.5-VL-72B", "sft_7b.yaml", (TOWER,), "v5p:2x2x4", ALL),
    Case("Qwen3-VL-8B", "sft_7b.yaml", (TOWER,), "v5e", ALL),
    Case("Qwen3-VL-8B", "grpo_7b.yaml", (TOWER,), "v5e", ALL),
    Case("Qwen3-VL-8B", "sft_7b.yaml", (TOWER, OFFLOAD), "v5e", ALL),
    Case("Qwen3-VL-8B", "grpo_7b.yaml", (TOWER, OFFLOAD), "v5e", ALL),
]


def job_of(case: Case) -> programs.Job:
    """The run with its mesh on the chips of the slice."""
    chips = topologies.get_topology_desc(case.slice, platform="tpu").devices
    mesh = sharding.make_mesh(case.mesh, chips)
    frames = case.frames * mesh.shape["data"] * mesh.shape["fsdp"]
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


def compiled(case: Case, only: set[str], effort: float) -> list[dict]:
    """A row for each of the run's programs."""
    job = job_of(case)
    rows, limit = [], HBM[case.slice.partition(":")[0]]
    listed = programs.of(job) | {"evaluation": programs.evaluation(evaluated(job))}
    about = case._asdict() | {"mesh": list(job.mesh.shape.values()), "query_chunk": job.settings.compute.query_chunk}
    about |= {"kind": type(job.settings).__name__, "effort": effort}
    about |= {name: getattr(job.settings.compute, name) for name in ("remat", "offload")}
    for name, program in listed.items():
        if only and name not in only:
            continue
        row = about | {"program": name, "beside_gib": program.beside / GIB}
        lowered = program.lower()
        since, busy = time.monotonic(), time.process_time()
        try:
            how = dict(exec_time_optimization_effort=effort, xla_tpu_user_reserved_hbm_bytes=program.beside)
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


def cells(row: dict) -> list[str]:
    """A row of the table."""
    sent = {kind: each["bytes"] / GIB for kind, each in row.get("sent", {}).items()}
    gathered, reduced = sent.pop("all-gather", 0), sent.pop("all-reduce", 0) + sent.pop("reduce-scatter", 0)
    adapted = "LoRA " if any("lora.rank" in setting for setting in row["overrides"]) else ""
    how = ", no remat" * (not row["remat"]) + ", offloaded" * row["offload"]
    return [
        row["size"],
        f"{adapted}{row['kind']} {row['program']}{how}",
        f"{row['slice']}, {'x'.join(map(str, row['mesh']))}",
        str(row["frames"]),
        f"{row['peak_gib']:.1f}" if row["peak_gib"] else row["refusal"],
        "yes" if row["fits"] else "no",
        *(f"{size:.1f}" if row["peak_gib"] else "-" for size in (gathered, reduced, sum(sent.values()))),
        f"{row['compile_s']:.0f}",
    ]


HEADS = ["size", "program", "slice, mesh", "frames a chip", "peak GiB", "fits"]
HEADS += ["gathered GiB", "reduced", "otherwise sent", "compile s"]


def markdown(rows: list[dict]) -> str:
    """The table for the README."""
    lines = [HEADS, ["---"] * len(HEADS), *map(cells, rows)]
    return "\n".join("| " + " | ".join(each) + " |" for each in lines) + "\n"


def sweep(case: Case, family: str, only: set[str], effort: float) -> list[dict]:
    """The slices of a family from the smallest up to the first that holds every program of the run."""
    rows = []
    for size in SLICES[family]:
        found = compiled(case._replace(slice=f"{family}:{size}"), only, effort)
        rows += found
        if all(row["fits"] for row in found):
            break
    return rows


def main() -> int:
    """Compile, print, write; 1 if a program holds a whole stack of layers."""
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
    parser.add_argument("--effort", type=float, default=-1.0, help="at quick programs, -1 to 1; 0 is what a run has")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON, and beside it as Markdown")
    args, overrides = parser.parse_known_args()
    only = {name for name in args.programs.split(",") if name}
    cases = README
    if args.size:
        mesh = tuple(int(n) for n in args.mesh.split(","))
        config = Path(args.config).name
        cases = [Case(args.size, config, tuple(overrides), args.sweep or args.slice, mesh, args.frames)]
    elif overrides:
        sys.exit("settings go with --size")
    rows: list[dict] = []
    for case in cases:
        find = compiled if ":" in case.slice else functools.partial(sweep, family=case.slice)
        rows += find(case, only=only, effort=args.effort)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=2) + "\n")
            args.out.with_suffix(".md").write_text(markdown(rows))
    table = Table(*HEADS)
    for row in rows:
        table.add_row(*cells(row))
    Console(width=200).print(table)
    gathering = [row for row in rows if row.get("whole_stacks")]
    for row in gathering:
        print(f"{row['size']} {row['kind']} {row['program']} holds whole: {', '.join(row['whole_stacks'])}")
    return bool(gathering)


if __name__ == "__main__":
    sys.exit(main())
