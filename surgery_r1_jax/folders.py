"""What a folder is that someone took for a model: one line that says so and, where a model is near, names it.

Looks at the names of files and into config.json; opens no weights.
"""

import collections
import itertools
import json
from collections.abc import Collection, Iterator
from pathlib import Path

from surgery_r1_jax import files
from surgery_r1_jax.errors import InputError, one_line, printable

WANTED = "give a Hugging Face folder of a Qwen-VL model, or a run directory"
LEVELS = 3  # up and down, where a model is looked for: run/checkpoints/100/state, cache/models--Qwen/snapshots/c0ffee
MOST_FOLDERS, MOST_ENTRIES = 300, 10_000  # that are looked at, and of each of them
MOST_LAYERS = 10_000  # transformers writes a list as long as there are layers
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DATA_FILES, DATA_FOLDERS = ("records.jsonl", "records.csv", "data.json"), {"vqla", "left_frames"}


def model_type(folder: Path, known: Collection[str]) -> str:
    """The family that config.json names, one of `known`.

    Raises: InputError telling what the folder is instead, or what of its config.json cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(printable(f"{folder}: {_without_config(folder)}"))
    files.check_fetched(path)
    try:
        entries = json.loads(path.read_text("utf-8"))
        found, quantized = entries.get("model_type"), entries.get("quantization_config")
    except (ValueError, AttributeError, RecursionError) as problem:
        raise InputError(f"{path}: not a JSON object ({one_line(problem)}); copy it from the checkpoint") from None
    reason = None
    if not isinstance(found, str) or found not in known:
        seeing = any(entries.get(part) for part in ("vision_config", "thinker_config", "visual"))
        kind = "" if seeing or not isinstance(found, str) else ", a model of text alone,"
        reason = f"model_type '{found}'{kind} is not supported; supported: {', '.join(known)}"
    elif quantized is not None or (folder / "quantize_config.json").exists():
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        reason = (
            f"quantization_config: weights quantized{f' by {method}' if method else ''} are not read; "
            "take the model's release in bfloat16"
        )
    else:
        parts = [entries, *(entries.get(name) for name in ("text_config", "vision_config"))]
        for part, name in itertools.product(parts, ("num_hidden_layers", "depth")):
            layers = part.get(name) if isinstance(part, dict) else None
            if isinstance(layers, int | float) and layers > MOST_LAYERS:
                reason = f"{name} {layers} is above {MOST_LAYERS}; copy the file from the checkpoint"
    if reason:
        raise InputError(printable(f"{path}: {reason}"))
    return found


def without_weights(folder: Path, wanted: str) -> str:
    """Why a folder with a config.json holds none of the files `wanted`, and the remedy."""
    if gguf := _first(folder, "*.gguf"):
        return _gguf(gguf)
    if folder.name == "model" and any((folder.parent / name).is_dir() for name in ("best", "checkpoints")):
        return f"configuration and tokenizer of a run, whose weights lie elsewhere; give {folder.parent}"
    if pickled := next(filter(None, (_first(folder, pattern) for pattern in PICKLED)), None):
        why = "it can run code when it is opened"
        return f"only safetensors weights are read, not {pickled} ({why}); save the model with save_pretrained"
    if shard := _first(folder, "*.safetensors"):
        return f"no {wanted}, which {shard} needs beside it; copy the checkpoint again"
    return f"no {wanted}; only safetensors weights are read: save the model as such"


def _without_config(folder: Path) -> str:
    """Why there is no config.json, and the remedy."""
    if not folder.exists():
        return f"no config.json: there is no such folder; {WANTED}"
    if not folder.is_dir():
        return f"no config.json: this is a file; {f'give {folder.parent}' if _is_model(folder.parent) else WANTED}"
    if gguf := _first(folder, "*.gguf"):
        return _gguf(gguf)
    below = list(itertools.islice(_below(folder), MOST_FOLDERS))
    near = [path for path in folder.parents[:LEVELS] if _is_model(path)][:1]
    near = near or [path for path in below if _is_model(path) and not _is_model(path.parent)]
    if near:
        more = f" (and {len(near) - 3} more)" if len(near) > 3 else ""
        return f"no config.json here; give {' or '.join(map(str, near[:3]))}{more}"
    if any((folder / name).is_file() for name in DATA_FILES) or any(path.name in DATA_FOLDERS for path in below):
        return f"no config.json: this is a data set; {WANTED}"
    if not any(folder.iterdir()):
        return f"no config.json: the folder is empty; {WANTED}"
    return f"no config.json; {WANTED}"


def _gguf(name: str) -> str:
    return f"GGUF weights ({name}) are not read; take the model's release in safetensors"


def _is_model(folder: Path) -> bool:
    """Whether a folder looks like one of Hugging Face's, or like a run's."""
    return (folder / "config.json").is_file() or (folder / "model" / "config.json").is_file()


def _first(folder: Path, pattern: str) -> str | None:
    return min((path.name for path in folder.glob(pattern)), default=None)


def _below(folder: Path) -> Iterator[Path]:
    """Folders inside a folder, nearest first; hidden and linked ones are left out."""
    waiting = collections.deque([(folder, LEVELS)])
    while waiting:
        here, levels = waiting.popleft()
        try:
            entries = sorted(itertools.islice(here.iterdir(), MOST_ENTRIES))
        except OSError:
            continue
        inside = [path for path in entries if path.name[0] != "." and path.is_dir() and not path.is_symlink()]
        yield from inside
        waiting += [(path, levels - 1) for path in inside if levels > 1]
