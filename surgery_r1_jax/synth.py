"""Synthetic surgical frames with exact labels, in the layout of EndoVis-18-VQLA.

A frame is a pure function of (seed, frame number): the same call writes the same bytes with any number of worker
processes.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from rich.console import Console
from rich.progress import track

from surgery_r1_jax import cues, shapes, tissue, vocabulary
from surgery_r1_jax import scene as scenes
from surgery_r1_jax.errors import InputError
from surgery_r1_jax.location import LocationRule
from surgery_r1_jax.scene import CANVAS, Instrument, Scene
from surgery_r1_jax.shapes import Tube

# The sequences of EndoVis-18-VQLA; 1, 5 and 16 are its validation split.
SEQUENCES = tuple(f"seq_{n}" for n in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15, 16))
RULE = LocationRule("organ", "larger_y")  # that of EndoVis-18-VQLA
SMALLEST, LARGEST = 56, 4096  # sides of a picture, in pixels

PixelBox = tuple[int, int, int, int]  # x0, y0, x1, y1 with exclusive far edges, inside the picture

VESSEL = (140, 14, 28, 120)


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
    about = {
        "what": "synthetic frames of surgery_r1_jax, not of any patient or animal",
        **{"frames": frames, "seed": seed, "size": list(size), "max_tools": max_tools, "balance": balance},
        "sequences": list(sequences),
    }
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
    picture.save(root / sequence / "left_frames" / f"{stem}.png", compress_level=1)
    lines = labels(scene, boxes, size)
    (root / sequence / "vqla" / "label" / f"{stem}_QA.txt").write_text("\n".join(lines) + "\n", "ascii", newline="\n")


def labels(scene: Scene, boxes: Sequence[PixelBox], size: tuple[int, int]) -> list[str]:
    """The label lines `question|answer|x1,y1,x2,y2` of a scene; boxes are 1-based, as in EndoVis-18-VQLA."""
    organ, *tools = ([edge / size[i % 2] for i, edge in enumerate(box)] for box in boxes)
    texts = [",".join(str(edge + 1) for edge in box) for box in boxes]
    states = [(vocabulary.STATE, i.tool, i.state) for i in scene.instruments]
    locations = [
        (vocabulary.LOCATION, i.tool, RULE.answer(box, organ)) for i, box in zip(scene.instruments, tools, strict=True)
    ]
    lines = [f"{vocabulary.ask(vocabulary.ORGAN)}|kidney|{texts[0]}"]
    for asked in (states, locations):
        lines += [
            f"{vocabulary.ask(kind, tool)}|{answer}|{text}"
            for (kind, tool, answer), text in zip(asked, texts[1:], strict=True)
        ]
    return lines


# Pictures


class Pens(NamedTuple):
    """Two ways to draw on one picture: `sheer` mixes by alpha and takes three times as long."""

    solid: ImageDraw.ImageDraw
    sheer: ImageDraw.ImageDraw


class Polygons(NamedTuple):
    """Tubes as filled polygons: all points `[M, 2]`, then (first, past the last, fill) of each polygon."""

    points_M2: np.ndarray
    cuts: list[tuple[int, int, tuple[int, ...]]]


def draw(scene: Scene, size: tuple[int, int]) -> tuple[Image.Image, list[PixelBox]]:
    """The picture of a scene at (width, height), and the boxes of its kidney and then of its instruments.

    An instrument's box is the tightest about all of it that lies in the frame: shaft, wrist and jaws, not its cue.
    """
    rng = np.random.default_rng(scene.texture)
    finer = 2 if size[0] > 400 else 3  # Pillow draws polygons without antialiasing
    fine_size = (size[0] * finer, size[1] * finer)
    coarser = math.ceil(size[0] / 640)  # tissue and light are smooth
    coarse_size = (math.ceil(size[0] / coarser), math.ceil(size[1] / coarser))

    backdrop = _image(tissue.paint(scene.kidney, coarse_size, rng))
    backdrop = ImageChops.multiply(backdrop, _shadow(scene, coarse_size))
    picture = backdrop.resize(size, Image.Resampling.BILINEAR).resize(fine_size, Image.Resampling.NEAREST)
    pens = Pens(ImageDraw.Draw(picture), ImageDraw.Draw(picture, "RGBA"))
    _draw_vessels(pens.sheer, rng, fine_size)
    for instrument in scene.instruments:
        to_shaft, to_tip = _placement(instrument, fine_size)
        _fill(pens, _shaft_polygons(instrument.tool, size[1]), *to_shaft)
        _fill(pens, _tip_polygons(instrument.tool, instrument.state, instrument.variant, size[1]), *to_tip)
    light = _image(tissue.light((80, 64), rng)).resize(size, Image.Resampling.BILINEAR)
    picture = ImageChops.multiply(picture.reduce(finer), Image.merge("RGB", (light,) * 3))
    return picture, boxes(scene, size)


def boxes(scene: Scene, size: tuple[int, int]) -> list[PixelBox]:
    """The boxes that `draw` returns, without the picture."""
    width, height = size
    border_N2 = np.clip(scenes.outline(scene.kidney), 0, 1) * size
    (left, top), (right, bottom) = border_N2.min(0), border_N2.max(0)
    found = [(math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))]
    for instrument in scene.instruments:
        mask = Image.new("1", (2 * width, 2 * height))
        pen = ImageDraw.Draw(mask)
        shaft, head = _outlines(instrument.tool, instrument.variant, instrument.state == "Grasping")
        for outline, place in zip((shaft, head), _placement(instrument, mask.size), strict=True):
            for polygon, _ in _placed(outline, *place):
                pen.polygon(polygon, 1)
        left, top, right, bottom = mask.getbbox()
        found.append((left // 2, top // 2, (right + 1) // 2, (bottom + 1) // 2))
    return found


def _image(rgb: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(rgb, 0, 1) * 255).astype(np.uint8))


def _placement(instrument: Instrument, size: tuple[int, int]):
    """For shaft and tip: the matrix and shift that take points of `shapes` to pixels of a picture of this size."""
    entry_2, joint_2, tip_2 = np.array((instrument.entry, instrument.joint, instrument.tip)) * CANVAS
    scale = np.hypot(*(tip_2 - joint_2)) / shapes.DESIGNS[instrument.tool].reach
    pixels_2 = np.array(size) / CANVAS

    def frame(toward_2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = toward_2 * (scale / np.hypot(*toward_2))
        return np.array([[x, y], [-y, x]]) * pixels_2, joint_2 * pixels_2

    return frame(joint_2 - entry_2), frame(tip_2 - joint_2)


def _placed(polygons: Polygons, matrix_22: np.ndarray, shift_2: np.ndarray):
    """Each polygon as x, y, x, y ... in pixels, with its fill."""
    flat = (polygons.points_M2 @ matrix_22 + shift_2).reshape(-1).tolist()
    return [(flat[2 * first : 2 * past], fill) for first, past, fill in polygons.cuts]


def _fill(pens: Pens, polygons: Polygons, matrix_22: np.ndarray, shift_2: np.ndarray) -> None:
    for polygon, fill in _placed(polygons, matrix_22, shift_2):
        pen = pens.solid if fill[3] == 255 else pens.sheer
        pen.polygon(polygon, fill)


@functools.cache
def _shaft_polygons(tool: str, height: int) -> Polygons:
    return _polygons(shapes.shaft(tool), height)


@functools.cache
def _tip_polygons(tool: str, state: str, variant: int, height: int) -> Polygons:
    """Wrist and jaws between the two layers of the cue."""
    reach = shapes.DESIGNS[tool].reach
    under, over = (
        [part._replace(path_N2=part.path_N2 + np.array((reach, 0))) for part in layer]
        for layer in cues.cue(state, variant)
    )
    return _polygons([*under, *shapes.head(tool, variant, state == "Grasping"), *over], height)


@functools.cache
def _outlines(tool: str, variant: int, closed: bool) -> tuple[Polygons, Polygons]:
    """Shaft and head as bare silhouettes for a mask."""
    return _polygons(shapes.shaft(tool), 0), _polygons(shapes.head(tool, variant, closed), 0)


def _polygons(tubes: list[Tube], height: int) -> Polygons:
    """Cut each tube into strips along it, each as bright as a cylinder lit from the camera is there.

    `height` of the picture in pixels decides how many strips are worth their time.
    """
    points, cuts, count = [], [], 0
    for tube in tubes:
        shaded = tube.gloss is not None
        strips = int(np.clip(tube.radius_N.max() * height, 1, 24)) if shaded else 1
        edges = np.linspace(-1, 1, strips + 1)
        across = (edges[1:] + edges[:-1]) / 2
        shade = 0.3 + 0.7 * np.sqrt(1 - across**2) if shaded else np.ones(1)
        glint = 200 * tube.gloss * np.exp(-(((across + 0.3) / 0.2) ** 2)) if shaded else np.zeros(1)
        colours = np.minimum(np.outer(shade, tube.colour) + glint[:, None], 255).astype(int).tolist()
        lines = _lines(tube.path_N2, tube.radius_N, edges)
        for k in range(strips):
            points += [lines[k], lines[k + 1, ::-1]]
            cuts.append((count, count + 2 * len(tube.path_N2), (*colours[k], tube.alpha)))
            count += 2 * len(tube.path_N2)
    return Polygons(np.concatenate(points), cuts)


def _lines(path: np.ndarray, radius: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Lines `[..., E, N, 2]` along tubes with paths `[..., N, 2]` and radii `[..., N]`, at places `[E]` -1..1 across."""
    along = np.gradient(path, axis=-2)
    along /= np.maximum(np.hypot(along[..., 0], along[..., 1]), 1e-9)[..., None]
    right = np.stack([-along[..., 1], along[..., 0]], -1) * radius[..., None]
    return path[..., None, :, :] + across[:, None, None] * right[..., None, :, :]


