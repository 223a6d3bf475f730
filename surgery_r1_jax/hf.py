"""Hugging Face folders in and out: config.json, sharded safetensors, tokenizer and preprocessor files.

Every tensor of the files is used exactly once and every parameter is filled exactly once, by the family's table
of names; anything missing, left over or of another shape is an error that names it. No torch, no pickle, no
remote code.
"""

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from surgery_r1_jax import (
    chat,
    errors,
    examples,
    families,
    files,
    folders,
    images,
    model,
    placement,
    places,
    tensors,
    vision,
    vocabulary,
    weights,
)
from surgery_r1_jax.weights import Form

CLASSES = "classes.json"
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
    CLASSES,  # the answers it was trained on
    "config.json",  # last: a folder without it is no model
)


def read_classes(folder: Path) -> tuple[str, ...]:
    """The answers a model was trained on: those of EndoVis-18-VQLA where its folder does not say."""
    file = Path(folder) / CLASSES
    if not file.is_file():
        return vocabulary.CLASSES
    try:
        names = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise errors.InputError(f"{file}: not a list of names; remove it, or restore it from the run")
    return tuple(names)


def write_classes(folder: Path, classes: Sequence[str]) -> None:
    """Say in a model's folder which answers it is trained on."""
    files.write_json(places.place(folder) / CLASSES, classes)


def read_config(folder: Path) -> model.Config:
    """Architecture of a Hugging Face folder, whichever generation of config.json it holds.

    Raises: InputError naming the file for another model family and for any variant that would be computed wrongly.
    """
    from transformers import AutoConfig

    path = Path(folder) / "config.json"
    family = families.FAMILIES[folders.model_type(Path(folder), families.FAMILIES)]
    try:
        whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as problem:  # of many kinds
        why = f"transformers cannot read it ({errors.one_line(problem)})"
        raise errors.InputError(f"{path}: {why}; copy the file from the checkpoint") from None
    try:
        return family.architecture(whole)
    except (ValueError, TypeError, AttributeError, ArithmeticError, errors.InputError) as problem:
        raise errors.InputError(f"{path}: {errors.one_line(problem)}") from None


def encoder_of(folder: Path, settings: model.Config, classes: tuple[str, ...] | None = None) -> examples.Encoder:
    """Tokenizer, preprocessor and box codec of a Hugging Face folder; `classes` default to those of its training.

    Raises: InputError where its files do not belong together.
    """
    words, preprocessor, tower = chat.Chat.from_folder(folder), images.Preprocessor.from_folder(folder), settings.vision
    for what, found, wanted in (
        ("image token", words.image_id, settings.image_token_id),
        ("patch_size", preprocessor.patch_size, tower.patch_size),
        ("merge_size", preprocessor.merge_size, tower.spatial_merge_size),
        ("temporal_patch_size", preprocessor.temporal_patch_size, tower.temporal_patch_size),
    ):
        if found != wanted:
            raise errors.InputError(
                f"{folder}: {what} is {found} in its tokenizer or preprocessor files and {wanted} in config.json; take "
                "all of them from one checkpoint"
            )
    if words.vocab_size > (rows := settings.text.vocab_size):
        raise errors.InputError(
            f"{folder}: the tokenizer has ids up to {words.vocab_size - 1}, config.json {rows} vocabulary rows; take "
            "both from one checkpoint"
        )
    return examples.Encoder(
        words, preprocessor, families.of(settings).codec, tower.window_side, classes or read_classes(folder)
    )


READERS = 2  # tensors read, checked and turned at once
Take = Callable[[list[str]], jax.Array | np.ndarray]  # gives a parameter by its path
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

    Beside the devices' parts, of accelerators those of one parameter, the host holds the `READERS` tensors that are
    being read. Raises: InputError naming file and tensor for anything missing, left over, of another shape, not a
    float, or not finite.
    """
    folder = Path(folder)
    stored = tensors.opened(folder, weights.plain)
    count = _Counter(tell, sum(path.stat().st_size for path in {each.path for each in stored.values()}))

    def parameter(path, shape):
        where, here = ".".join(path), None if shardings is None else at(shardings, path)
        name, form = families.of(config).names[where]
        parts = placement.Parts(shape, tensors.DTYPES[dtype], here)

        def read(layer):
            of_layer = (name, shape) if layer is None else (name.format(i=layer), shape[1:])
            value, size = _tensor(folder, stored, where, form, *of_layer, config.vision)
            parts.fill(value, layer)
            return of_layer[0], size

        for done in readers.map(read, range(shape[0]) if "{i}" in name else [None]):
            count(*done)
        return parts.array()

    with ThreadPoolExecutor(READERS) as readers:
        variables = nnx.to_flat_state(model.build(config)[1])
        params = {path: parameter(path, variable.get_value().shape) for path, variable in variables}
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)  # some writers store the tied head a second time
    if left_over := sorted(stored):
        named = ", ".join(map(errors.printable, left_over[:3]))
        more = f" and {len(left_over) - 3} more" if len(left_over) > 3 else ""
        raise errors.InputError(f"{folder}: unknown tensors {named}{more}; they match no parameter")
    return unflatten_dict(params)


def write_folder(out: Path, params: dict, config: model.Config, source: Path, **how) -> Path:
    """`write_parameters` out of a tree of arrays."""
    return write_parameters(out, functools.partial(at, params), config, source, **how)


def write_parameters(
    out: Path,
    take: Take,
    config: model.Config,
    source: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 2 << 30,
    card: str | None = None,
    tell: Tell = untold,
) -> Path:
    """Write a folder that transformers loads: weights as `take` gives them, everything else copied from `source`.

    `card` is the text of its README.md. Written beside `out` and renamed at the end: `out` is whole or not there.
    Raises: InputError where `out` holds files already.
    """
    with files.new_folder(out) as part:
        layout = file_layout(config)
        total = sum(math.prod(shape) for _, shape in layout) * np.dtype(tensors.DTYPES[dtype]).itemsize
        count = _Counter(tell, total)

        def values():
            for name, value in file_tensors(take, config, tensors.DTYPES[dtype]):
                count(name, value.nbytes)
                yield value

        tensors.write(part, layout, values(), dtype, max_shard_bytes)
        copy_side_files(Path(source), part, dtype=dtype)
        if card is not None:
            (part / "README.md").write_text(card, "utf-8")
    return out


def copy_side_files(source: Path, out: Path, *, dtype: str | None = None) -> None:
    """Copy configuration, tokenizer and preprocessor files; the config's dtype follows the weights'."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            places.put(source / name, out / name)
    if dtype is not None:
        config = json.loads((out / "config.json").read_text("utf-8"))
        key = "torch_dtype" if "torch_dtype" in config else "dtype"  # transformers' spelling before and since 4.56
        (out / "config.json").write_text(json.dumps(config | {key: dtype}, indent=2) + "\n", "utf-8")


