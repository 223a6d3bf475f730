"""Synthetic surgical frames with exact labels, in the layout of EndoVis-18-VQLA.

A frame is a pure function of (seed, frame number): the same call writes the same bytes with any number of worker
processes.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from surgery_r1_jax import scene as scenes
from surgery_r1_jax import vocabulary
from surgery_r1_jax.drawing import PixelBox, draw
from surgery_r1_jax.errors import InputError
from surgery_r1_jax.location import LocationRule
from surgery_r1_jax.scene import Scene

# The sequences of EndoVis-18-VQLA; 1, 5 and 16 are its validation split.
SEQUENCES = tuple(f"seq_{n}" for n in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15, 16))
RULE = LocationRule("organ", "larger_y")  # that of EndoVis-18-VQLA
SMALLEST, LARGEST = 56, 4096  # sides of a picture, in pixels
RUN_LENGTH = 3  # zlib's Z_RLE: for these pictures smaller files than its default, and a third of the time


def frame_name(number: int, sequences: Sequence[str] = SEQUENCES) -> str:
    """Id of the frame with this number, such as "seq_2/frame000"; the sequences take turns."""
    return f"{sequences[number % len(sequences)]}/frame{number // len(sequences):03d}"


def scene_of(seed: int, number: int, *, max_tools: int = 4, balance: float = 0.0) -> Scene:
    """The scene behind the frame of this number in a folder that `write` made with the same arguments."""
    return scenes.sample(np.random.default_rng([seed, number]), max_tools=max_tools, balance=balance)


def write(
    directory: str | Path,
    *,
    frames: int,
    seed: int,
    size: tuple[int, int] = (1280, 1024),
    max_tools: int = 4,
    balance: float = 0.0,
    sequences: Sequence[str] = SEQUENCES,
    jobs: int = 1,
) -> list[str]:
    """Write `frames` frames of (width, height) `size` with their labels below a new or empty folder; return their ids.

    `max_tools` and `balance` are those of `scene.sample`. With `jobs` above 1 the frames are drawn by that many
    spawned processes, so a script must then keep its own work under `if __name__ == "__main__"`.

    Raises: InputError for a bad argument, before anything is written, and where the folder cannot be written.
    """
    root = Path(directory)
    _check(root, frames, seed, size, max_tools, balance, sequences, jobs)
    names = [frame_name(number, sequences) for number in range(frames)]
    draw_frame = functools.partial(_write_frame, root, seed, tuple(size), max_tools, balance)
    recipe = {"frames": frames, "seed": seed, "size": size, "max_tools": max_tools, "balance": balance}
    about = {"what": "synthetic frames made by surgery_r1_jax", **recipe, "sequences": sequences}
    try:
        for sequence in {name.split("/")[0] for name in names}:
            (root / sequence / "left_frames").mkdir(parents=True)
            (root / sequence / "vqla" / "label").mkdir(parents=True)
        done = _spread(draw_frame, list(enumerate(names)), jobs)
        for _ in track(done, "drawing frames", frames, console=Console(stderr=True)):
            pass
        (root / "synthetic.json").write_text(json.dumps(about, indent=2) + "\n")
    except OSError as error:
        remedy = "make room or name another folder"
        raise InputError(f"{root}: cannot write the frames ({error.strerror or error}); {remedy}") from error
    return names


def _check(root: Path, frames, seed, size, max_tools, balance, sequences, jobs) -> None:
    """Refuse what cannot be drawn or would mix with other files."""
    if frames < 1:
        raise InputError(f"frames is {frames}; at least 1 is needed")
    if seed < 0:
        raise InputError(f"seed is {seed}; take 0 or more")
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; take 1 or more")
    if len(size) != 2 or not all(SMALLEST <= side <= LARGEST for side in size):
        shown = "x".join(map(str, size))
        raise InputError(f"size is {shown}; each side must be {SMALLEST} to {LARGEST} pixels, such as 1280x1024")
    if not 1 <= max_tools <= 4:
        raise InputError(f"max_tools is {max_tools}; EndoVis-18 has 1 to 4 instruments a frame, take one of these")
    if not 0 <= balance <= 1:
        raise InputError(f"balance is {balance}; take 0 (as in EndoVis-18) to 1 (uniform)")
    if not sequences or len(set(sequences)) < len(sequences) or not set(sequences) <= set(SEQUENCES):
        raise InputError(
            f"sequences are {', '.join(sequences) or 'none'}; take different ones of {', '.join(SEQUENCES)}"
        )
    if root.exists() and not root.is_dir():
        raise InputError(f"{root}: is a file; name a folder")
    if root.is_dir() and any(root.iterdir()):
        raise InputError(f"{root}: the folder is not empty; name a new one or remove what is in it")


def _spread(work: Callable, items: list, jobs: int) -> Iterator:
    """The results of `work` on each item in order, from this process or from `jobs` spawned ones."""
    if jobs == 1:
        yield from map(work, items)
        return
    pool = ProcessPoolExecutor(min(jobs, len(items)), mp_context=get_context("spawn"))
    try:
        yield from pool.map(work, items, chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_frame(
    root: Path, seed: int, size: tuple[int, int], max_tools: int, balance: float, item: tuple[int, str]
) -> None:
    number, name = item
    sequence, stem = name.split("/")
    scene = scene_of(seed, number, max_tools=max_tools, balance=balance)
    picture, boxes = draw(scene, size)
    picture.save(root / sequence / "left_frames" / f"{stem}.png", compress_type=RUN_LENGTH)
    text = "".join(f"{line}\n" for line in labels(scene, boxes, size))
    (root / sequence / "vqla" / "label" / f"{stem}_QA.txt").write_text(text, "ascii", newline="\n")


def labels(scene: Scene, boxes: Sequence[PixelBox], size: tuple[int, int]) -> list[str]:
    """The label lines `question|answer|x1,y1,x2,y2` of a scene; boxes are 1-based, as in EndoVis-18-VQLA."""
    units = [tuple(edge / size[i % 2] for i, edge in enumerate(box)) for box in boxes]
    texts = [",".join(str(edge + 1) for edge in box) for box in boxes]
    organ = f"{vocabulary.ask(vocabulary.ORGAN)}|kidney|{texts[0]}"
    states, locations = [], []
    for instrument, box, text in zip(scene.instruments, units[1:], texts[1:], strict=True):
        where = RULE.answer(box, units[0])
        states.append(f"{vocabulary.ask(vocabulary.STATE, instrument.tool)}|{instrument.state}|{text}")
        locations.append(f"{vocabulary.ask(vocabulary.LOCATION, instrument.tool)}|{where}|{text}")
    return [organ, *states, *locations]
