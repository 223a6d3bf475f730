"""The mesh and the one table that says on which of its axes each logical axis lives.

Every parameter names its logical axes where it is made (see `layers.param`); an array axis whose name is not in
the table is an error, so that nothing is replicated by accident. Frames are spread over `data` and `fsdp`;
lanes and tokens are never split.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from surgery_r1_jax import errors

MESH_AXES = ("data", "fsdp", "tensor")
FRAMES = PartitionSpec(("data", "fsdp"))  # leading axis of every batch array
HOST = "pinned_host"  # kind of memory: a host's, which its devices reach
FREE = PartitionSpec.UNCONSTRAINED  # an array axis whose place is the compiler's choice

# Logical axis -> mesh axis. An axis that the mesh does not divide evenly (two key/value heads on four chips)
# is replicated.
RULES: dict[str, str | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "qkv": None,
    "mlp": "tensor",
    "norm": None,
    "patch": None,
    "place": None,
    "experts": "fsdp",
    "router": None,
    "gate_up": None,
    "vision": "fsdp",
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
    "merged": "tensor",
    "rank": "fsdp",  # where the other axis of an adapter's matrix is not already there
}


def make_mesh(shape: Sequence[int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of shape (data, fsdp, tensor); by default all devices along `fsdp`. -1 takes what is left over."""
    devices = jax.devices() if devices is None else list(devices)
    shape = list(shape or (1, -1, 1))
    if shape.count(-1) > 1 or len(shape) != len(MESH_AXES) or any(n < 1 and n != -1 for n in shape):
        raise errors.InputError(f"mesh {shape}: give data, fsdp and tensor sizes, at most one of them -1")
    known = int(np.prod([n for n in shape if n != -1]))
    shape = [len(devices) // known if n == -1 else n for n in shape]
    if int(np.prod(shape)) != len(devices):
        sizes = " x ".join(map(str, shape))
        raise errors.InputError(f"mesh {sizes} (data x fsdp x tensor) does not use exactly {len(devices)} devices")
    slices = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    if len(slices) > 1:
        raise errors.InputError(f"{len(slices)} slices of TPU chips; start the run on one of them")
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    check_owners(np.vectorize(lambda device: device.process_index)(mesh.devices))
    return mesh


def check_owners(process_DFT: np.ndarray) -> None:
    """Raises InputError where devices of several processes share frames: each process reads frames of its own.

    `process_DFT` holds the process of each device of a mesh.
    """
    if (process_DFT != process_DFT[..., :1]).any():
        size = process_DFT.shape[-1]
        raise errors.InputError(
            f"compute.mesh: its tensor axis of {size} reaches over several processes, which share no frames; make it "
            "as long as one of them has devices, or shorter"
        )


def spec(axes: Sequence[str], shape: Sequence[int], mesh: Mesh, where: str = "") -> PartitionSpec:
    """The partition of an array with these logical axes. Raises InputError for an axis without a rule."""
    parts: list[str | None] = []
    for name, size in zip(axes, shape, strict=True):
        if name not in RULES:
            raise errors.InputError(
                f"parameter {where or axes}: no sharding rule for axis '{name}'; add it to sharding.RULES"
            )
        target = RULES[name]
        fits = target is not None and target not in parts and size % mesh.shape[target] == 0
        parts.append(target if fits else None)
    return PartitionSpec(*parts)


def of_params(abstract: nnx.State, mesh: Mesh) -> dict:
    """Shardings of all parameters, as the nested dict that `nnx.to_pure_dict` gives of the same state."""
    flat = {}
    for path, variable in nnx.to_flat_state(abstract):
        where = ".".join(map(str, path))
        axes = variable.get_metadata().get("axes")
        if axes is None:
            raise errors.InputError(f"parameter {where} names no logical axes")
        flat[path] = NamedSharding(mesh, spec(axes, variable.get_value().shape, mesh, where))
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def pinned(x: jax.Array, *parts: Sequence[str] | None) -> jax.Array:
    """`x` laid out as `parts` say of its first axes, on the mesh that the program runs on; the others are left free.

    A part names the mesh's axes, None or () is whole everywhere. For arrays inside jitted programs. An axis that the
    mesh does not divide evenly is left free too.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty:
        return x

    def place(part, size):
        names = tuple(name for name in part or () if name in mesh.shape)
        return names if size % math.prod(mesh.shape[name] for name in names) == 0 else FREE

    places = [place(part, size) for part, size in zip(parts, x.shape, strict=False)]
    places += [FREE] * (x.ndim - len(places))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*places)))


def by_frames(x: jax.Array) -> jax.Array:
    """Activations whose frames stay where they are. Left to itself the compiler may gather all frames on every device,
    so as not to gather a layer's weights, which live on the same mesh axis.
    """
    return pinned(x, *FRAMES)


def gathered(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """A parameter with these logical axes, whole on every device but for what `tensor` shares out."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty:
        return x
    parts = [None if part == "fsdp" else part for part in spec(axes, x.shape, mesh)]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*parts)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def offloaded(where: NamedSharding) -> NamedSharding:
    """The same places, but in the memory of the devices' hosts."""
    return where.with_memory_kind(HOST)


def is_offloaded(where: NamedSharding) -> bool:
    """Whether it is in the memory of hosts."""
    return where.memory_kind == HOST


def frame_devices(mesh: Mesh) -> int:
    """Over how many devices the frames of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in FRAMES[0])


def put_batch(batch, mesh: Mesh):
    """Place this process's rows of a host batch on the mesh, frames spread over `data` and `fsdp`.

    Raises InputError where they cannot be spread evenly.
    """
    frames, devices = len(jax.tree.leaves(batch)[0]) * jax.process_count(), frame_devices(mesh)
    if frames % devices:
        raise errors.InputError(
            f"a batch of {frames} frames cannot be spread over data x fsdp = {devices} devices; make data.frames a "
            f"multiple of {devices}, or change compute.mesh"
        )
    sharding = NamedSharding(mesh, FRAMES)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def local_rows(tree):
    """This process's rows of arrays that are spread over frames, as NumPy, in the order they were put."""

    def rows(array):
        if array.is_fully_addressable:
            return np.asarray(array)
        parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    return jax.tree.map(rows, tree)
