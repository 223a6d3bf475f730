#!/usr/bin/env python
"""Compile attention, forward and backward, for TPUs at real sizes, without one: does it compile, what memory it takes.

Each case of `bench_attention.py` is compiled with XLA's attention, with it in chunks of 512 queries, and with our
kernels; a frame on one chip, and two frames on four (frames over two, heads over two). Printed is what the compiler
reserves on a chip beside arguments and results.

    pip install libtpu==0.0.42.1      # the one that the installed jax wants
    .venv/bin/python scripts/compile_attention.py
    .venv/bin/python scripts/compile_attention.py --topology v5p:2x2x1 --dtype float32
"""

import argparse
import os
import sys
import time

# Read by libtpu when it is loaded: no metadata server is asked, and another process may have it loaded too.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-8",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

import jax
from bench_attention import CASES, arguments, memory, program
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from surgery_r1_jax import attention, backends, options, sharding

KERNELS = 3  # forward, gradient of the queries, gradient of keys and values


def main() -> int:
    """Compile all cases and print the table; status 1 if one does not compile with our kernels, or without them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2", help="four chips of a kind (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    chosen = parser.parse_args()
    try:
        chips = topologies.get_topology_desc(chosen.topology, platform="tpu").devices
    except Exception as refusal:
        print(
            f"no compiler for {chosen.topology} ({str(refusal).splitlines()[0]}); pip install libtpu", file=sys.stderr
        )
        return 2
    spread = {1: sharding.make_mesh((1, 1, 1), chips[:1]), 2: sharding.make_mesh((1, 2, 2), chips[:4])}
    table = Table("case", "chips", "attention", "MiB", "seconds to compile", title=f"{chosen.topology}, {chosen.dtype}")
    status = 0
    for case in CASES:
        for frames, mesh in spread.items():
            ours = backends.choose(options.Compute(dtype=chosen.dtype), mesh)
            for way, attend in {"XLA": attention.XLA(), "XLA, 512 queries": attention.XLA(512), "ours": ours}.items():
                given, began = arguments(case, frames, chosen.dtype, mesh), time.perf_counter()
                try:
                    made = program(attend, case).lower(*given).compile()
                    needed = f"{memory(made):,.0f}"
                    status |= attend is ours and made.as_text().count("tpu_custom_call") < KERNELS
                except jax.errors.JaxRuntimeError as refusal:
                    needed = str(refusal).splitlines()[0][:60]
                    status |= attend is ours
                table.add_row(case.name, str(mesh.size), way, needed, f"{time.perf_counter() - began:.1f}")
                print(f"{case.name}, {mesh.size} chips, {way}: {needed}", file=sys.stderr, flush=True)
    Console().print(table)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
