"""The shapes of a synthetic scene: tubes, and the eight da Vinci instruments made of them.

Everything is a `Tube`: a path with a radius at each point. A shaft, a jaw, a thread, a needle, a vessel and a drop of
blood are all tubes, so there is one way to place and shade them.

Lengths are in frame heights. `shaft` and `head` lie around the wrist joint at (0, 0); x runs the way the part points,
y to its right in the picture. `variant` is one of `VARIANTS` looks of the same thing.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

VARIANTS = 4

Colour = tuple[int, int, int]

STEEL, BRIGHT_STEEL, DARK_STEEL = (206, 212, 218), (228, 234, 242), (140, 146, 156)
GRAPHITE, HOLE, WHITE = (50, 52, 58), (26, 22, 26), (255, 255, 255)
AMBER, SLATE, BONE, CYAN = (246, 176, 32), (78, 112, 180), (226, 214, 196), (40, 214, 226)
GREEN, BRONZE, PURPLE, COBALT = (30, 164, 88), (190, 106, 44), (152, 66, 214), (28, 84, 240)


class Tube(NamedTuple):
    """A path `[N, 2]` with a radius `[N]`; gloss is 0 matte .. 1 polished, None unshaded; alpha is 0..255."""

    path_N2: np.ndarray
    radius_N: np.ndarray
    colour: Colour
    gloss: float | None
    alpha: int


class Design(NamedTuple):
    """What is fixed for an instrument: joint to working point, shaft radius, colour, gloss and colour of its ring."""

    reach: float
    radius: float
    colour: Colour
    gloss: float
    ring: Colour


DESIGNS: dict[str, Design] = {
    "bipolar_forceps": Design(0.150, 0.048, (62, 60, 58), 0.45, AMBER),
    "monopolar_curved_scissors": Design(0.140, 0.052, (112, 126, 150), 0.30, SLATE),
    "prograsp_forceps": Design(0.165, 0.050, (178, 182, 188), 0.80, STEEL),
    "suction": Design(0.100, 0.033, BONE, 0.50, BONE),
    "ultrasound_probe": Design(0.130, 0.044, (58, 62, 70), 0.40, CYAN),
    "stapler": Design(0.185, 0.058, (186, 190, 196), 0.70, GREEN),
    "large_needle_driver": Design(0.105, 0.047, (40, 40, 44), 0.50, BRONZE),
    "clip_applier": Design(0.140, 0.045, (122, 122, 132), 0.60, PURPLE),
}


# Tubes


def tube(path: Sequence, radius: float | Sequence, colour: Colour, gloss: float | None = None, alpha=255) -> Tube:
    """A tube through the points of `path`; `radius` is one number or one per point."""
    path_N2 = np.asarray(path, float)
    return Tube(path_N2, np.broadcast_to(np.asarray(radius, float), len(path_N2)), colour, gloss, alpha)


def disc(centre: Sequence, radius: float, colour: Colour, gloss: float | None = None, alpha=255, wobble=None) -> Tube:
    """A disc: a tube along its diameter. `wobble`, a generator, makes its border irregular."""
    angle_N = np.linspace(0, np.pi, 17)
    half_N = radius * np.sin(angle_N)
    if wobble is not None:
        half_N = half_N * (0.85 + 0.15 * np.sin(wobble.uniform(2, 4) * angle_N + wobble.uniform(0, 6)))
    path_N2 = np.stack([centre[0] - radius * np.cos(angle_N), np.full(17, float(centre[1]))], -1)
    return Tube(path_N2, half_N, colour, gloss, alpha)


def blunt(path: Sequence, radius: float | Sequence, colour: Colour, gloss: float | None = 0.4) -> Tube:
    """A tube with a round end, half a disc beyond the last point."""
    path_N2 = np.asarray(path, float)
    radius_N = np.broadcast_to(np.asarray(radius, float), len(path_N2))
    along_2 = path_N2[-1] - path_N2[-2]
    angle_N = np.linspace(0, np.pi / 2, 6)[1:]
    cap_N2 = path_N2[-1] + radius_N[-1] * np.outer(np.sin(angle_N), along_2 / np.hypot(*along_2))
    cap_radius_N = radius_N[-1] * np.cos(angle_N)
    return tube(np.concatenate([path_N2, cap_N2]), np.concatenate([radius_N, cap_radius_N]), colour, gloss)


def soft(part: Tube) -> Tube:
    """The tube with its corners rounded: Chaikin's corner cutting of path and radius, twice."""
    knots_N3 = np.concatenate([part.path_N2, part.radius_N[:, None]], 1)
    for _ in range(2):
        cuts = [3 * knots_N3[:-1] + knots_N3[1:], knots_N3[:-1] + 3 * knots_N3[1:]]
        inner_N3 = np.stack(cuts, 1).reshape(-1, 3) / 4
        knots_N3 = np.concatenate([knots_N3[:1], inner_N3, knots_N3[-1:]])
    return part._replace(path_N2=knots_N3[:, :2], radius_N=knots_N3[:, 2])


def haze(centre: Sequence, radius: float, colour: Colour, alpha: int) -> list[Tube]:
    """A soft disc: eight faint ones inside each other, each of this alpha."""
    return [disc(centre, radius * k / 8, colour, None, alpha) for k in range(8, 0, -1)]


def arc(centre: Sequence, radius: float, start: float, end: float, points: int = 15) -> np.ndarray:
    """Points `[points, 2]` on a circle between two angles in radians, clockwise in the picture."""
    angle_N = np.linspace(start, end, points)
    return np.asarray(centre) + radius * np.stack([np.cos(angle_N), np.sin(angle_N)], -1)


def _jaws(length: float, opening: float, bow: float = 0.0, curve: float = 0.0) -> list[np.ndarray]:
    """Centre lines of two jaws, each turned by `opening` (radians) and bulging by `bow`, both bent by `curve`."""
    t_N = np.linspace(0, 1, 9)
    bend_N = curve * (1.6 * t_N**2 - t_N)
    sideways = opening * length * t_N + bow * np.sin(np.pi * t_N)
    return [np.stack([length * t_N, side * sideways + bend_N], -1) for side in (-1, 1)]


# Instruments


@functools.cache
def shaft(tool: str) -> list[Tube]:
    """The shaft of an instrument up to its wrist joint, with its coloured ring."""
    design = DESIGNS[tool]
    if tool == "suction":
        return [tube([(-2, 0), (0.01, 0)], design.radius, design.colour, design.gloss)]
    r = design.radius
    return [
        tube([(-2, 0), (-0.1, 0)], r, design.colour, design.gloss),
        tube([(-0.105, 0), (-0.04, 0), (-0.022, 0)], (r, r, 0.86 * r), DARK_STEEL, 0.8),
        tube([(-0.135, 0), (-0.105, 0)], 1.05 * r, design.ring, 0.4),
        disc((-0.02, 0), 0.84 * r, DARK_STEEL, 0.8),
    ]


@functools.cache
def head(tool: str, variant: int, closed: bool = False) -> list[Tube]:
    """Wrist and tip of an instrument, the picture's only certain clue to which one it is."""
    opening = 0.1 if closed else (0.2, 0.25, 0.3, 0.36)[variant]
    return _HEADS[tool](DESIGNS[tool].reach, opening)


def _bipolar_forceps(reach: float, opening: float) -> list[Tube]:
    """Fenestrated jaws out of an amber insulator with cooling fins."""
    jaws = _jaws(reach, opening, bow=0.012)
    return [
        tube([(-0.05, 0), (0, 0)], 0.038, DARK_STEEL, 0.9),
        *(blunt(path, np.linspace(0.022, 0.014, 9), STEEL, 0.8) for path in jaws),
        *(tube(path[3:8], (0.003, 0.009, 0.009, 0.008, 0.002), HOLE) for path in jaws),
        tube([(-0.022, 0), (0.045, 0), (0.075, 0)], (0.044, 0.043, 0.032), AMBER, 0.35),
        *(tube([(-0.012, y), (0.05, y)], 0.0035, (150, 92, 8)) for y in (-0.022, 0, 0.022)),
    ]


def _monopolar_curved_scissors(reach: float, opening: float) -> list[Tube]:
    """Two slender sickles out of a blue insulating sleeve."""
    jaws = _jaws(reach * 1.1, opening, bow=0.008, curve=0.05)
    return [
        *(
            tube(path, (0.02, 0.021, 0.02, 0.019, 0.017, 0.014, 0.011, 0.007, 0.002), (236, 230, 212), 0.9)
            for path in jaws
        ),
        tube([(-0.06, 0), (0.015, 0), (0.05, 0)], (0.053, 0.05, 0.033), SLATE, 0.4),
        tube([(0.042, 0), (0.053, 0)], (0.036, 0.031), (158, 186, 232), 0.3),
    ]


