"""What is in a synthetic surgical scene: a kidney, one to four instruments and what each of them does. No pixels here.

Points are xy in [0, 1] of the frame, so a scene is the same at every picture size. Lengths are in frame heights, on a
frame `ASPECT` times as wide as high.
"""

from dataclasses import dataclass

import numpy as np

from surgery_r1_jax import shapes, vocabulary

ASPECT = 1.25  # width / height of EndoVis-18, 1280 / 1024
CANVAS = np.array([ASPECT, 1.0])

Point = tuple[float, float]

# EndoVis-18-VQLA, the 1,560 training frames: objects of mobarakol/tool_detection (dataset/processed/json) joined to the
# answers of longbai1006/Surgical-VQLA (dataset/bertvocab/v2/consolidate0.txt). In how many frames exactly this set of
# instruments is seen.
TOOL_SETS: dict[tuple[str, ...], int] = {
    ("bipolar_forceps", "monopolar_curved_scissors"): 706,
    ("monopolar_curved_scissors", "prograsp_forceps"): 181,
    ("bipolar_forceps", "prograsp_forceps", "ultrasound_probe"): 138,
    ("bipolar_forceps", "monopolar_curved_scissors", "prograsp_forceps", "suction"): 87,
    ("bipolar_forceps", "large_needle_driver", "prograsp_forceps"): 81,
    ("bipolar_forceps", "monopolar_curved_scissors", "prograsp_forceps"): 70,
    ("bipolar_forceps", "prograsp_forceps", "stapler"): 58,
    ("bipolar_forceps", "stapler"): 35,
    ("bipolar_forceps", "clip_applier", "large_needle_driver", "prograsp_forceps"): 31,
    ("bipolar_forceps", "prograsp_forceps", "stapler", "suction"): 31,
    ("bipolar_forceps",): 29,
    ("monopolar_curved_scissors",): 25,
    ("bipolar_forceps", "monopolar_curved_scissors", "suction"): 23,
    ("bipolar_forceps", "prograsp_forceps"): 20,
    ("prograsp_forceps",): 19,
    ("large_needle_driver", "prograsp_forceps"): 7,
    ("bipolar_forceps", "prograsp_forceps", "suction"): 7,
    ("bipolar_forceps", "stapler", "suction"): 3,
    ("prograsp_forceps", "stapler", "suction"): 2,
    ("prograsp_forceps", "ultrasound_probe"): 2,
    ("bipolar_forceps", "large_needle_driver"): 1,
    ("monopolar_curved_scissors", "prograsp_forceps", "suction"): 1,
    ("prograsp_forceps", "stapler"): 1,
    ("stapler",): 1,
    ("bipolar_forceps", "ultrasound_probe"): 1,
}

# The same frames: in how many of them an instrument is in a state. A state that is not listed never occurs with it.
TOOL_STATES: dict[str, dict[str, int]] = {
    "bipolar_forceps": {
        "Idle": 574,
        "Retraction": 364,
        "Tissue_Manipulation": 211,
        "Looping": 76,
        "Grasping": 48,
        "Tool_Manipulation": 48,
    },
    "monopolar_curved_scissors": {
        "Idle": 561,
        "Cutting": 483,
        "Tissue_Manipulation": 34,
        "Cauterization": 13,
        "Retraction": 2,
    },
    "prograsp_forceps": {
        "Tissue_Manipulation": 388,
        "Idle": 252,
        "Tool_Manipulation": 70,
        "Retraction": 15,
        "Grasping": 11,
    },
    "suction": {"Suction": 60, "Tissue_Manipulation": 53, "Idle": 41},
    "ultrasound_probe": {"Ultrasound_Sensing": 72, "Idle": 69},
    "stapler": {"Idle": 86, "Clipping": 26, "Staple": 13, "Tissue_Manipulation": 6},
    "large_needle_driver": {
        "Looping": 47,
        "Idle": 42,
        "Tissue_Manipulation": 15,
        "Tool_Manipulation": 10,
        "Suturing": 6,
    },
    "clip_applier": {"Idle": 16, "Clipping": 15},
}

