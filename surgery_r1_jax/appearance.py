"""What a frame could have looked like: another light, other colours, smoke or blood in front of the camera.

Nothing moves, so no label changes. Fields are made small and enlarged, and the rest is left to Pillow: each change
costs a part of what decoding the frame does.
"""

import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from surgery_r1_jax.options import Augment

_GREY = np.array((0.299, 0.587, 0.114))  # ITU-R BT.601, as Pillow
_DROPS = 600  # at most
_SMOKE_SIDE, _BLOOD_SIDE = 64, 320  # pixels of the longer side of the small fields
_SMOKE = (216, 214, 220)
# Of red, green and blue: what the thickest blood lets through, and how fast it comes to that.
_DEEP, _FADES = (0.3, 0.015, 0.025), (1.3, 3.2, 2.8)


def change(picture: Image.Image, settings: Augment, rng: np.random.Generator) -> Image.Image:
    """An RGB picture as the shares in `settings` will have it, in its size; itself where the lots leave it."""
    blood, smoke, light, colour = rng.random(4) < (settings.blood, settings.smoke, settings.light, settings.colour)
    if blood:
        picture = spill(picture, settings.blood_cover * rng.uniform(0.2, 1), rng)
    if smoke:
        picture = fume(picture, settings.smoke_density * rng.uniform(0.3, 1), rng)
    if colour:
        picture = tint(picture, *_factors(rng, settings.saturation, settings.white_balance, settings.white_balance))
    if light:
        picture = relight(picture, *_factors(rng, settings.brightness, settings.contrast, settings.gamma))
    return picture