def _prograsp_forceps(reach: float, opening: float) -> list[Tube]:
    """All steel: a riveted wrist and two long toothed loops."""
    jaws = _jaws(reach * 0.98, opening, bow=0.006)
    teeth = [
        disc(path[k] - (0, y), 0.005, HOLE) for path, y in zip(jaws, (-0.019, 0.019), strict=True) for k in range(3, 9)
    ]
    return [
        tube([(-0.055, 0), (-0.02, 0)], 0.04, DARK_STEEL, 0.9),
        *(blunt(path, np.linspace(0.027, 0.02, 9), BRIGHT_STEEL, 1.0) for path in jaws),
        *(tube(path[3:8], (0.003, 0.007, 0.007, 0.007, 0.003), (70, 66, 72)) for path in jaws),
        *teeth,
        tube([(-0.034, 0), (0.03, 0), (0.05, 0)], (0.045, 0.043, 0.022), (196, 202, 210), 1.0),
        disc((0.006, 0), 0.02, (96, 100, 108)),
        disc((0.006, 0), 0.012, BRIGHT_STEEL, 0.6),
    ]


def _suction(reach: float, opening: float) -> list[Tube]:
    """A pale tube without a wrist, with a dark mouth and side holes."""
    holes = ((0.045, -0.009), (0.06, 0.011), (0.02, 0.009), (-0.005, -0.01))
    return [
        tube([(-0.01, 0), (reach, 0)], 0.033, BONE, 0.5),
        *(disc(hole, 0.0085, (74, 34, 34)) for hole in holes),
        disc((reach, 0), 0.034, (250, 240, 226)),
        disc((reach, 0), 0.023, (64, 16, 22)),
    ]


def _ultrasound_probe(reach: float, opening: float) -> list[Tube]:
    """A fat dark rounded body with a cyan array window."""
    return [
        tube([(-0.08, 0), (-0.045, 0)], (0.046, 0.066), (56, 62, 72), 0.4),
        blunt([(-0.048, 0), (reach - 0.05, 0)], 0.067, (62, 68, 78), 0.4),
        blunt([(0.025, 0), (reach - 0.036, 0)], 0.042, CYAN, 0.3),
        blunt([(0.037, 0), (reach - 0.034, 0)], 0.026, (18, 84, 104), 0.5),
    ]


def _stapler(reach: float, opening: float) -> list[Tube]:
    """Two long heavy jaws, one of them a green cartridge with two rows of slots."""
    anvil, cartridge = _jaws(reach * 0.95, opening * 0.7, bow=0.012)
    slots = [disc(cartridge[k] + (0, y), 0.006, (226, 255, 234)) for k in range(2, 8) for y in (-0.012, 0.012)]
    thick = np.linspace(0.032, 0.026, 9)
    return [
        tube([(-0.07, 0), (0, 0)], 0.05, DARK_STEEL, 0.9),
        blunt(cartridge, thick, GREEN, 0.4),
        *slots,
        blunt(anvil, 0.8 * thick, STEEL, 1.0),
        tube([(-0.034, 0), (0.03, 0)], (0.054, 0.046), (176, 182, 190), 0.9),
    ]


def _large_needle_driver(reach: float, opening: float) -> list[Tube]:
    """Short stout bronze jaws with a carbide grip."""
    jaws = _jaws(reach * 0.86, opening * 0.9, bow=0.008)
    grip = [
        disc(path[k] - (0, y), 0.0065, (70, 34, 10))
        for path, y in zip(jaws, (-0.014, 0.014), strict=True)
        for k in (4, 6, 8)
    ]
    return [
        tube([(-0.055, 0), (0, 0)], 0.042, GRAPHITE, 0.6),
        *(blunt(path, np.linspace(0.034, 0.023, 9), BRONZE, 0.8) for path in jaws),
        *grip,
        tube([(-0.03, 0), (0.03, 0)], (0.046, 0.038), GRAPHITE, 0.7),
        disc((0.004, 0), 0.017, BRONZE, 0.6),
    ]


def _clip_applier(reach: float, opening: float) -> list[Tube]:
    """Two thin tongs bowed outwards, with purple hooked ends."""
    jaws = _jaws(reach, opening * 0.45, bow=0.038)
    return [
        tube([(-0.055, 0), (0, 0)], 0.038, DARK_STEEL, 0.9),
        *(tube(path, 0.015, STEEL, 0.9) for path in jaws),
        *(blunt(path[4:], 0.021, PURPLE, 0.5) for path in jaws),
        tube([(-0.03, 0), (0.03, 0)], (0.042, 0.032), (176, 180, 190), 0.9),
        tube([(-0.012, 0), (0.016, 0)], (0.044, 0.039), PURPLE, 0.4),
    ]


_HEADS = {
    "bipolar_forceps": _bipolar_forceps,
    "monopolar_curved_scissors": _monopolar_curved_scissors,
    "prograsp_forceps": _prograsp_forceps,
    "suction": _suction,
    "ultrasound_probe": _ultrasound_probe,
    "stapler": _stapler,
    "large_needle_driver": _large_needle_driver,
    "clip_applier": _clip_applier,
}