# The same frames: where the instrument lies from the kidney, in the order of vocabulary.LOCATIONS ("top" is lower in
# the picture). Left as they are, the instrument's name alone would give the right answer 58 % of the time.
TOOL_LOCATIONS: dict[str, tuple[int, int, int, int]] = {
    "bipolar_forceps": (885, 76, 359, 1),
    "monopolar_curved_scissors": (188, 636, 22, 247),
    "prograsp_forceps": (231, 175, 149, 181),
    "suction": (104, 49, 1, 0),
    "ultrasound_probe": (76, 61, 0, 4),
    "stapler": (2, 113, 0, 16),
    "large_needle_driver": (0, 94, 0, 26),
    "clip_applier": (21, 10, 0, 0),
}
LOCATION_WEAKENING = 0.6  # share of the uniform distribution mixed into TOOL_LOCATIONS

MARGIN = 0.035  # least |tool centre - kidney centre| on each axis, so that no location answer hangs on a pixel
GAP = 0.02  # least free space between two instruments
CANDIDATES = 64  # placements tried at once for one instrument


@dataclass(frozen=True)
class Kidney:
    """A bean: an ellipse of half axes `long` and `short`, turned by `angle` radians, dented by `notch` on one side."""

    centre: Point
    long: float
    short: float
    notch: float
    angle: float


@dataclass(frozen=True)
class Instrument:
    """One instrument: its shaft comes in at `entry` on the frame's edge and ends at `joint`; its jaws work at `tip`.

    `variant`, one of `shapes.VARIANTS`, says how wide its jaws are open and which look its cue has.
    """

    tool: str
    state: str
    entry: Point
    joint: Point
    tip: Point
    variant: int


@dataclass(frozen=True)
class Scene:
    """A frame's content; `texture` seeds everything that carries no label (tissue, vessels, drops of blood)."""

    kidney: Kidney
    instruments: tuple[Instrument, ...]
    texture: int


def sample(rng: np.random.Generator, *, max_tools: int = 4, balance: float = 0.0) -> Scene:
    """Draw a scene: instruments and states as in EndoVis-18, or the more evenly the nearer `balance` is to 1.

    With probability `balance` a choice is uniform: of the instruments, their number included, and of the
    state among those its instrument can be in. A demo needs that to see the rare ones.
    """
    tools = _tools(rng, max_tools, balance)
    states = [_state(rng, tool, balance) for tool in tools]
    variants = rng.integers(shapes.VARIANTS, size=len(tools))
    while True:  # a scene that leaves no room for an instrument is laid out afresh; one in ten does
        kidney = _kidney(rng)
        places = _layout(rng, kidney, tools, balance)
        if places is not None:
            break
    instruments = [
        Instrument(tool, state, *(_point(p) for p in place), int(variant))
        for tool, state, place, variant in zip(tools, states, places, variants, strict=True)
    ]
    return Scene(kidney, tuple(instruments), int(rng.integers(2**32)))


def _point(xy) -> Point:
    return (float(xy[0]), float(xy[1]))


def _tools(rng, max_tools: int, balance: float) -> list[str]:
    """The instruments of a frame in random painting order."""
    sets = [tools for tools in TOOL_SETS if len(tools) <= max_tools]
    count = np.array([TOOL_SETS[tools] for tools in sets], float)
    tools = sets[rng.choice(len(sets), p=count / count.sum())]
    if rng.random() < balance:
        tools = rng.choice(vocabulary.TOOLS, rng.integers(1, max_tools + 1), replace=False)
    return [str(tool) for tool in rng.permutation(tools)]


def _state(rng, tool: str, balance: float) -> str:
    states, count = zip(*TOOL_STATES[tool].items(), strict=True)
    p = (1 - balance) * np.array(count) / sum(count) + balance / len(count)
    return str(rng.choice(states, p=p))


