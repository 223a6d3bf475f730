"""What the thirteen states look like at the tip of an instrument, as tubes around its working point at (0, 0).

A cue is two lists: what lies on the tissue, under the instrument, and what lies over its tip. Each state has its own
shape and its own colour, for it must be told apart in a picture that is 112 pixels wide. Units and axes are those of
`shapes`.
"""

import functools

import numpy as np

from surgery_r1_jax.shapes import COBALT, WHITE, Colour, Tube, arc, blunt, disc, haze, soft, tube

Cue = tuple[list[Tube], list[Tube]]


@functools.cache
def cue(state: str, variant: int) -> Cue:
    """The cue of a state in one of its `shapes.VARIANTS`; Idle has none."""
    rng = np.random.default_rng(variant)
    side = 1 - 2 * (variant % 2)  # which way it leans
    return _CUES[state](rng, side)


def _idle(rng, side: int) -> Cue:
    return [], []


def _grasping(rng, side: int) -> Cue:
    """A pale fold of tissue pulled up between the jaws."""
    x_N = np.array((-0.055, -0.02, 0.02, 0.06, 0.1, 0.13))
    path, half_N = np.stack([x_N, side * 2 * x_N**2], -1), np.array((0.008, 0.028, 0.05, 0.064, 0.058, 0.014))
    creases = [tube([(-0.04, 0), (0.1, y + side * 0.02)], 0.004, (206, 110, 108)) for y in (-0.03, 0.0, 0.03)]
    fold = [tube(path, half_N, (216, 118, 116), 0.2), tube(path, 0.82 * half_N, (255, 198, 188), 0.5)]
    return [], [*map(soft, fold), *creases]


def _retraction(rng, side: int) -> Cue:
    """A cream tent of fascia stretched out from the tip."""
    path = [(x, 0) for x in (-0.04, 0.03, 0.075, 0.105, 0.135, 0.155, 0.165)]
    half_N = np.array((0.006, 0.045, 0.09, 0.105, 0.09, 0.055, 0.01))
    strands = [
        tube([(-0.03, 0), (0.15 - 5.5 * y * y, y)], (0.003, 0.006), (255, 250, 222))
        for y in np.linspace(-0.085, 0.085, 6)
    ]
    tent = [tube(path, 1.13 * half_N, (190, 118, 84), 0.0), tube(path, half_N, (248, 216, 136), 0.25)]
    return [*map(soft, tent), *strands], []


def _tissue_manipulation(rng, side: int) -> Cue:
    """A purple bruise pressed into the tissue, wrinkles around it."""
    thick_N = (0.001, 0.006, 0.008, 0.009, 0.008, 0.006, 0.001)
    wrinkles = [
        soft(tube(arc((0.015, 0), radius, start, start + 1.4, 7), thick_N, (214, 122, 184), 0.5))
        for radius in (0.115, 0.082)
        for start in rng.uniform(0, 6) + np.array((0.0, 2.1, 4.2))
    ]
    return [*_spill(rng, {0.125: (168, 76, 136), 0.105: (112, 30, 104), 0.06: (66, 8, 66)}), *wrinkles], []


def _tool_manipulation(rng, side: int) -> Cue:
    """A cobalt bulldog clamp held across the jaws."""
    legs = [
        ((-0.012, 0), (-0.012, -0.1)),
        ((0.024, 0), (0.02, -0.1)),
        ((-0.006, 0), (-0.028, 0.075)),
        ((0.018, 0), (0.04, 0.075)),
    ]
    clamp = [blunt(np.array(leg) * (1, side), 0.015, COBALT, 0.8) for leg in legs]
    return [], [*clamp, disc((0.006, 0), 0.036, COBALT, 0.6), disc((0.006, 0), 0.016, (214, 228, 255))]


def _cutting(rng, side: int) -> Cue:
    """An open incision with bright red lips and drops of blood."""
    x_N = np.linspace(-0.035, 0.165, 13)
    path = np.stack([x_N, side * 0.016 * np.sin(30 * x_N)], -1)
    lens_N = np.sin(np.linspace(0, np.pi, 13)) ** 0.7
    lips = {0.047: (255, 40, 32), 0.036: (176, 6, 14), 0.024: (50, 0, 6)}
    spots = zip(rng.uniform((-0.02, -0.1), (0.15, 0.1), (6, 2)), rng.uniform(0.007, 0.014, 6), strict=True)
    drops = [disc(spot, radius, (214, 8, 16), 0.9) for spot, radius in spots]
    return [*drops, *(soft(tube(path, half * lens_N, colour)) for half, colour in lips.items())], []


