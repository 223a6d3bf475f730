"""Sums of arrays' bits: they tell values from others, wherever they lie and however they are spread.

Bits are added up on the devices, modulo 2^32, once plainly and once times odd numbers that tell their places: no single
bit can change without changing a sum.
"""

import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Sums = dict[str, list[int]]  # two numbers for each path of a tree


def of(tree: Any, dtype: str | None = None) -> Sums:
    """The sums of all leaves, in this precision or each in its own."""
    return {name: [int(n) for n in pair] for name, pair in jax.device_get(_of_all(named(tree), dtype)).items()}


def named(tree: Any) -> dict[str, Any]:
    """The leaves by their paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def digest(params: dict, dtype: str = "float32") -> str:
    """One hash of parameters in a precision, to tell one model from another."""
    return hashlib.sha256(json.dumps(sorted(of(params, dtype).items())).encode()).hexdigest()


@functools.partial(jax.jit, static_argnums=1)
def _of_all(leaves: dict[str, jax.Array], dtype: str | None) -> dict[str, tuple[jax.Array, jax.Array]]:
    here = jax.device_put(leaves, jax.memory.Space.Device)  # moments may be kept in the host's memory
    return {name: _of_one(leaf.astype(dtype or leaf.dtype)) for name, leaf in here.items()}


def _of_one(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    # Both at once: for two sums the compiler would lay the bits out in memory, four times what bfloat16 takes.
    none, plus = jnp.uint32(0), lambda a, b: (a[0] + b[0], a[1] + b[1])
    return jax.lax.reduce((bits, bits * (2 * place + 1)), (none, none), plus, tuple(range(bits.ndim)))
