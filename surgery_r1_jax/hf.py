"""Hugging Face folders in and out: config.json, sharded safetensors, tokenizer and preprocessor files.

One table of names serves both directions. Every tensor of the files is used exactly once and every parameter is
filled exactly once; anything missing, left over or of another shape is an error that names it. No torch, no
pickle, no remote code.

Source of the names: files written by transformers' Qwen2_5_VLForConditionalGeneration.save_pretrained.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from surgery_r1_jax import decoder, errors, model, vision

FAMILY = "qwen2_5_vl"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Everything beside the weights that makes the folder usable elsewhere; copied as it is.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)


class Form(NamedTuple):
    """How a parameter's array relates to the file's: both directions, file shape worked out from ours."""

    to_file: Callable[[np.ndarray, vision.Config], np.ndarray]
    from_file: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def _linear(inputs: int) -> Form:
    """Torch stores [out, in]; ours is [in..., out...]."""
    return Form(
        lambda ours, _: ours.reshape(int(np.prod(ours.shape[:inputs])), -1).T,
        lambda file, shape: file.T.reshape(shape),
    )


_SAME = Form(lambda ours, _: ours, lambda file, shape: file)
_FLAT = Form(lambda ours, _: ours.reshape(-1), lambda file, shape: file.reshape(shape))
_PATCH = Form(  # a 3-D convolution whose kernel covers exactly one patch
    lambda ours, v: ours.T.reshape(-1, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size),
    lambda file, shape: file.reshape(file.shape[0], -1).T,
)

# Our path -> the file's name ({i}: layer of a stack) and form.
NAMES: dict[str, tuple[str, Form]] = {
    "embed": ("model.embed_tokens.weight", _SAME),
    "head": ("lm_head.weight", _SAME),
    "decoder.norm.scale": ("model.norm.weight", _SAME),
    "decoder.blocks.norm1.scale": ("model.layers.{i}.input_layernorm.weight", _SAME),
    "decoder.blocks.norm2.scale": ("model.layers.{i}.post_attention_layernorm.weight", _SAME),
    "decoder.blocks.q.kernel": ("model.layers.{i}.self_attn.q_proj.weight", _linear(1)),
    "decoder.blocks.q.bias": ("model.layers.{i}.self_attn.q_proj.bias", _FLAT),
    "decoder.blocks.k.kernel": ("model.layers.{i}.self_attn.k_proj.weight", _linear(1)),
    "decoder.blocks.k.bias": ("model.layers.{i}.self_attn.k_proj.bias", _FLAT),
    "decoder.blocks.v.kernel": ("model.layers.{i}.self_attn.v_proj.weight", _linear(1)),
    "decoder.blocks.v.bias": ("model.layers.{i}.self_attn.v_proj.bias", _FLAT),
    "decoder.blocks.o.kernel": ("model.layers.{i}.self_attn.o_proj.weight", _linear(2)),
    "decoder.blocks.mlp.gate.kernel": ("model.layers.{i}.mlp.gate_proj.weight", _linear(1)),
    "decoder.blocks.mlp.up.kernel": ("model.layers.{i}.mlp.up_proj.weight", _linear(1)),
    "decoder.blocks.mlp.down.kernel": ("model.layers.{i}.mlp.down_proj.weight", _linear(1)),
    "tower.patch_embed.kernel": ("visual.patch_embed.proj.weight", _PATCH),
    "tower.blocks.norm1.scale": ("visual.blocks.{i}.norm1.weight", _SAME),
    "tower.blocks.norm2.scale": ("visual.blocks.{i}.norm2.weight", _SAME),
    "tower.blocks.qkv.kernel": ("visual.blocks.{i}.attn.qkv.weight", _linear(1)),
    "tower.blocks.qkv.bias": ("visual.blocks.{i}.attn.qkv.bias", _FLAT),
    "tower.blocks.proj.kernel": ("visual.blocks.{i}.attn.proj.weight", _linear(2)),
    "tower.blocks.proj.bias": ("visual.blocks.{i}.attn.proj.bias", _FLAT),
    "tower.blocks.mlp.gate.kernel": ("visual.blocks.{i}.mlp.gate_proj.weight", _linear(1)),
    "tower.blocks.mlp.gate.bias": ("visual.blocks.{i}.mlp.gate_proj.bias", _FLAT),
    "tower.blocks.mlp.up.kernel": ("visual.blocks.{i}.mlp.up_proj.weight", _linear(1)),
    "tower.blocks.mlp.up.bias": ("visual.blocks.{i}.mlp.up_proj.bias", _FLAT),
    "tower.blocks.mlp.down.kernel": ("visual.blocks.{i}.mlp.down_proj.weight", _linear(1)),
    "tower.blocks.mlp.down.bias": ("visual.blocks.{i}.mlp.down_proj.bias", _FLAT),
    "tower.merger.norm.scale": ("visual.merger.ln_q.weight", _SAME),
    "tower.merger.up.kernel": ("visual.merger.mlp.0.weight", _linear(1)),
    "tower.merger.up.bias": ("visual.merger.mlp.0.bias", _FLAT),
    "tower.merger.down.kernel": ("visual.merger.mlp.2.weight", _linear(1)),
    "tower.merger.down.bias": ("visual.merger.mlp.2.bias", _FLAT),
}


def read_config(folder: Path) -> model.Config:
    """Architecture of a Hugging Face folder, whichever generation of config.json it holds."""
    from transformers import AutoConfig

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise errors.InputError(f"{folder}: no config.json; give a Hugging Face folder of a Qwen2.5-VL model")
    try:
        family = json.loads(path.read_text()).get("model_type")
    except (ValueError, AttributeError) as problem:
        raise errors.InputError(f"{path}: not a JSON object ({problem})") from None
    if family != FAMILY:
        raise errors.InputError(f"{path}: model_type '{family}' is not supported; supported: {FAMILY}")
    whole = AutoConfig.from_pretrained(folder, local_files_only=True)
    text, tower = whole.text_config, whole.vision_config
    rope = text.rope_parameters
    if getattr(text, "use_sliding_window", False):
        raise errors.InputError(f"{path}: use_sliding_window is not supported; no released Qwen2.5-VL sets it")
    if "mrope_section" not in rope:
        raise errors.InputError(f"{path}: no mrope_section in rope_scaling or rope_parameters")
    return model.Config(
        image_token_id=whole.image_token_id,
        tie_word_embeddings=bool(whole.tie_word_embeddings),
        text=decoder.Config(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            rms_norm_eps=text.rms_norm_eps,
            rope_theta=float(rope["rope_theta"]),
            mrope_section=tuple(rope["mrope_section"]),
        ),
        vision=vision.Config(
            depth=tower.depth,
            hidden_size=tower.hidden_size,
            intermediate_size=tower.intermediate_size,
            num_heads=tower.num_heads,
            out_hidden_size=tower.out_hidden_size,
            patch_size=tower.patch_size,
            temporal_patch_size=tower.temporal_patch_size,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            fullatt_block_indexes=tuple(tower.fullatt_block_indexes),
            in_channels=tower.in_channels,
        ),
    )


def read_params(folder: Path, config: model.Config, shardings: dict | None = None) -> dict:
    """Parameters of a folder as a nested dict of float32 arrays, placed by `shardings` where given."""
    folder = Path(folder)
    _, abstract = model.build(config)
    files = _tensor_files(folder)
    read: set[str] = set()

    def tensor(name: str, where: str, form: Form, shape: tuple[int, ...]) -> np.ndarray:
        if name not in files:
            raise errors.InputError(f"{folder}: tensor '{name}' is missing (parameter {where})")
        read.add(name)
        with safetensors.safe_open(files[name], framework="np") as file:
            stored = file.get_tensor(name)
        want = form.to_file(np.broadcast_to(np.float32(0), shape), config.vision).shape
        if stored.shape != want:
            raise errors.InputError(
                f"{files[name]}: tensor '{name}' has shape {list(stored.shape)}, but config.json makes it {list(want)}"
            )
        return form.from_file(stored.astype(np.float32), shape)

    params = {}
    for path, variable in nnx.to_flat_state(abstract):
        where, shape = ".".join(map(str, path)), variable.get_value().shape
        name, form = NAMES[where]
        if "{i}" in name:
            value = np.stack([tensor(name.format(i=i), where, form, shape[1:]) for i in range(shape[0])])
        else:
            value = tensor(name, where, form, shape)
        sharding = None if shardings is None else _at(shardings, path)
        params[path] = jax.device_put(value, sharding)
    left_over = sorted(set(files) - read - _ignorable(config))
    if left_over:
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
    max_shard_bytes: int = 5 << 30,
) -> Path:
    """Write a folder that transformers loads: weights from `params`, everything else copied from `source`.

    Written beside `out` and renamed at the end, so that no half-written folder looks whole.
    """
    out, source = Path(out), Path(source)
    if out.exists() and any(out.iterdir()):
        raise errors.InputError(f"{out}: already exists and is not empty; give a new folder")
    import ml_dtypes

    numpy_dtype = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    shards: list[list[str]] = [[]]
    pending: dict[str, np.ndarray] = {}
    size = total = 0

    def flush():
        safetensors.numpy.save_file(pending, part / f"shard-{len(shards):05d}", metadata={"format": "pt"})
        pending.clear()

    for name, value in _file_tensors(params, config):
        value = np.ascontiguousarray(value.astype(numpy_dtype))
        if pending and size + value.nbytes > max_shard_bytes:
            flush()
            shards.append([])
            size = 0
        pending[name] = value
        shards[-1].append(name)
        size, total = size + value.nbytes, total + value.nbytes
    flush()
    if len(shards) == 1:
        (part / "shard-00001").rename(part / SINGLE)
    else:
        weight_map = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            (part / f"shard-{number:05d}").rename(part / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (part / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    copy_side_files(source, part, dtype=dtype)
    if out.exists():
        out.rmdir()
    part.rename(out)
    return out


def copy_side_files(source: Path, out: Path, *, dtype: str | None = None) -> None:
    """Copy configuration, tokenizer and preprocessor files; the config's dtype follows the weights'."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if dtype is not None:
        config = json.loads((out / "config.json").read_text())
        config.pop("torch_dtype", None)
        (out / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")


def _file_tensors(params: dict, config: model.Config) -> Iterator[tuple[str, np.ndarray]]:
    for where, (name, form) in NAMES.items():
        if where == "head" and config.tie_word_embeddings:
            continue
        value = np.asarray(jax.device_get(_at(params, where.split("."))))
        if "{i}" in name:
            for i, layer in enumerate(value):
                yield name.format(i=i), form.to_file(layer, config.vision)
        else:
            yield name, form.to_file(value, config.vision)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Every tensor's name (old spelling) and file. An index and its files must agree both ways."""
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise errors.InputError(f"{folder / INDEX}: not a weight index; export the checkpoint again") from None
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise errors.InputError(f"{folder / INDEX}: names the file '{shard}', which is not in the folder")
    elif (folder / SINGLE).is_file():
        weight_map, shards = None, [SINGLE]
    else:
        raise errors.InputError(f"{folder}: no {SINGLE} and no {INDEX}; only safetensors weights are read")
    found: dict[str, Path] = {}
    for shard in shards:
        try:
            with safetensors.safe_open(folder / shard, framework="np") as file:
                names = list(file.keys())
        except (safetensors.SafetensorError, OSError) as problem:
            raise errors.InputError(f"{folder / shard}: not a whole safetensors file ({problem})") from None
        for name in names:
            if weight_map is not None and weight_map.get(name) != shard:
                raise errors.InputError(f"{folder / shard}: holds '{name}', which the index places elsewhere")
            found[name] = folder / shard
    missing = sorted(set(weight_map or found) - set(found))
    if missing:
        raise errors.InputError(f"{folder / INDEX}: tensor '{missing[0]}' is in none of the files")
    return found


def _ignorable(config: model.Config) -> set[str]:
    # Some writers store the tied head a second time; it is never read.
    return {"lm_head.weight"} if config.tie_word_embeddings else set()


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
