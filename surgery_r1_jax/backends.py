"""What computes attention where: XLA anywhere, our kernels on a TPU, cuDNN's on an NVIDIA GPU.

A back end is a value that is called like `attention.attend` and gives the same but for rounding, gradients included;
only what a query with nothing to see gets (padding) is each one's own, if finite. Layers are given one for what is
large: prefixes, branches, whole images. Windows and cached decoding have few scores and stay with XLA.

The kernels know rows of queries over rows of keys. Lanes that share a prefix become one row over the prefix and all
lanes' keys, marked so that each query sees the prefix and its own branch: nothing is repeated, and there is one
softmax. Ours skip the blocks of other lanes; cuDNN computes them and masks.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from surgery_r1_jax import attention, errors, flash, options, sharding
from surgery_r1_jax.attention import Keys, Queries
from surgery_r1_jax.flash import EVERYBODY, NOBODY, Marks


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A back end whose `run` takes what `flash.attend` takes; each device of the mesh has its own frames and heads."""

    run: Callable[..., jax.Array]
    mesh: Mesh | AbstractMesh | None = None  # None: a single device

    def __call__(self, q_BJTNH: jax.Array, queries: Queries, own: Keys, prefix: Keys | None = None) -> jax.Array:
        """See `attention.attend`."""
        arrays = q_BJTNH, _timed(queries), _timed(own), prefix and _timed(prefix)
        if self.mesh is None:
            return self._lanes(*arrays)
        arrays, specs = _spread(*arrays, self.mesh)
        return jax.shard_map(self._lanes, mesh=self.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)

    def _lanes(self, q_BJTNH, *keys):
        return self.run(*in_rows(q_BJTNH, *keys)).reshape(q_BJTNH.shape)


def cudnn(q_BTNH, k_BUKH, v_BUKH, queries: Marks, keys: Marks, implementation: str = "cudnn") -> jax.Array:
    """What `flash.attend` computes by `jax.nn.dot_product_attention`, the mask as an array: one for all heads."""
    (T, _, H), U = q_BTNH.shape[1:], k_BUKH.shape[1]
    mask = flash.sees(*(mark[:, None, :, None] for mark in queries), *(mark[:, None, None] for mark in keys))
    # cuDNN takes even lengths and head sizes that are multiples of eight; what is added is masked, or nought.
    q, k, v = (_padded(x, (0, x.shape[1] % 2, 0, -H % 8)) for x in (q_BTNH, k_BUKH, v_BUKH))
    mask = _padded(mask, (0, 0, T % 2, U % 2))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=H**-0.5, implementation=implementation)
    return out[:, :T, :, :H]


def choose(compute: options.Compute, mesh: Mesh | AbstractMesh | None = None) -> attention.XLA | Kernel:
    """The back end that `compute.attention` asks for on the devices of a mesh.

    `auto` takes what the devices have, and XLA without a mesh or with one of no devices. Raises InputError for what
    the devices do not have, which without a mesh are those of this machine.
    """
    wanted, present = compute.attention, isinstance(mesh, Mesh)
    device = mesh.devices.flat[0] if present else jax.devices()[0]
    for name, run, problem in (("pallas", flash.attend, _no_tpu), ("cudnn", cudnn, _no_cudnn)):
        if wanted == name or (wanted == "auto" and present):
            reason = problem(device, compute.dtype)
            if reason is None:
                return Kernel(run, mesh)
            if wanted == name:
                raise errors.InputError(f"compute.attention {name}: {reason}; take auto or xla")
    return attention.XLA(compute.query_chunk)


def _no_tpu(device, dtype: str) -> str | None:
    """Why our kernels cannot run on a device."""
    if device.platform != "tpu":
        return f"needs TPUs, and here is '{device.device_kind}'"
    return "there is no float64 on TPUs" if dtype == "float64" else None