def _kidney(rng) -> Kidney:
    return Kidney(
        centre=_point(rng.uniform((0.38, 0.36), (0.62, 0.58))),
        long=float(rng.uniform(0.34, 0.44)),
        short=float(rng.uniform(0.22, 0.28)),
        notch=float(rng.uniform(0.15, 0.3)),
        angle=float(rng.uniform(-0.6, 0.6) + np.pi * rng.integers(2)),
    )


def outline(kidney: Kidney) -> np.ndarray:
    """The kidney's border `[N, 2]`, in the frame's units."""
    angle_N = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    radius_N = 1 - kidney.notch * np.exp(5 * (np.sin(angle_N) - 1))
    u_N, v_N = kidney.long * radius_N * np.cos(angle_N), kidney.short * radius_N * np.sin(angle_N)
    cos, sin = np.cos(kidney.angle), np.sin(kidney.angle)
    return np.array(kidney.centre) + np.stack([cos * u_N - sin * v_N, sin * u_N + cos * v_N], -1) / CANVAS


def bean(kidney: Kidney, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far points of the frame lie from the kidney's middle in terms of its border: below 1 inside, 1 on it."""
    cos, sin = float(np.cos(kidney.angle)), float(np.sin(kidney.angle))
    dx, dy = (x - kidney.centre[0]) * ASPECT, y - kidney.centre[1]
    u, v = (cos * dx + sin * dy) / kidney.long, (cos * dy - sin * dx) / kidney.short
    away = np.sqrt(u * u + v * v) + 1e-6
    return away / (1 - kidney.notch * np.exp(5 * (v / away - 1)))


def _layout(rng, kidney: Kidney, tools: list[str], balance: float) -> list[np.ndarray] | None:
    """(entry, joint, tip) of every instrument `[3, 2]`, none touching another; None if there is no room."""
    pose_TC32, body_TCK2, radius_TK, sound_TC = _candidates(rng, tools)
    border_N2 = np.clip(outline(kidney), 0, 1)
    middle_2 = (border_N2.min(0) + border_N2.max(0)) / 2 * CANVAS
    offset_TC2 = _rough_centre(body_TCK2, radius_TK) - middle_2
    sound_TC &= (np.abs(offset_TC2) > MARGIN + 0.02).all(-1)
    location_TC = (offset_TC2[..., 0] > 0) + 2 * (offset_TC2[..., 1] < 0)  # "top" is the larger y
    places = []
    taken_M2, taken_radius_M = np.zeros((0, 2)), np.zeros(0)
    for t, tool in enumerate(tools):
        free_C = sound_TC[t] & _apart(body_TCK2[t], radius_TK[t], taken_M2, taken_radius_M)
        p_4 = _location_weights(tool, balance) * np.bincount(location_TC[t, free_C], minlength=4).clip(max=1)
        if not p_4.any():
            return None
        location = rng.choice(4, p=p_4 / p_4.sum())
        chosen = int(np.argmax(free_C & (location_TC[t] == location)))
        places.append(pose_TC32[t, chosen] / CANVAS)
        taken_M2 = np.concatenate([taken_M2, body_TCK2[t, chosen]])
        taken_radius_M = np.concatenate([taken_radius_M, radius_TK[t]])
    return places


def _location_weights(tool: str, balance: float) -> np.ndarray:
    count_4 = np.array(TOOL_LOCATIONS[tool])
    weak = LOCATION_WEAKENING + (1 - LOCATION_WEAKENING) * balance
    return (1 - weak) * count_4 / count_4.sum() + weak / 4


def _candidates(rng, tools: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Random placements of each instrument, in frame heights.

    Returns: (entry, joint, tip) `[T, C, 3, 2]`; circles over each, ten on the shaft, one on the tip, one on its cue,
    as centres `[T, C, K, 2]` and radii `[T, K]`; whether the placement looks sound `[T, C]`.
    """
    shape = (len(tools), CANDIDATES)
    designs = [shapes.DESIGNS[tool] for tool in tools]
    scale_T1 = rng.uniform(1.02, 1.18, (len(tools), 1)) + 0.09 * (4 - len(tools))
    reach_T1 = scale_T1 * [[design.reach] for design in designs]

    tip_TC2 = rng.uniform((0.13, 0.14), (0.87, 0.86), (*shape, 2)) * CANVAS
    edge_TC = rng.integers(4, size=shape)  # left, top, right, bottom
    entry_TC2 = rng.uniform(0.06, 0.94, (*shape, 2))
    np.put_along_axis(entry_TC2, edge_TC[..., None] % 2, edge_TC[..., None] // 2, -1)
    entry_TC2 *= CANVAS
    way_TC2 = tip_TC2 - entry_TC2
    bend_TC = rng.uniform(-0.45, 0.45, shape) * [[tool != "suction"] for tool in tools]
    heading_TC = np.arctan2(way_TC2[..., 1], way_TC2[..., 0]) + bend_TC
    ahead_TC2 = np.stack([np.cos(heading_TC), np.sin(heading_TC)], -1) * reach_T1[..., None]
    joint_TC2 = tip_TC2 - ahead_TC2
    cue_TC2 = tip_TC2 + 0.4 * ahead_TC2

    # No shaft that is short or grazes its edge, and no cue that falls out of the frame.
    shaft_TC2 = joint_TC2 - entry_TC2
    inward_TC = np.abs(np.take_along_axis(shaft_TC2, edge_TC[..., None] % 2, -1))[..., 0]
    sound_TC = inward_TC > np.maximum(0.1, 0.45 * np.hypot(shaft_TC2[..., 0], shaft_TC2[..., 1]))
    sound_TC &= ((shaft_TC2 * way_TC2).sum(-1) > 0) & (np.abs(cue_TC2 / CANVAS - 0.5) < 0.43).all(-1)

    along_K1 = np.linspace(0, 1, 10)[:, None]
    body_TCK2 = np.empty((*shape, 12, 2))
    body_TCK2[:, :, :10] = entry_TC2[:, :, None] + along_K1 * shaft_TC2[:, :, None]
    body_TCK2[:, :, 10], body_TCK2[:, :, 11] = tip_TC2, cue_TC2
    radius_TK = np.repeat(scale_T1 * [[design.radius] for design in designs], 12, 1)
    radius_TK[:, 10:] = 0.1, 0.11
    return np.stack([entry_TC2, joint_TC2, tip_TC2], 2), body_TCK2, radius_TK, sound_TC


def _apart(body_CK2: np.ndarray, radius_K: np.ndarray, taken_M2: np.ndarray, taken_radius_M: np.ndarray) -> np.ndarray:
    """Which candidates keep clear of what has its place already, `[C]`."""
    x_CKM = body_CK2[:, :, None, 0] - taken_M2[:, 0]
    y_CKM = body_CK2[:, :, None, 1] - taken_M2[:, 1]
    least_KM = radius_K[:, None] + taken_radius_M + GAP
    return (x_CKM * x_CKM + y_CKM * y_CKM > least_KM * least_KM).all((1, 2))


def _rough_centre(body_TCK2: np.ndarray, radius_TK: np.ndarray) -> np.ndarray:
    """Centre of the box about shaft and tip, in frame heights, `[T, C, 2]`; right to within 0.02."""
    half_T1K1 = np.minimum(radius_TK[:, None, :-1, None], 0.06)
    low_TC2 = (body_TCK2[:, :, :-1] - half_T1K1).min(2).clip(0, CANVAS)
    high_TC2 = (body_TCK2[:, :, :-1] + half_T1K1).max(2).clip(0, CANVAS)
    return (low_TC2 + high_TC2) / 2
