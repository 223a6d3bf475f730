#!/usr/bin/env python
"""Conversion at real size: every byte kept, memory held down, seconds against a plain copy of the same files.

Writes a folder of the shape of Qwen2.5-VL-3B (or another) with random bfloat16 weights, imports and exports it by the
command line, and compares hashes, peak memory and the median seconds with copy and fsync. Needs four times the size of
the weights on disk.

.venv/bin/python scripts/prove_conversion.py --shape qwen2_5_vl_3b --work /tmp/conversion
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import safetensors

from surgery_r1_jax import hf, images, sizes, tensors, tiny

GIB = 2**30
SHAPES = {"qwen2_5_vl_3b": "Qwen2.5-VL-3B", "qwen3_vl_2b": "Qwen3-VL-2B"}


def write_random(folder: Path, shape: str) -> None:
    """A folder of this shape: random weights, the tiny tokenizer."""
    tiny.write_folder(folder)
    image = json.loads((folder / "config.json").read_text("utf-8"))["image_token_id"]
    sizes.transformers_config(SHAPES[shape], image_token_id=image).save_pretrained(folder)
    settings = hf.read_config(folder)
    bounds = (4 * 28 * 28, 1280 * 28 * 28)
    images.Preprocessor(settings.vision.patch_size, 2, 2, *bounds, tiny.MEAN, tiny.STD).to_folder(folder)
    rng = np.random.default_rng(0)
    layout = hf.file_layout(settings)
    values = (rng.standard_normal(size, np.float32).astype(ml_dtypes.bfloat16) for _, size in layout)
    tensors.write(folder, layout, values, "bfloat16", 2 * GIB)


def hashes(folder: Path) -> tuple[dict[str, str], int]:
    """A hash of every tensor, and the size of the largest."""
    found, largest = {}, 0
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                value = file.get_tensor(name)
                found[name] = hashlib.sha256(value.tobytes()).hexdigest()
                largest = max(largest, value.nbytes)
    return found, largest


def copy(source: Path, out: Path) -> float:
    """Seconds to copy all files and have them on disk."""
    since = time.monotonic()
    out.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, out / path.name)
        with open(out / path.name, "rb+") as file:
            os.fsync(file.fileno())
    return time.monotonic() - since


def run(*words: str) -> tuple[float, int]:
    """Seconds and peak bytes of a command of surgery-r1."""
    code = "import resource, sys; from surgery_r1_jax import cli; status = cli.main(sys.argv[1:]); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    since = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.monotonic() - since
    return seconds, int(done.stdout.split()[-1]) * 1024


def main() -> None:
    """Write, convert, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2_5_vl_3b")
    parser.add_argument("--work", type=Path, required=True, help="folder for some tens of gigabytes; new")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if args.work.exists():
        parser.error(f"{args.work}: already exists; give a new folder")
    args.work.mkdir(parents=True)
    source, inside, out, plain = (args.work / name for name in ("source", "imported", "exported", "copied"))
    write_random(source, args.shape)
    before, largest = hashes(source)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    print(f"{args.shape}: {len(before)} tensors, {size / GIB:.2f} GiB, largest {largest / GIB:.2f} GiB", flush=True)

    seconds: dict[str, list[float]] = {"copy": [], "import": [], "export": []}
    peaks = {"import": 0, "export": 0}
    for repeat in range(args.repeats):
        for folder in (inside, out, plain):
            shutil.rmtree(folder, ignore_errors=True)
        seconds["copy"].append(copy(source, plain))
        shutil.rmtree(plain)
        for name, words in (
            ("import", ("import", str(source), str(inside), "--dtype", "bfloat16")),
            ("export", ("export", str(inside), str(out), "--dtype", "bfloat16", "--max-shard-size", "2GiB")),
        ):
            took, peak = run(*words)
            seconds[name].append(took)
            peaks[name] = max(peaks[name], peak)
        after, _ = hashes(out)
        assert after == before, "a tensor changed on the way"
        print(f"round {repeat + 1}: " + ", ".join(f"{k} {v[-1]:.1f} s" for k, v in seconds.items()), flush=True)

    middle = {name: statistics.median(values) for name, values in seconds.items()}
    bound = size + 2 * GIB + largest
    result = dict(
        shape=args.shape,
        tensors=len(before),
        gib=size / GIB,
        all_hashes_equal=True,
        seconds=middle,
        import_ratio=middle["import"] / middle["copy"],
        export_ratio=middle["export"] / middle["copy"],
        peak_gib={name: peak / GIB for name, peak in peaks.items()},
        bound_gib=bound / GIB,
        own_peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    )
    print(json.dumps(result, indent=2))
    shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
