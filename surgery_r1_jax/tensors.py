"""Named arrays in safetensors files: every header checked before it is believed, read one by one, written one by one.

Source of the format: huggingface/safetensors, README.md.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from surgery_r1_jax import errors, files, folders

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
FILE_TYPES = {"float32": "F32", "bfloat16": "BF16"}
# What is read: the type of number, its bits, and the exponent of what is not finite.
KINDS = {
    "F32": (np.float32, np.uint32, 0x7F800000),
    "BF16": (ml_dtypes.bfloat16, np.uint16, 0x7F80),
    "F16": (np.float16, np.uint16, 0x7C00),
}


class Stored(NamedTuple):
    """Where a tensor lies."""

    path: Path
    name: str  # in the file
    kind: str  # of number, as safetensors calls it
    shape: list[int]
    start: int  # byte of the file


def opened(folder: Path, plain: Callable[[str], str] = str, single: str = SINGLE) -> dict[str, Stored]:
    """Every tensor of a folder by its name made `plain`. An index and its files must agree both ways.

    Files that the folder has SHA-256 sums of must have these. Raises: InputError naming the file for whatever is not a
    whole safetensors file, before anything is read of it.
    """
    index, weight_map, shards = folder / INDEX, None, [single]
    if single == SINGLE and index.is_file():
        files.check_fetched(index)
        try:
            weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
            shards = sorted({str(file) for file in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise errors.InputError(f"{index}: not a weight index; copy the checkpoint again") from None
        for shard in shards:
            if Path(shard).name != shard or not os.path.isfile(folder / shard):  # as a Path it fails on a long name
                name = errors.printable(shard)
                raise errors.InputError(f"{index}: names the file '{name}', which is not in the folder; copy it there")
    elif not (folder / single).is_file():
        wanted = f"{single}" + f" and no {INDEX}" * (single == SINGLE)
        raise errors.InputError(f"{folder}: {folders.without_weights(folder, wanted)}")
    found: dict[str, Stored] = {}
    paths = [folder / shard for shard in shards]
    for path in paths:
        files.check_fetched(path)
    files.check_sums(folder, paths)
    for path in paths:
        try:
            with safetensors.safe_open(path, framework="np"):  # checks the whole header against the file
                header, data = _header(path)
        except (safetensors.SafetensorError, OSError) as problem:
            why = errors.one_line(problem)
            raise errors.InputError(f"{path}: not a whole safetensors file ({why}); copy it again") from None
        for spelling, entry in header.items():
            name, shown = plain(spelling), errors.printable(spelling)
            if weight_map is not None and weight_map.get(spelling) != path.name:
                raise errors.InputError(f"{path}: holds '{shown}', which {INDEX} places elsewhere; copy both again")
            if name in found:
                raise errors.InputError(f"{path}: holds '{shown}' a second time; export the checkpoint again")
            start = data + entry["data_offsets"][0]
            found[name] = Stored(path, spelling, entry["dtype"], entry["shape"], start)
    missing = sorted(set(weight_map or ()) - {stored.name for stored in found.values()})
    if missing:
        name = errors.printable(missing[0])
        raise errors.InputError(f"{index}: tensor '{name}' is in none of the files; copy the checkpoint again")
    return found


def _header(path: Path) -> tuple[dict[str, dict], int]:
    """What a sound safetensors file says of its tensors, and the byte at which their numbers begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def metadata(path: Path) -> dict[str, str]:
    """What a sound safetensors file says of itself."""
    with safetensors.safe_open(path, framework="np") as file:
        return file.metadata() or {}


def numbers(stored: Stored, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the files. Raises: InputError for another shape or type, and for NaN and infinity."""
    if stored.shape != list(shape):
        problem = f"has shape {stored.shape}, but config.json makes it {list(shape)}; take both from one checkpoint"
    elif stored.kind not in KINDS:
        problem = f"has type {stored.kind}; only float32, bfloat16 and float16 weights are read"
    else:
        kind, bits, exponent = KINDS[stored.kind]
        # Read, not mapped: pages of a mapped file count as memory of the program.
        value = np.fromfile(stored.path, kind, math.prod(shape), offset=stored.start).reshape(shape)
        if not value.size or (value.view(bits) & exponent).max() < exponent:
            return value
        problem = "holds a number that is not finite; take an earlier checkpoint"
    raise errors.InputError(f"{stored.path}: tensor '{errors.printable(stored.name)}' {problem}")


def write(
    folder: Path,
    layout: list[tuple[str, tuple]],
    values: Iterable[np.ndarray],
    dtype: str,
    max_shard_bytes: int | None = None,
    single: str = SINGLE,
    metadata: dict[str, str] | None = None,
) -> None:
    """One file, or shards with an index; tensor by tensor, so that nothing but the one at hand is held.

    `metadata` joins the header of every file.
    """
    size_of = {name: math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize for name, shape in layout}
    most = max_shard_bytes or sum(size_of.values())
    shards, values = list(_shards(size_of, most)), iter(values)
    shapes, weight_map = dict(layout), {}
    for number, names in enumerate(shards, start=1):
        file = single if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, end = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
        for name in names:
            start, end = end, end + size_of[name]
            header[name] = dict(dtype=FILE_TYPES[dtype], shape=shapes[name], data_offsets=[start, end])
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the numbers are aligned
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                out.write(next(values).view(np.uint8).data)
                weight_map[name] = file
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(size_of.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(size_of: dict[str, int], max_bytes: int) -> Iterator[list[str]]:
    """Names in files of at most so many bytes; a larger tensor has a file of its own."""
    shard, filled = [], 0
    for name, size in size_of.items():
        if shard and filled + size > max_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard
