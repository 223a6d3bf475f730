"""Draws a scene: `draw` gives the picture with its boxes, `boxes` the boxes alone."""

import functools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from surgery_r1_jax import cues, shapes, tissue
from surgery_r1_jax.scene import CANVAS, Instrument, Scene, outline
from surgery_r1_jax.shapes import Tube

PixelBox = tuple[int, int, int, int]  # x0, y0, x1, y1 with exclusive far edges, inside the picture

VESSEL = (140, 14, 28, 120)
SHADOW = 110  # of 255: how much light is left in the deepest shadow


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
    border_N2 = np.clip(outline(scene.kidney), 0, 1) * size
    (left, top), (right, bottom) = border_N2.min(0), border_N2.max(0)
    found = [(math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))]
    finer = 2 if width > 640 else 4  # Pillow's polygons are up to a pixel too wide
    for instrument in scene.instruments:
        mask = Image.new("1", (finer * width, finer * height))
        pen = ImageDraw.Draw(mask)
        silhouettes = _silhouettes(instrument.tool, instrument.variant, instrument.state == "Grasping")
        for silhouette, place in zip(silhouettes, _placement(instrument, mask.size), strict=True):
            for polygon, _ in _placed(silhouette, *place):
                pen.polygon(polygon, 1)
        left, top, right, bottom = mask.getbbox()
        found.append((left // finer, top // finer, -(-right // finer), -(-bottom // finer)))
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
    flat = (polygons.points_M2 @ matrix_22 + (shift_2 - 0.5)).reshape(-1).tolist()  # Pillow counts from pixel centres
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
def _silhouettes(tool: str, variant: int, closed: bool) -> tuple[Polygons, Polygons]:
    """Shaft and head, one polygon a tube, for a mask."""
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
    """Lines `[..., E, N, 2]` along tubes with paths `[..., N, 2]` and radii `[..., N]`, at `[E]` -1..1 across."""
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
        pen.line(path_32.reshape(-1).tolist(), SHADOW, width)
    mask = mask.filter(ImageFilter.GaussianBlur(2)).resize(size, Image.Resampling.BILINEAR)
    return Image.merge("RGB", (mask,) * 3)
