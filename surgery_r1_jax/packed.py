"""Frozen kernels in four bits (QLoRA): a quarter of bfloat16's memory, unpacked where a layer uses them.

Source: QLoRA, arXiv 2305.14314, blocks of 64 numbers with a scale each; the arithmetic is qwix's (google/qwix).
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from surgery_r1_jax import errors, lora, model, optim

BLOCK = 64  # numbers along a kernel's inputs that share a scale


@flax.struct.dataclass
class Packed:
    """A kernel that a linear layer reads as if it were an array."""

    values: object  # qwix.QArray

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return self.values.shape

    def __getitem__(self, index):
        if index is not Ellipsis:
            raise IndexError("a packed kernel is only read whole")
        return self

    def astype(self, dtype) -> jax.Array:
        """The kernel unpacked."""
        return _qwix().dequantize(self.values).astype(dtype)


def pack(base: dict, config: model.Config, kind: str) -> dict:
    """A base whose kernels in the decoder are packed as int4 or nf4; they are given away.

    Raises: InputError where qwix is not installed.
    """
    _qwix()
    flat = flatten_dict(base)
    for path, inputs in _kernels(config).items():
        make = functools.partial(_packed, kind=kind, inputs=inputs)
        kernel = flat[path]
        places = _places(jax.eval_shape(make, kernel), kernel.sharding)
        flat[path] = jax.jit(make, out_shardings=places)(kernel)
        kernel.delete()  # before the next is packed: none of its memory could be used again
    return unflatten_dict(flat)


def abstract(base: dict, config: model.Config, kind: str) -> dict:
    """What `pack` makes of abstract arrays, with their places."""
    flat = flatten_dict(base)
    for path, inputs in _kernels(config).items():
        made = jax.eval_shape(functools.partial(_packed, kind=kind, inputs=inputs), flat[path])
        flat[path] = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            made,
            _places(made, flat[path].sharding),
        )
    return unflatten_dict(flat)


def _kernels(config: model.Config) -> dict[tuple[str, ...], int]:
    """Paths of the kernels that are packed, and the axes that each contracts."""
    paths = [(*path.split("."), "kernel") for path in lora.linears(config)]
    return {path: optim.INPUTS.get(path[-2], 1) for path in paths if model.part_of(path) == "decoder"}


def _packed(kernel: jax.Array, kind: str, inputs: int) -> Packed:
    """Packed layer by layer, so that one layer is what is held in float32 beside the kernel."""
    tiled = inputs - 1  # the last of the inputs' axes
    others = [axis for axis in range(kernel.ndim - 1) if axis != tiled]
    size = math.gcd(kernel.shape[1 + tiled], BLOCK)
    how = dict(channelwise_axes=others, tiled_axes={tiled: size}, scale_dtype=jnp.bfloat16)
    return Packed(jax.lax.map(lambda layer: _qwix().quantize(layer.astype(jnp.float32), kind, **how), kernel))


def _places(made: Packed, kernel: NamedSharding) -> Packed:
    """Where values and scales live: as the kernel does, but for axes that have become too short to be shared out."""

    def place(leaf):
        axes = (*kernel.spec, *[None] * (leaf.ndim - len(kernel.spec)))
        fits = [axis and leaf.shape[i] % kernel.mesh.shape[axis] == 0 for i, axis in enumerate(axes)]
        spec = [axis if fit else None for axis, fit in zip(axes, fits, strict=True)]
        return NamedSharding(kernel.mesh, PartitionSpec(*spec))

    return jax.tree.map(place, made)


def _qwix():
    try:
        import qwix
    except ModuleNotFoundError:
        raise errors.InputError("lora.base int4 and nf4 need qwix; pip install qwix, or take bfloat16") from None
    return qwix
