"""Hugging Face folders in and out: config.json, sharded safetensors, tokenizer and preprocessor files.

Every tensor of the files is used exactly once and every parameter is filled exactly once, by the family's table
of names; anything missing, left over or of another shape is an error that names it. No torch, no pickle, no
remote code.
"""

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from surgery_r1_jax import errors, families, model, vision
from surgery_r1_jax.family import supported
from surgery_r1_jax.weights import Form, turned

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Everything beside the weights that makes the folder usable elsewhere; copied as it is.
SIDE_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "LICENSE",
    "config.json",  # last: a folder without it is no model
)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
FILE_TYPES = {"float32": "F32", "bfloat16": "BF16"}
# What is read: the type of number, its bits, and the exponent of what is not finite.
KINDS = {
    "F32": (np.float32, np.uint32, 0x7F800000),
    "BF16": (ml_dtypes.bfloat16, np.uint16, 0x7F80),
    "F16": (np.float16, np.uint16, 0x7C00),
}


def read_config(folder: Path) -> model.Config:
    """Architecture of a Hugging Face folder, whichever generation of config.json it holds.

    Raises: InputError naming the file for another model family and for any variant that would be computed wrongly.
    """
    from transformers import AutoConfig

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise errors.InputError(f"{folder}: no config.json; give a Hugging Face folder of a Qwen-VL model")
    try:
        model_type = json.loads(path.read_text("utf-8")).get("model_type")
    except (ValueError, AttributeError, RecursionError) as problem:
        raise errors.InputError(f"{path}: not a JSON object ({_line(problem)}); copy it from the checkpoint") from None
    if model_type not in families.FAMILIES:
        known = ", ".join(families.FAMILIES)
        raise errors.InputError(f"{path}: model_type '{model_type}' is not supported; supported: {known}")
    try:
        whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        supported("quantization_config", getattr(whole, "quantization_config", None), None)
        return families.FAMILIES[model_type].architecture(whole)
    except Exception as problem:  # transformers raises many kinds on a bad file
        raise errors.InputError(f"{path}: {_line(problem)}") from None


Tell = Callable[[str, int, int], None]  # is told of a tensor, and how many bytes of how many are done


def untold(name: str, done: int, total: int) -> None:
    """The `Tell` of those who do not watch."""


def read_params(
    folder: Path,
    config: model.Config,
    shardings: dict | None = None,
    *,
    dtype: str = "float32",
    tell: Tell = untold,
) -> dict:
    """Parameters of a folder as a nested dict of arrays, placed by `shardings` where given.

    Tensor by tensor onto the devices: beside them the host holds one tensor. Raises: InputError naming file and tensor
    for anything missing, left over, of another shape, not a float, or not finite.
    """
    folder, names = Path(folder), families.of(config).names
    _, abstract = model.build(config)
    params = {}
    files = _open(folder)
    count = _Counter(tell, sum(path.stat().st_size for path in {stored.path for stored in files.values()}))
    for path, variable in nnx.to_flat_state(abstract):
        where, shape = ".".join(path), variable.get_value().shape
        (name, form), here = names[where], None if shardings is None else _at(shardings, path)

        def read(name, shape, form=form, where=where):
            value = _tensor(folder, files, where, name, form, shape, config.vision)
            return count(name, value.astype(DTYPES[dtype], copy=False))

        if "{i}" in name:
            layers = (read(name.format(i=i), shape[1:]) for i in range(shape[0]))
            params[path] = _stacked(layers, shape, DTYPES[dtype], here)
        else:
            params[path] = _spread(read(name, shape), here)
    if config.tie_word_embeddings:
        files.pop("lm_head.weight", None)  # some writers store the tied head a second time
    if left_over := sorted(files):
        more = f" and {len(left_over) - 3} more" if len(left_over) > 3 else ""
        raise errors.InputError(f"{folder}: unknown tensors {', '.join(left_over[:3])}{more}; they match no parameter")
    return _nested(params)


