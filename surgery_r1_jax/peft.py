"""Adapters in the folders of huggingface/peft: adapter_config.json and adapter_model.safetensors.

Source: peft, tuners/lora/config.py and utils/save_and_load.py. A layer is adapted in all layers of its stack or in
none, and everything that peft can do beyond LoRA and rsLoRA is refused by name.
"""

import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from surgery_r1_jax import errors, files, lora, model, options, placement, places, sharding, tensors, weights

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
DIGEST = "base_digest"  # in the weights' metadata, which peft leaves alone
# Keys that do not change what an adapter computes, and the three that `options.Lora` stands for. All others must be
# empty: they belong to other methods.
HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "init_lora_weights", "megatron_core"),
    *("qalora_group_size", "ensure_weight_tying", "r", "lora_alpha", "lora_dropout", "use_rslora"),
}
EMPTY = (None, False, "none", {}, [])
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # the others change the base's weights


def holds(folder: Path) -> bool:
    """Whether a folder is an adapter's and no whole model's."""
    whole = any((folder / name).is_file() for name in (tensors.SINGLE, tensors.INDEX))
    return (folder / CONFIG).is_file() and not whole


def base_of(folder: Path) -> Path:
    """The folder of an adapter's base model: as its path says, on a bucket too, or where Hugging Face's cache holds it.

    Raises: InputError where it is not here.
    """
    given = _config(folder)
    name = str(given.get("base_model_name_or_path") or "")
    if places.remote(name):
        return places.place(name)
    found = Path(name) if name and os.path.isdir(name) else _cached(name, given.get("revision"))
    if found is None or found.resolve() == folder.resolve():
        name = errors.printable(name[:200])
        raise errors.InputError(
            f"{folder / CONFIG}: its base model '{name}' is not here; set base_model_name_or_path to the base's folder"
        )
    return found


def read(folder: Path, config: model.Config, mesh: jax.sharding.Mesh | None = None) -> tuple[options.Lora, dict]:
    """An adapter for a base of this architecture, on the mesh where one is given.

    Raises: InputError for other methods than LoRA, for an adapter of another base, and as `tensors.opened`.
    """
    given = _config(folder)
    if given.get("peft_type") != "LORA":
        raise errors.InputError(f"{folder / CONFIG}: peft_type {given.get('peft_type')} is not supported, only LORA")
    for key in sorted(set(given) - HARMLESS):
        if given[key] not in EMPTY:
            raise errors.InputError(f"{folder / CONFIG}: {key} {given[key]!r} is not supported; merge it with peft")
    if given.get("init_lora_weights") not in PLAIN_STARTS:
        start = given["init_lora_weights"]
        raise errors.InputError(
            f"{folder / CONFIG}: init_lora_weights {start!r} changes the base model; save the adapter converted to LoRA"
        )
    stored = tensors.opened(folder, lambda name: weights.plain(name.removeprefix(PREFIX)), WEIGHTS)
    modules = {ours: module for ours, module in lora.linears(config).items() if _first(module) in stored}
    for module in modules.values():
        rank = stored[_first(module)].shape[0]
        if given.get("r") != rank:
            raise errors.InputError(f"{folder / CONFIG}: r is {given.get('r')!r:.20}, its tensors have {rank}; mend it")
    settings = _settings(folder, given, tuple(module.replace("{i}", "*") for module in modules.values()))
    _, abstract = lora.build(config, options.Compute(), settings)
    shardings = None if mesh is None else flatten_dict(sharding.of_params(abstract, mesh))
    found = {}
    for path, leaf in flatten_dict(lora.split(nnx.to_pure_dict(abstract))[0]).items():
        shape, module = leaf.shape, modules[".".join(path[:-2])]
        count = shape[0] if "{i}" in module else 1
        inner = shape[1:] if "{i}" in module else shape
        wanted = _matrix(np.broadcast_to(np.float32(0), inner), path[-1]).shape
        layers = []
        for name in map(weights.plain, _names(module, path[-1].upper(), count)):
            if name not in stored or stored[name].shape != list(wanted):
                has = f"has shape {stored[name].shape}" if name in stored else "is missing"
                raise errors.InputError(
                    f"{folder / WEIGHTS}: tensor '{name}' {has}, the base makes it {list(wanted)}: an adapter for "
                    "another base model; set base_model_name_or_path in its config to the right one"
                )
            layers.append(tensors.numbers(stored.pop(name), wanted).T.astype(np.float32).reshape(inner))
        value = np.stack(layers) if "{i}" in module else layers[0]
        found[path] = placement.spread(value, shardings and shardings[path])
    if stored:
        raise errors.InputError(
            f"{folder / WEIGHTS}: tensor '{min(stored)}' belongs to no linear layer of the base: an adapter for "
            "another base model, or one of embeddings"
        )
    return settings, unflatten_dict(found)