def _draw_vessels(pen: ImageDraw.ImageDraw, rng: np.random.Generator, size: tuple[int, int]) -> None:
    path_VN2, radius_VN = tissue.vessels(rng)
    lines_V2N2 = _lines(path_VN2, radius_VN, np.array((-1, 1))) * (np.array(size) / CANVAS)
    lines_V2N2[:, 1] = lines_V2N2[:, 1, ::-1]
    for points in lines_V2N2.reshape(len(path_VN2), -1).tolist():
        pen.polygon(points, VESSEL)


def _shadow(scene: Scene, size: tuple[int, int]) -> Image.Image:
    """The soft shadow of the instruments, white where there is none."""
    small = np.array((100, 80))
    mask = Image.new("L", tuple(small), 255)
    pen = ImageDraw.Draw(mask)
    for instrument in scene.instruments:
        path_32 = np.array((instrument.entry, instrument.joint, instrument.tip)) * small + (1.5, 3)
        width = round(2 * shapes.DESIGNS[instrument.tool].radius * 1.2 * small[1])
        pen.line(path_32.reshape(-1).tolist(), 110, width)
    mask = mask.filter(ImageFilter.GaussianBlur(2)).resize(size, Image.Resampling.BILINEAR)
    return Image.merge("RGB", (mask,) * 3)