def _cauterization(rng, side: int) -> Cue:
    """Charred tissue, a fiery glow and white smoke."""
    char = _spill(rng, {0.105: (140, 96, 50), 0.085: (24, 14, 12)})
    smoke = []
    for k in range(5):
        centre = (0.04 + 0.035 * k, side * (0.03 + 0.03 * k) + rng.uniform(-0.015, 0.015))
        smoke += haze(centre, 0.045 + 0.012 * k, (240, 240, 244), 26)
    glow = [*haze((0.01, 0), 0.085, (255, 104, 0), 60), *haze((0.01, 0), 0.06, (255, 206, 50), 90)]
    return char, [*smoke, *glow, disc((0.01, 0), 0.02, (255, 255, 214))]


def _suction(rng, side: int) -> Cue:
    """A pool of dark blood with bubbles."""
    bubbles = []
    for angle in rng.uniform(0, 6) + np.arange(8) * 0.8:
        radius = rng.uniform(0.012, 0.021)
        centre_2 = arc((0.015, 0), rng.uniform(0.045, 0.095), angle, angle, 1)[0]
        bubbles += [
            disc(centre_2, radius, (196, 238, 246)),
            disc(centre_2, radius * 0.68, (136, 60, 76)),
            disc(centre_2 - radius / 3, radius * 0.25, WHITE),
        ]
    return [*_spill(rng, {0.14: (128, 4, 16), 0.125: (66, 0, 10)}), *bubbles], []


def _looping(rng, side: int) -> Cue:
    """A loop of blue thread around the tip."""
    ends = ([(-0.16, -0.06), (-0.1, -0.085)], [(-0.1, 0.08), (-0.15, 0.12)])
    loop = np.concatenate([ends[0], arc((0.035, 0), 0.088, 2.5, -2.5, 24), ends[1]]) * (1, side)
    return [], [soft(tube(loop, 0.0125, (22, 52, 160))), soft(tube(loop, 0.008, (78, 146, 255)))]


def _suturing(rng, side: int) -> Cue:
    """A bright curved needle and stitches of green thread over a wound."""
    y = 0.07 * side
    wound = soft(tube([(-0.06, y), (0.05, y), (0.17, y)], (0.002, 0.02, 0.002), (104, 6, 18)))
    stitches = [
        blunt([(x, 0.5 * y), (x + 0.016, 1.5 * y)], 0.0085, (40, 226, 74), 0.2) for x in np.linspace(-0.045, 0.13, 6)
    ]
    needle = tube(arc((0.045, 0.2 * y), 0.075, -2.7 * side, 0.9 * side, 25), np.linspace(0.014, 0.004, 25), WHITE, 0.8)
    return [wound, *stitches], [needle]


def _clipping(rng, side: int) -> Cue:
    """White locking clips across a vessel."""
    vessel = soft(tube([(0.065, -0.16), (0.04, -0.06), (0.04, 0.06), (0.065, 0.16)], 0.034, (156, 20, 40), 0.6))
    clips = [
        blunt([(0.045, y), (x, 1.1 * y)], 0.0165, (252, 250, 244)) for y in (-0.055, 0.0, 0.055) for x in (0.0, 0.09)
    ]
    return [vessel, *clips], []


def _staple(rng, side: int) -> Cue:
    """A closed seam between two rows of shining staples."""
    seam = np.stack([np.linspace(-0.03, 0.175, 8), 0.005 * (-1.0) ** np.arange(8)], -1)
    bed = blunt([(-0.03, 0), (0.14, 0)], 0.055, (118, 46, 54), 0.1)
    rows = [(x, y) for x in np.linspace(-0.005, 0.155, 6) for y in (-0.032, 0.032)]
    staples = [blunt([(x, y - 0.012), (x, y + 0.012)], 0.008, WHITE, None) for x, y in rows]
    return [bed, soft(tube(seam, 0.008, (44, 4, 12))), *staples], []


def _ultrasound_sensing(rng, side: int) -> Cue:
    """A fan of cyan echoes."""
    fan = tube([(0.0, 0), (0.15, 0)], (0.03, 0.115), (120, 240, 250), None, 80)
    echoes = [tube(arc((-0.05, 0), r, -0.72, 0.72), 0.0078, (84, 246, 255)) for r in (0.09, 0.13, 0.17, 0.21)]
    return [fan, *echoes], []


def _spill(rng, colours: dict[float, Colour]) -> list[Tube]:
    """Irregular stains upon each other, colour by radius from the outermost in."""
    return [disc((0.015, 0), radius, colour, wobble=rng) for radius, colour in colours.items()]


_CUES = {
    "Idle": _idle,
    "Grasping": _grasping,
    "Retraction": _retraction,
    "Tissue_Manipulation": _tissue_manipulation,
    "Tool_Manipulation": _tool_manipulation,
    "Cutting": _cutting,
    "Cauterization": _cauterization,
    "Suction": _suction,
    "Looping": _looping,
    "Suturing": _suturing,
    "Clipping": _clipping,
    "Staple": _staple,
    "Ultrasound_Sensing": _ultrasound_sensing,
}