def write_folder(
    out: Path,
    params: dict,
    config: model.Config,
    source: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 2 << 30,
    card: str | None = None,
    tell: Tell = untold,
) -> Path:
    """Write a folder that transformers loads: weights from `params`, everything else copied from `source`.

    `card` is the text of its README.md. Written beside `out` and renamed at the end: `out` is whole or not there.
    Raises: InputError where `out` holds files already.
    """
    out, source = Path(out), Path(source)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise errors.InputError(f"{out}: already exists and is not an empty folder; give a new one")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        total = sum(leaf.size for leaf in jax.tree.leaves(params)) * np.dtype(DTYPES[dtype]).itemsize
        count = _Counter(tell, total)
        tensors = (count(name, value) for name, value in _file_tensors(params, config, DTYPES[dtype]))
        _write_weights(part, _file_layout(params, config), tensors, dtype, max_shard_bytes)
        copy_side_files(source, part, dtype=dtype)
        if card is not None:
            (part / "README.md").write_text(card, "utf-8")
        if out.exists():
            out.rmdir()
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return out


def _write_weights(
    folder: Path, layout: list[tuple[str, tuple]], tensors: Iterable[np.ndarray], dtype: str, max_shard_bytes: int
) -> None:
    """One file, or shards with an index; tensor by tensor, so that nothing but the one at hand is held.

    Source of the format: huggingface/safetensors, README.md.
    """
    size_of = {name: math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize for name, shape in layout}
    shards, tensors = list(_shards(size_of, max_shard_bytes)), iter(tensors)
    shapes, weight_map = dict(layout), {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            start, end = end, end + size_of[name]
            header[name] = dict(dtype=FILE_TYPES[dtype], shape=shapes[name], data_offsets=[start, end])
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the numbers are aligned
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                out.write(next(tensors).view(np.uint8).data)
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


def copy_side_files(source: Path, out: Path, *, dtype: str | None = None) -> None:
    """Copy configuration, tokenizer and preprocessor files; the config's dtype follows the weights'."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if dtype is not None:
        config = json.loads((out / "config.json").read_text("utf-8"))
        key = "torch_dtype" if "torch_dtype" in config else "dtype"  # transformers' spelling before and since 4.56
        (out / "config.json").write_text(json.dumps(config | {key: dtype}, indent=2) + "\n", "utf-8")


def _file_layout(params: dict, config: model.Config) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the files' tensors, in the order of `_file_tensors`."""
    found = []
    for where, name, form in _rows(config):
        shape = _at(params, where).shape
        layers = [name.format(i=i) for i in range(shape[0])] if "{i}" in name else [name]
        in_file = _file_shape(form, shape[1:] if "{i}" in name else shape, config.vision)
        found += [(layer, in_file) for layer in layers]
    return found


def _file_tensors(params: dict, config: model.Config, dtype=np.float32) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the files, one after the other; of a stack the host holds a layer."""
    for where, name, form in _rows(config):
        value = _at(params, where)
        layers = ((name.format(i=i), value[i]) for i in range(len(value))) if "{i}" in name else [(name, value)]
        for file_name, layer in layers:
            in_file = form.to_file(np.asarray(jax.device_get(layer)), config.vision).astype(dtype, copy=False)
            yield file_name, turned(in_file.T) if in_file.ndim == 2 else np.ascontiguousarray(in_file)


def _rows(config: model.Config) -> Iterator[tuple[list[str], str, Form]]:
    """Path, file name and form of every parameter that stands in the files."""
    for where, (name, form) in families.of(config).names.items():
        if where != "head" or not config.tie_word_embeddings:
            yield where.split("."), name, form


def _file_shape(form: Form, shape: tuple, tower: vision.Config) -> tuple[int, ...]:
    """The shape in the file of a tensor of this shape; nothing is allocated."""
    return form.to_file(np.broadcast_to(np.float32(0), shape), tower).shape


class _Stored(NamedTuple):
    """Where a tensor lies."""

    path: Path
    name: str  # in the file
    kind: str  # of number, as safetensors calls it
    shape: list[int]
    start: int  # byte of the file


class _Counter:
    """Passes values on and tells how many bytes have passed."""

    def __init__(self, tell: Tell, total: int):
        self._tell, self._done, self._total = tell, 0, total

    def __call__(self, name: str, value: np.ndarray) -> np.ndarray:
        self._done += value.nbytes
        self._tell(name, self._done, self._total)
        return value


def _tensor(
    folder: Path, files: dict[str, _Stored], where: str, name: str, form: Form, shape: tuple, tower: vision.Config
) -> np.ndarray:
    """A tensor in our form, struck off the list."""
    stored = files.pop(_plain(name), None)
    if stored is None:
        raise errors.InputError(f"{folder}: tensor '{name}' is missing (parameter {where}); copy the checkpoint again")
    wanted = _file_shape(form, shape, tower)
    swapped = (*wanted[:-2], *wanted[:-3:-1])
    if form.or_swapped and stored.shape == list(swapped) != list(wanted):
        return form.from_file(_numbers(stored, swapped).swapaxes(-1, -2), shape)
    return form.from_file(_numbers(stored, wanted), shape)


def _stacked(layers: Iterable[np.ndarray], shape: tuple, dtype, sharding: NamedSharding | None) -> jax.Array:
    """Layers one after the other into their stack on the devices."""
    of_layer = sharding and NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stack = jnp.zeros(shape, dtype, device=sharding)
    for i, layer in enumerate(layers):
        stack = _put(stack, _spread(layer, of_layer), i)
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, layer: jax.Array, i: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)


def _numbers(stored: _Stored, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the files. Raises: InputError for another shape or type, and for NaN and infinity."""
    if stored.shape != list(shape):
        problem = f"has shape {stored.shape}, but config.json makes it {list(shape)}"
    elif stored.kind not in KINDS:
        problem = f"has type {stored.kind}; only float32, bfloat16 and float16 weights are read"
    else:
        kind, bits, exponent = KINDS[stored.kind]
        # Read, not mapped: pages of a mapped file count as memory of the program.
        value = np.fromfile(stored.path, kind, math.prod(shape), offset=stored.start).reshape(shape)
        if not value.size or (value.view(bits) & exponent).max() < exponent:
            return value
        problem = "holds a number that is not finite; take an earlier checkpoint"
    raise errors.InputError(f"{stored.path}: tensor '{stored.name}' {problem}")


def _open(folder: Path) -> dict[str, _Stored]:
    """Every tensor by its plain name. An index and its files must agree both ways."""
    index, weight_map, shards = folder / INDEX, None, [SINGLE]
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
            shards = sorted({str(file) for file in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise errors.InputError(f"{index}: not a weight index; copy the checkpoint again") from None
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise errors.InputError(f"{index}: names the file '{shard}', which is not in the folder; copy it there")
    elif not (folder / SINGLE).is_file():
        raise errors.InputError(
            f"{folder}: no {SINGLE} and no {INDEX}; only safetensors weights are read: save the model as such"
        )
    found: dict[str, _Stored] = {}
    for path in (folder / shard for shard in shards):
        try:
            with safetensors.safe_open(path, framework="np"):  # checks the whole header against the file
                header, data = _header(path)
        except (safetensors.SafetensorError, OSError) as problem:
            raise errors.InputError(f"{path}: not a whole safetensors file ({_line(problem)}); copy it again") from None
        for spelling, entry in header.items():
            if weight_map is not None and weight_map.get(spelling) != path.name:
                raise errors.InputError(f"{path}: holds '{spelling}', which {INDEX} places elsewhere; copy both again")
            name = _plain(spelling)
            if name in found:
                raise errors.InputError(f"{path}: holds '{name}' a second time; export the checkpoint again")
            start = data + entry["data_offsets"][0]
            found[name] = _Stored(path, spelling, entry["dtype"], entry["shape"], start)
    missing = sorted(set(weight_map or ()) - {stored.name for stored in found.values()})
    if missing:
        raise errors.InputError(f"{index}: tensor '{missing[0]}' is in none of the files; copy the checkpoint again")
    return found


def _header(path: Path) -> tuple[dict[str, dict], int]:
    """What a sound safetensors file says of its tensors, and the byte at which their numbers begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def _plain(name: str) -> str:
    """A tensor's name without the parts that come and go with transformers' versions."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def _spread(value: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """An array on all devices of all processes, each of which holds the whole value; or on the first device."""
    if sharding is None:
        return jax.device_put(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda part: value[part])


def _at(tree: dict, path):
    for key in path:
        tree = tree[key]
    return tree


def _nested(flat: dict[tuple, jax.Array]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        at = tree
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = value
    return tree


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__