def file_layout(config: model.Config) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the files' tensors, in the order of `file_tensors`."""
    found, params = [], nnx.to_pure_dict(model.build(config)[1])
    for where, name, form in _rows(config):
        shape = at(params, where).shape
        layers = [name.format(i=i) for i in range(shape[0])] if "{i}" in name else [name]
        in_file = _file_shape(form, shape[1:] if "{i}" in name else shape, config.vision)
        found += [(layer, in_file) for layer in layers]
    return found


def file_tensors(take: Take, config: model.Config, dtype=np.float32) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the files, one after the other.

    A parameter is taken to the host, and a layer laid out, while the one before it is being written.
    """
    rows = list(_rows(config))
    taken = _ahead(functools.partial(lambda where: np.asarray(take(where)), where) for where, _, _ in rows)

    def layers():
        for (_, name, form), value in zip(rows, taken, strict=True):
            each = [(name.format(i=i), value[i]) for i in range(len(value))] if "{i}" in name else [(name, value)]
            for file_name, layer in each:
                yield functools.partial(_in_file, file_name, layer, form, config, dtype)

    return _ahead(layers())


def _ahead(jobs: Iterable[Callable]) -> Iterator:
    """The results of jobs, in order; a thread works on the next one meanwhile."""
    with ThreadPoolExecutor(1) as worker:
        coming = None
        for job in jobs:
            done, coming = coming, worker.submit(job)
            if done is not None:
                yield done.result()
        if coming is not None:
            yield coming.result()


def _in_file(name: str, value: np.ndarray, form: Form, config: model.Config, dtype) -> tuple[str, np.ndarray]:
    """A parameter or a layer of it as a tensor of the files, with its name."""
    return name, placement.laid(form.to_file(value, config.vision).astype(dtype, copy=False))


def _rows(config: model.Config) -> Iterator[tuple[list[str], str, Form]]:
    """Path, file name and form of every parameter that stands in the files."""
    for where, (name, form) in families.of(config).names.items():
        if where != "head" or not config.tie_word_embeddings:
            yield where.split("."), name, form


def _file_shape(form: Form, shape: tuple, tower: vision.Config) -> tuple[int, ...]:
    """The shape in the file of a tensor of this shape; nothing is allocated."""
    return form.to_file(np.broadcast_to(np.float32(0), shape), tower).shape


class _Counter:
    """Tells how many bytes have passed."""

    def __init__(self, tell: Tell, total: int):
        self._tell, self._done, self._total = tell, 0, total

    def __call__(self, name: str, size: int) -> None:
        self._done += size
        self._tell(name, self._done, self._total)


def _tensor(
    folder: Path,
    stored: dict[str, tensors.Stored],
    where: str,
    form: Form,
    name: str,
    shape: tuple,
    tower: vision.Config,
) -> tuple[np.ndarray, int]:
    """A tensor in our form and its bytes in the file; struck off the list."""
    found = stored.pop(weights.plain(name), None)
    if found is None:
        raise errors.InputError(f"{folder}: tensor '{name}' is missing (parameter {where}); copy the checkpoint again")
    wanted = _file_shape(form, shape, tower)
    swapped = (*wanted[:-2], *wanted[:-3:-1])
    if form.or_swapped and found.shape == list(swapped) != list(wanted):
        read = tensors.numbers(found, swapped).swapaxes(-1, -2)
    else:
        read = tensors.numbers(found, wanted)
    return form.from_file(read, shape), read.nbytes


def at(tree: dict, path):
    """What stands in a nested dict under a path of names."""
    for key in path:
        tree = tree[key]
    return tree
