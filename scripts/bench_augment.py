#!/usr/bin/env python
"""What augmentation costs: each kind beside decoding the same frame and resizing it for the model, on one core.

Prints medians of the processor's milliseconds and as shares of decoding and resizing, which every frame costs anyway.

.venv/bin/python scripts/bench_augment.py data/EndoVis-18-VQLA
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from surgery_r1_jax import augment, images, location, options, records

MODEL_SIZE = (1120, 896)  # what Qwen2.5-VL makes of 1280x1024 under 1,003,520 pixels
KINDS = ("flip_left_right", "flip_top_bottom", "crop", "light", "colour", "smoke", "blood")


def main() -> None:
    """Time every kind and all together, in turns with the decoding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data set folder")
    parser.add_argument("--frames", type=int, default=5, help="frames (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="times that each is changed (default: %(default)s)")
    args = parser.parse_args()
    found = records.read(args.data)
    rule = location.settled(found)
    kinds = {kind: options.Augment(**{kind: 1.0}) for kind in KINDS}
    kinds["all of them"] = options.Augment(**dict.fromkeys(KINDS, 1.0))
    seconds: dict[str, list[float]] = {name: [] for name in ("decode and resize", *kinds)}
    for number, frame in enumerate(found[: args.frames]):
        for repeat in range(args.repeats):
            since = time.process_time()
            picture = images.load(frame.image)
            picture.resize(MODEL_SIZE, Image.Resampling.BICUBIC)
            seconds["decode and resize"].append(time.process_time() - since)
            for name, settings in kinds.items():
                rng = np.random.default_rng([number, repeat])
                since = time.process_time()
                augment.apply(frame, picture, settings, rng, rule=rule)
                seconds[name].append(time.process_time() - since)
    base = statistics.median(seconds["decode and resize"])
    table = Table("", "ms", "share of decoding and resizing")
    for name, times in seconds.items():
        middle = statistics.median(times)
        table.add_row(name, f"{1e3 * middle:.1f}", f"{middle / base:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