def relight(picture: Image.Image, brightness: float, contrast: float, gamma: float) -> Image.Image:
    """Brightness multiplied, then an exponent, then contrast about the mean of the three channels."""
    level = np.minimum(np.arange(256) / 255 * brightness, 1) ** gamma
    mean = float(np.mean(picture.reduce(max(1, min(picture.size) // 32)))) / 255
    middle = min(mean * brightness, 1) ** gamma
    level = np.clip(middle + (level - middle) * contrast, 0, 1)
    return picture.point((255 * level).round().astype(int).tolist() * 3)


def tint(picture: Image.Image, saturation: float, red: float, blue: float) -> Image.Image:
    """Colours moved away from grey or towards it, then red and blue multiplied; white stays about as bright."""
    gain_3 = np.array((red, 1, blue)) / (_GREY @ (red, 1, blue))
    matrix_33 = gain_3[:, None] * (saturation * np.eye(3) + (1 - saturation) * _GREY)
    return picture.convert("RGB", np.c_[matrix_33, np.zeros(3)].ravel().tolist())


def fume(picture: Image.Image, density: float, rng: np.random.Generator) -> Image.Image:
    """Smoke of cautery: a wandering plume that hides up to `density` and takes on the light of what it hides."""
    size = _small(picture, _SMOKE_SIDE)
    wisps = 0.5 * _clouds(rng, size, 3) + 0.35 * _clouds(rng, size, 6) + 0.25 * _clouds(rng, size, 13)
    x, y = _grid(size)
    from_source = np.hypot(x - rng.uniform(0.1, 0.9), y - rng.uniform(0.1, 0.9)) / rng.uniform(0.5, 1.3)
    thick = np.clip(0.85 + 0.45 * wisps - 0.8 * from_source**2, 0.08, 1)
    veil = picture.resize(size, Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(size[0] / 12))
    lit = veil.convert("L").point([round(105 + 0.55 * level) for level in range(256)])
    veil = Image.blend(ImageChops.multiply(Image.new("RGB", size, _SMOKE), Image.merge("RGB", (lit,) * 3)), veil, 0.12)
    mask = _picture(255 * density * thick)
    return Image.composite(_enlarged(veil, picture), picture, _enlarged(mask, picture))


def spill(picture: Image.Image, cover: float, rng: np.random.Generator) -> Image.Image:
    """Blood over about a part `cover` of the frame: spatters of drops, and a film that is thin at its border."""
    size = _small(picture, _BLOOD_SIDE)
    of_drops = rng.uniform(0.15, 0.5)
    fine = 0.6 * _clouds(rng, size, 12) + 0.4 * _clouds(rng, size, 40)
    cloud = _clouds(rng, size, 2) + 0.5 * _clouds(rng, size, 5) + 0.2 * fine
    film = np.clip(cloud - np.quantile(cloud, 1 - cover * (1 - of_drops)), 0, None)
    film = (0.35 * np.minimum(film / 0.08, 1) + film) * (1 + 0.25 * fine)
    dome = _drops(rng, size, cover * of_drops, fine)
    thick = rng.uniform(0.6, 1.3) * film + rng.uniform(0.8, 1.8) * dome
    # A drop glints where it faces the light, a little above its middle.
    glint = np.clip(5 * np.diff(dome, axis=0, prepend=dome[:1]) - 0.7, 0, 0.5)
    layers = [deep + (1 - deep) * np.exp(-fade * thick) + glint for deep, fade in zip(_DEEP, _FADES, strict=True)]
    through = Image.merge("RGB", [_picture(255 * layer) for layer in layers])
    return ImageChops.multiply(picture, _enlarged(through, picture))


def _factors(rng: np.random.Generator, *bounds: float) -> list[float]:
    """A factor between 1 / (1 + bound) and 1 + bound for each; as likely below 1 as above."""
    return [math.exp(rng.uniform(-1, 1) * math.log1p(bound)) for bound in bounds]


def _drops(rng: np.random.Generator, size: tuple[int, int], cover: float, ragged: np.ndarray) -> np.ndarray:
    """Thickness 0..1 [height, width] of drops on about a part `cover`; near ones run together, borders are `ragged`."""
    width, height = size
    spatter_N = np.cumsum(rng.random(_DROPS) < 0.04)  # which one a drop is of
    centre_N2 = rng.uniform(0, size, (_DROPS, 2))[spatter_N]
    at_N2 = rng.normal(centre_N2, rng.uniform(0.04, 0.15, _DROPS)[spatter_N, None] * width)
    across_N = width * np.minimum(0.0025 * np.exp(rng.exponential(0.7, _DROPS)), 0.025)
    half_N2 = across_N[:, None] * np.stack([np.ones(_DROPS), rng.uniform(1, 1.8, _DROPS)], -1)
    count = np.searchsorted(np.cumsum(math.pi * half_N2.prod(-1)), cover * width * height) + 1
    sheet = Image.new("L", size)
    pen = ImageDraw.Draw(sheet)
    for edges in np.concatenate([at_N2 - half_N2, at_N2 + half_N2], -1)[:count].tolist():
        pen.ellipse(edges, fill=255)
    soft, softer = (
        np.asarray(sheet.filter(ImageFilter.GaussianBlur(width / blur)), np.float32) / 255 for blur in (200, 80)
    )
    return np.clip((soft * (1 + 0.35 * ragged) - 0.3) / 0.4, 0, 1) * (0.35 + 0.65 * softer)


def _clouds(rng: np.random.Generator, size: tuple[int, int], cells: int) -> np.ndarray:
    """Smooth noise [height, width] of about unit variance with `cells` bumps along the shorter side."""
    per_cell = min(size) / cells
    knots = rng.standard_normal((math.ceil(size[1] / per_cell) + 1, math.ceil(size[0] / per_cell) + 1), np.float32)
    return np.asarray(Image.fromarray(knots).resize(size, Image.Resampling.BICUBIC))


def _grid(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Across and down [height, width] in parts of the frame."""
    return np.meshgrid(*((np.arange(side) + 0.5) / side for side in size))


def _small(picture: Image.Image, side: int) -> tuple[int, int]:
    """The size of a picture shrunk to a longer side of at most `side`."""
    scale = min(1.0, side / max(picture.size))
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))


def _picture(field: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(field + 0.5, 0, 255).astype(np.uint8))


def _enlarged(small: Image.Image, picture: Image.Image) -> Image.Image:
    return small.resize(picture.size, Image.Resampling.BILINEAR)
