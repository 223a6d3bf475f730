"""The backdrop of a synthetic scene: tissue, fat, vessels, the kidney, wet highlights and the endoscope's light."""

import functools
import math

import numpy as np

from surgery_r1_jax.scene import ASPECT, CANVAS, Kidney, bean

DEEP, PINK, PALE, FAT, KIDNEY, KIDNEY_DARK = np.array(
    [
        (0.55, 0.16, 0.17),
        (0.86, 0.47, 0.45),
        (0.97, 0.72, 0.68),
        (0.95, 0.76, 0.47),
        (0.64, 0.23, 0.20),
        (0.42, 0.12, 0.15),
    ],
    np.float32,
)[:, :, None, None]  # each [3, 1, 1]


def paint(kidney: Kidney, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Lit tissue `[height, width, 3]`, about 0..1, the same at every size."""
    width, height = size
    coarse, middle, fine, grain, fold = (_noise(rng, cells, size) for cells in (2, 5, 12, 28, 6))
    x_1W, y_H1 = _pixels(width), _pixels(height)[:, None]

    # Lobes of fat and bowel on one side of a wandering border, smooth peritoneum on the other.
    valley = np.exp(-4 * np.sqrt((fold + 0.3 * fine) ** 2 + 0.01)) * _step(-0.3, 0.5, coarse)
    rgb = _mix(DEEP, PINK, _step(-2.2, 0.8, middle + 0.7 * coarse + 0.25 * fine))
    rgb = _mix(rgb, PALE, 0.6 * _step(0.0, 2.0, fold - 0.4 * coarse))
    rgb = _mix(rgb, FAT, 0.7 * _step(0.3, 1.4, middle + 0.6 * coarse))
    rgb = _mix(rgb, DEEP, 0.7 * valley)
    relief = 0.05 * coarse + 0.022 * middle + 0.0065 * fine + 0.0014 * grain - 0.035 * valley

    # The kidney: a smooth dome in a fringe of fat, with a dark line where it meets its bed.
    border = bean(kidney, x_1W, y_H1)
    inside = _step(1.015, 0.985, border)
    rgb = _mix(rgb, FAT, 0.6 * np.exp(-(((border - 1.03) / 0.08) ** 2)) * _step(-0.5, 0.7, middle))
    rim = np.exp(-(((border - 1) / 0.08) ** 2))
    rgb *= 1 - 0.5 * rim
    rgb = _mix(rgb, _mix(KIDNEY_DARK, KIDNEY, _step(-1.8, 1.0, middle + 0.4 * fine - 0.3 * fold)), inside)
    dome = np.clip(1 - border * border, 0, 1)
    relief = relief * (1 - 0.8 * inside) + 0.2 * dome * dome * (3 - 2 * dome)

    # Light from the camera and a little from above; wet tissue glints where it faces the light.
    slope_y, slope_x = np.empty_like(relief), np.empty_like(relief)
    slope_y[:-1], slope_x[:, :-1] = np.diff(relief, axis=0) * height, np.diff(relief, axis=1) * (width / ASPECT)
    slope_y[-1], slope_x[:, -1] = slope_y[-2], slope_x[:, -2]
    upright = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    rgb *= 0.42 + 0.6 * (1 + 0.2 * slope_x + 0.45 * slope_y) * upright
    facing = (0.93 + 0.15 * slope_x + 0.32 * slope_y) * upright
    glint = _step(0.965, 1.005, facing + 0.008 * fine) * _step(0.3, 2.2, 0.8 * fine + 0.6 * grain)
    rgb += (1 - rim) * (0.07 * _step(0.9, 1.0, facing) + 0.9 * glint)
    return np.moveaxis(rgb, 0, -1)


def vessels(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Branching vessels in frame heights: paths `[V, N, 2]` and radii `[V, N]`."""
    start_V2 = rng.uniform((0, 0), CANVAS, (4, 2))
    heading_V, radius_V = rng.uniform(0, 2 * np.pi, 4), rng.uniform(0.004, 0.0075, 4)
    taper_N = np.minimum(np.linspace(1, 0.4, 14), 0.3 + 0.35 * np.arange(14))
    paths, radii = [], []
    for _ in range(3):
        turn_VN = 0.05 * rng.standard_normal((len(heading_V), 14)).cumsum(1)
        heading_VN = heading_V[:, None] + turn_VN.cumsum(1)
        step_VN2 = 0.03 * np.stack([np.cos(heading_VN), np.sin(heading_VN)], -1)
        path_VN2 = start_V2[:, None] + step_VN2.cumsum(1) - step_VN2[:, :1]
        radius_VN = radius_V[:, None] * taper_N
        paths.append(path_VN2)
        radii.append(radius_VN)
        # Two branches leave each vessel, half way and further on, to either side.
        parent, knot = np.repeat(np.arange(len(radius_V)), 2), np.tile((5, 9), len(radius_V))
        start_V2, radius_V = path_VN2[parent, knot], 0.75 * radius_VN[parent, knot]
        heading_V = heading_VN[parent, knot] + np.tile((0.7, -0.7), len(path_VN2))
    return np.concatenate(paths), np.concatenate(radii)


def light(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The endoscope's light `[height, width]`, 0..1: bright in the middle, dark in the corners."""
    middle_x, middle_y = rng.uniform(0.44, 0.56, 2)
    x_1W, y_H1 = (_pixels(size[0]) - middle_x) * ASPECT, (_pixels(size[1]) - middle_y)[:, None]
    away = x_1W * x_1W + y_H1 * y_H1
    return np.exp(-0.75 * away) * _step(0.98, 0.5, np.sqrt(away))


def _pixels(count: int) -> np.ndarray:
    """Pixel centres in 0..1."""
    return (np.arange(count, dtype=np.float32) + 0.5) / count


def _noise(rng: np.random.Generator, cells: int, size: tuple[int, int]) -> np.ndarray:
    """Smooth noise `[height, width]` of unit variance with about `cells` bumps a frame height."""
    columns = math.ceil(cells * ASPECT)
    knots = rng.standard_normal((columns + 3, cells + 3), dtype=np.float32)
    return _stretch(_stretch(knots, size[0], columns).T, size[1], cells)


def _stretch(knots: np.ndarray, pixels: int, cells: int) -> np.ndarray:
    """The cubic B-spline through rows of knots, `[cells + 3, N]` to `[pixels, N]`."""
    # Sums of four rows, not a matrix product: BLAS would start threads for this and trip over its siblings.
    at, weights = _spline(pixels, cells)
    return sum(weights[:, k : k + 1] * knots[at + k] for k in range(4))


@functools.cache
def _spline(pixels: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel its first knot and the weights of four; unit-variance knots give unit variance."""
    at, t = np.divmod(_pixels(pixels) * cells, 1)
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], -1)
    return at.astype(int), weights / np.float32(6 * 0.692)


def _step(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """Smooth step from 0 at `low` to 1 at `high`."""
    t = np.clip((x - low) * (1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def _mix(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Colours `a`, `[3, ...]`, with a share 0..1 of colours `b`."""
    return a + (b - a) * share