def digest_of(folder: Path) -> str | None:
    """The digest of the base that an adapter of ours was trained on; None in those of other programs."""
    return tensors.metadata(folder / WEIGHTS).get(DIGEST)


def write(
    out: Path,
    adapters: dict,
    settings: options.Lora,
    config: model.Config,
    *,
    base: str,
    digest: str | None,
    classes: Path | None = None,
    dtype: str = "float32",
    card: str | None = None,
) -> Path:
    """Write an adapter's folder beside `out` and rename it. Raises: InputError where `out` holds files already."""
    modules, layout, values = lora.linears(config), [], []
    for path, leaf in flatten_dict(adapters).items():
        module = modules[".".join(path[:-2])]
        layers = list(leaf) if "{i}" in module else [leaf]
        for name, layer in zip(_names(module, path[-1].upper(), len(layers)), layers, strict=True):
            value = _matrix(np.asarray(jax.device_get(layer)), path[-1]).astype(tensors.DTYPES[dtype])
            layout.append((PREFIX + name, value.shape))
            values.append(np.ascontiguousarray(value))
    alternatives = (re.escape(modules[path]).replace(r"\{i\}", r"\d+") for path in _adapted(adapters))
    about = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        r=settings.rank,
        lora_alpha=int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        # As one expression: by their last names alone, layers of the tower would be meant too.
        target_modules="|".join(alternatives),
        bias="none",
    )
    with files.new_folder(out) as folder:
        tensors.write(folder, layout, values, dtype, single=WEIGHTS, metadata={DIGEST: digest} if digest else {})
        (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", "utf-8")
        if classes is not None and classes.is_file():
            shutil.copyfile(classes, folder / classes.name)
        if card is not None:
            (folder / "README.md").write_text(card, "utf-8")
    return out


def _adapted(adapters: dict) -> list[str]:
    return [".".join(path[:-2]) for path in flatten_dict(adapters) if path[-1] == "a"]


def _names(module: str, letter: str, layers: int) -> list[str]:
    """Names of one of an adapter's two matrices in every layer, as transformers calls the modules."""
    each = [module.format(i=i) for i in range(layers)] if "{i}" in module else [module]
    return [f"{name}.lora_{letter}.weight" for name in each]


def _first(module: str) -> str:
    """The plain name of the tensor that an adapter of this module has in any case."""
    return weights.plain(_names(module, "A", 1)[0])


def _matrix(value: np.ndarray, letter: str) -> np.ndarray:
    """Ours, [in..., rank] or [rank, out...], as PyTorch's [out, in]."""
    rank = value.shape[-1] if letter == "a" else value.shape[0]
    return (value.reshape(-1, rank) if letter == "a" else value.reshape(rank, -1)).T


def _settings(folder: Path, given: dict, targets: tuple[str, ...]) -> options.Lora:
    if not targets:
        raise errors.InputError(f"{folder / WEIGHTS}: adapts no linear layer of its base; it is for another base model")
    try:
        if not given["r"]:
            raise ValueError("r is 0")
        return options.Lora(
            rank=given["r"],
            alpha=given["lora_alpha"],
            dropout=given.get("lora_dropout") or 0.0,
            rslora=bool(given.get("use_rslora")),
            targets=targets,
        )
    except (KeyError, ValueError) as problem:
        why = errors.one_line(problem)
        raise errors.InputError(f"{folder / CONFIG}: r, lora_alpha or lora_dropout is amiss ({why})") from None


def _config(folder: Path) -> dict:
    try:
        found = json.loads((folder / CONFIG).read_text("utf-8"))
        if isinstance(found, dict):
            return found
    except (ValueError, RecursionError):
        pass
    raise errors.InputError(f"{folder / CONFIG}: not a JSON object; copy the adapter again")


def _cached(name: str, revision: str | None) -> Path | None:
    """Where the Hugging Face cache holds a model, if it does; nothing is fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True)) if name else None
    except (LocalEntryNotFoundError, HFValidationError):
        return None