def _no_cudnn(device, dtype: str) -> str | None:
    """Why cuDNN's attention cannot run on a device."""
    if dtype != "bfloat16":
        return f"needs compute.dtype bfloat16, not {dtype}"
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    if device.platform != "gpu" or not major.isdecimal() or int(major) < 8:
        return f"needs NVIDIA GPUs of compute capability 8.0 or more, and here is '{device.device_kind}'"
    try:
        x = jax.ShapeDtypeStruct((1, 2, 1, 8), dtype)
        jax.eval_shape(lambda x: jax.nn.dot_product_attention(x, x, x, implementation="cudnn"), x)
    except (RuntimeError, NotImplementedError) as refusal:
        return f"JAX says '{refusal}'"
    return None


def in_rows(q_BJTNH: jax.Array, queries: Queries, own: Keys, prefix: Keys | None) -> tuple:
    """The arguments of a kernel. Without a prefix each lane is a row of its own; with one all
    lanes of a frame are one row over all its keys.
    """
    B, J = q_BJTNH.shape[:2]
    sees, seen = Marks(*queries), Marks(_filled(own.segment, own.segment), own.order)
    if prefix is None:
        merged = lambda x: x.reshape(B * J, *x.shape[2:])  # noqa: E731
        return jax.tree.map(merged, (q_BJTNH, own.key, own.value, sees, seen))
    # Segments are told apart across lanes, lane by lane, so that a block of queries meets few blocks of keys.
    step = 1 + jnp.maximum(sees.segment.max(), seen.segment.max())
    lane = jnp.arange(J, dtype=step.dtype)[:, None] * step
    sees = Marks(jnp.where(sees.segment > 0, sees.segment + lane, 0), sees.order)
    seen = Marks(jnp.where(seen.segment > 0, seen.segment + lane, NOBODY), seen.order)
    flat = lambda x: x.reshape(B, -1, *x.shape[3:])  # noqa: E731
    behind = lambda first, rest: jnp.concatenate([first, flat(rest)], axis=1)  # noqa: E731
    shared = _filled(prefix.segment, EVERYBODY)
    marks = Marks(behind(shared, seen.segment), behind(jnp.zeros_like(shared), seen.order))
    keys = (behind(first, rest) for first, rest in ((prefix.key, own.key), (prefix.value, own.value)))
    return flat(q_BJTNH), *keys, jax.tree.map(flat, sees), marks


def _filled(segment, mark):
    return jnp.where(segment > 0, mark, NOBODY)


def _timed(side):
    """Queries or keys with a place in time for each; one that all can see is the first."""
    order = 0 if side.order is None else side.order
    return side._replace(order=jnp.broadcast_to(jnp.asarray(order, jnp.int32), side.segment.shape))


def _spread(q_BJTNH, queries, own, prefix, mesh):
    """The arrays and how they lie on the mesh: frames over its frame axes, heads over `tensor`, where these divide.

    Fewer key heads than devices along `tensor` are repeated, so that each device has the one that its queries want.
    """
    tensor, (B, N, K) = mesh.shape["tensor"], (q_BJTNH.shape[0], q_BJTNH.shape[3], own.key.shape[3])
    frames = sharding.FRAMES[0] if B % sharding.frame_devices(mesh) == 0 else None
    if N % tensor == 0 and tensor % K == 0:
        own, prefix, K = _repeated(own, tensor // K), prefix and _repeated(prefix, tensor // K), tensor
    heads = "tensor" if N % tensor == K % tensor == 0 else None

    def spec(x):
        return PartitionSpec(frames, *(None,) * (x.ndim - 3), heads) if x.ndim > 3 else PartitionSpec(frames)

    arrays = q_BJTNH, queries, own, prefix
    return arrays, jax.tree.map(spec, arrays)


def _repeated(keys: Keys, times: int) -> Keys:
    return keys._replace(key=jnp.repeat(keys.key, times, axis=-2), value=jnp.repeat(keys.value, times, axis=-2))


def _padded(x, more):
    return jnp.pad(x, [(0, n) for n in more])
