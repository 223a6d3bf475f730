#!/usr/bin/env python
"""Attention forward and backward on this machine's accelerator: XLA's against what `compute.attention: auto` takes.

For each case the script prints seconds, memory beside arguments and results, and how far the gradients are from
XLA's in float32. Sizes are those of Qwen2.5-VL-3B's decoder on a frame of 1280 x 1024 and of its tower. On a machine
without an accelerator there is nothing to compare, and it says so.

    .venv/bin/python scripts/bench_attention.py
    .venv/bin/python scripts/bench_attention.py --frames 4 --repeats 20
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from surgery_r1_jax import attention, backends, options, sharding
from surgery_r1_jax.attention import Keys, Queries


class Case(NamedTuple):
    """Lanes, their tokens, and what they share."""

    name: str
    lanes: int
    tokens: int
    heads: int
    key_heads: int
    size: int  # of a head
    causal: bool
    prefix: int = 0  # tokens that all lanes see


CASES = [
    Case("prefix, 1,750 tokens", 1, 1750, 16, 2, 128, True),
    Case("branches, 6 x 256 over 1,750", 6, 256, 16, 2, 128, True, 1750),
    Case("branches, 16 x 300 over 1,750", 16, 300, 16, 2, 128, True, 1750),
    Case("tower, 6,400 patches", 1, 6400, 16, 16, 80, False),
]


def arguments(case: Case, frames: int, dtype: str, mesh):
    """Abstract queries, keys, values and segments, laid out as the model has them."""

    def array(dtype, *shape, heads=False):
        tail = (*(None,) * (len(shape) - 2), "tensor") if heads else ()
        where = NamedSharding(mesh, PartitionSpec(*sharding.FRAMES, *tail))
        return jax.ShapeDtypeStruct((frames, *shape), dtype, sharding=where)

    own = [array(dtype, case.lanes, case.tokens, n, case.size, heads=True) for n in (case.heads, *[case.key_heads] * 2)]
    shared = [array(dtype, case.prefix, case.key_heads, case.size, heads=True)] * 2 if case.prefix else []
    return own + shared, array("int32", case.lanes, case.tokens), array("int32", case.prefix)


def program(attend, case: Case):
    """The jitted gradient, by queries, keys and values, of the sum of squares of what filled places see."""

    def total(arrays, segment, filled):
        q, key, value, *shared = arrays
        order = jnp.arange(case.tokens)[None, None] if case.causal else None
        prefix = Keys(*shared, filled) if shared else None
        out = attend(q, Queries(segment, order), Keys(key, value, segment, order), prefix)
        return jnp.sum(jnp.where(segment[..., None, None] > 0, out, 0).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(total))


def drawn(abstract):
    """Numbers for abstract arrays; a sixth of the places is padding, at the end."""
    rng = np.random.default_rng(0)

    def draw(array):
        if array.dtype == jnp.int32:
            host = np.broadcast_to(np.arange(array.shape[-1]) < array.shape[-1] * 5 // 6, array.shape).astype(np.int32)
        else:
            host = rng.standard_normal(array.shape, np.float32).astype(array.dtype)
        return jax.device_put(host, array.sharding)

    return jax.tree.map(draw, abstract)


def seconds(run, given, repeats: int) -> float:
    """Median time of a run."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run(*given))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def memory(compiled) -> float:
    """MiB that a program reserves at its peak beside arguments and results."""
    used = compiled.memory_analysis()
    return (used.peak_memory_in_bytes - used.argument_size_in_bytes - used.output_size_in_bytes) / 2**20


def main() -> int:
    """Run all cases and print the table; status 1 if gradients are further off than bfloat16 explains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1, help="frames at a time (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="runs of each (default: %(default)s)")
    chosen = parser.parse_args()
    device = jax.devices()[0]
    mesh = sharding.make_mesh((1, 1, 1), [device])
    kernel = backends.choose(options.Compute(dtype="bfloat16"), mesh)
    if isinstance(kernel, attention.XLA):
        print(f"{device.device_kind}: auto takes XLA's attention here, there is nothing to compare it with")
        return 0
    ways = {"XLA": attention.XLA(), "XLA, 512 queries": attention.XLA(512), "auto": kernel}
    table = Table("case", "attention", "ms", "MiB", "gradients off by", title=f"{device.device_kind}, bfloat16")
    status = 0
    for case in CASES:
        given = drawn(arguments(case, chosen.frames, "bfloat16", mesh))
        wide = [x.astype(jnp.float32) for x in given[0]]
        want = program(attention.XLA(512), case)(wide, *given[1:])
        for way, attend in ways.items():
            try:
                run = program(attend, case).lower(*given).compile()
                gaps = jax.tree.map(lambda a, b: float(abs(a - b).max() / abs(b).max()), run(*given), want)
                took = seconds(run, given, chosen.repeats)
                table.add_row(case.name, way, f"{took * 1e3:.2f}", f"{memory(run):,.0f}", f"{max(gaps):.4f}")
                status |= max(gaps) > 0.05
            except jax.errors.JaxRuntimeError as refusal:
                table.add_row(case.name, way, str(refusal).splitlines()[0][:60])
                status |= attend is kernel
    Console().print(table)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
