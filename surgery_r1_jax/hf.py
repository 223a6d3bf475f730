"""Hugging Face folders in and out: config.json, sharded safetensors, tokenizer and preprocessor files.

Every tensor of the files is used exactly once and every parameter is filled exactly once, by the family's table
of names; anything missing, left over or of another shape is an error that names it. No torch, no pickle, no
remote code.
"""

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from surgery_r1_jax import errors, families, model, vision
from surgery_r1_jax.family import supported
from surgery_r1_jax.weights import Form

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


def read_params(
    folder: Path,
    config: model.Config,
    shardings: dict | None = None,
    *,
    dtype: str = "float32",
    tell: Tell = lambda name, done, total: None,
) -> dict:
    """Parameters of a folder as a nested dict of arrays, placed by `shardings` where given.

    Tensor by tensor onto the devices: beside them the host holds one tensor. Raises: InputError naming file and tensor
    for anything missing, left over, of another shape, not a float, or not finite.
    """
    folder, names = Path(folder), families.of(config).names
    _, abstract = model.build(config)
    params = {}
    with contextlib.ExitStack() as stack:
        files = _open(folder, stack)
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
    tell: Tell = lambda name, done, total: None,
) -> Path:
    """Write a folder that transformers loads: weights from `params`, everything else copied from `source`.

    `card` is the text of its README.md.

    Written beside `out` and renamed at the end: `out` is whole or not there. Raises: InputError where `out` holds
    files already.
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
        tensors = ((name, count(name, value)) for name, value in _file_tensors(params, config, DTYPES[dtype]))
        _write_weights(part, tensors, max_shard_bytes)
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


def _write_weights(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int) -> None:
    """One file, or shards with an index; how many is known at the end, so they get their names then."""
    written, total = [], 0
    for shard in _shards(tensors, max_shard_bytes):
        file = folder / f"{len(written)}.part"
        file.touch()
        mode = file.stat().st_mode  # safetensors makes files that only their owner can read
        safetensors.numpy.save_file(shard, file, metadata={"format": "pt"})
        file.chmod(mode)
        written.append((file, list(shard)))
        total += sum(value.nbytes for value in shard.values())
    count, weight_map = len(written), {}
    for number, (file, names) in enumerate(written, start=1):
        final = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        file.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    for name, value in tensors:
        if shard and sum(other.nbytes for other in shard.values()) + value.nbytes > max_bytes:
            yield shard
            shard = {}
        shard[name] = value
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


def _file_tensors(params: dict, config: model.Config, dtype=np.float32) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the files, one after the other."""
    for where, (name, form) in families.of(config).names.items():
        if where == "head" and config.tie_word_embeddings:
            continue
        value = np.asarray(jax.device_get(_at(params, where.split("."))))
        stack = [(name, value)] if "{i}" not in name else [(name.format(i=i), layer) for i, layer in enumerate(value)]
        for file_name, array in stack:
            yield file_name, np.ascontiguousarray(form.to_file(array, config.vision).astype(dtype))


class _Stored(NamedTuple):
    """Where a tensor lies."""

    path: Path
    file: safetensors.safe_open
    name: str  # in the file


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
    wanted = form.to_file(np.broadcast_to(np.float32(0), shape), tower).shape  # nothing is allocated
    swapped = (*wanted[:-2], *wanted[:-3:-1])
    if form.or_swapped and stored.file.get_slice(stored.name).get_shape() == list(swapped) != list(wanted):
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
    """A tensor of the files as float32. Raises: InputError for another shape or type, and for NaN and infinity."""
    header, problem = stored.file.get_slice(stored.name), None
    if header.get_shape() != list(shape):
        problem = f"has shape {header.get_shape()}, but config.json makes it {list(shape)}"
    elif header.get_dtype() not in ("F32", "BF16", "F16"):
        problem = f"has type {header.get_dtype()}; only float32, bfloat16 and float16 weights are read"
    else:
        value = stored.file.get_tensor(stored.name).astype(np.float32)
        if np.isfinite(value.min()) and np.isfinite(value.max()):  # each of them is NaN where there is one
            return value
        problem = "holds a number that is not finite; take an earlier checkpoint"
    raise errors.InputError(f"{stored.path}: tensor '{stored.name}' {problem}")


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, _Stored]:
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
            file = stack.enter_context(safetensors.safe_open(path, framework="np"))
        except (safetensors.SafetensorError, OSError) as problem:
            raise errors.InputError(f"{path}: not a whole safetensors file ({_line(problem)}); copy it again") from None
        for spelling in file.keys():  # noqa: SIM118 - not a dict
            if weight_map is not None and weight_map.get(spelling) != path.name:
                raise errors.InputError(f"{path}: holds '{spelling}', which {INDEX} places elsewhere; copy both again")
            name = _plain(spelling)
            if name in found:
                raise errors.InputError(f"{path}: holds '{name}' a second time; export the checkpoint again")
            found[name] = _Stored(path, file, spelling)
    missing = sorted(set(weight_map or ()) - {stored.name for stored in found.values()})
    if missing:
        raise errors.InputError(f"{index}: tensor '{missing[0]}' is in none of the files; copy the checkpoint again")
    return found


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
