"""Arrays of files onto the devices: every device's part is filled on the host, and then handed over whole.

A device that is the host itself takes such a part over as it is: it is written once, and nothing is copied.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

STRIP = 32  # numbers along the last axis
ALIGNED = 64  # bytes; XLA copies what begins elsewhere


def lay(out: np.ndarray, values: np.ndarray) -> None:
    """Copy values into an array; in strips that fit the cache, if they lie in another order: four times as quick."""
    if values.dtype == out.dtype:  # as plain bits: NumPy copies types that are not its own, bfloat16, one at a time
        out, values = (x.view(f"u{x.itemsize}") for x in (out, values))
    if not values.ndim or values.strides[-1] == values.itemsize:
        out[...] = values
        return
    for start in range(0, values.shape[-1], STRIP):
        out[..., start : start + STRIP] = values[..., start : start + STRIP]


def laid(values: np.ndarray) -> np.ndarray:
    """The values as a contiguous array; itself if it is one."""
    if values.flags.c_contiguous:
        return values
    lay(out := np.empty(values.shape, values.dtype), values)
    return out


def spread(value: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """An array on all devices of all processes, each of which holds the whole value; or on the first device."""
    parts = Parts(value.shape, value.dtype, sharding)
    parts.fill(value)
    return parts.array()


class Parts:
    """What this process's devices hold of an array; on the host until `array` hands it over, and then not written."""

    def __init__(self, shape: Sequence[int], dtype, sharding: Sharding | None = None):
        self._shape, self._sharding = tuple(shape), sharding or SingleDeviceSharding(jax.devices()[0])
        self._where = self._sharding.addressable_devices_indices_map(self._shape)
        of_device = self._sharding.shard_shape(self._shape)
        # Devices that hold the same part share it.
        self._held = {repr(index): (index, _empty(of_device, dtype)) for index in self._where.values()}

    def fill(self, value: np.ndarray, layer: int | None = None) -> None:
        """Set the whole array or, where its first axis is whole on every device, a layer of it."""
        for index, part in self._held.values():
            if layer is None:
                lay(part, value[index])
            else:
                lay(part[layer], value[index[1:]])

    def array(self) -> jax.Array:
        """The array on its devices."""
        parts = [jax.device_put(self._held[repr(index)][1], device) for device, index in self._where.items()]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts)


def _empty(shape: Sequence[int], dtype) -> np.ndarray:
    """An array without values that begins where XLA wants it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.empty(size + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    return room[start : start + size].view(dtype).reshape(shape)
