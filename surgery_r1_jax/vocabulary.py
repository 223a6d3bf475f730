"""The closed vocabulary of surgical VQLA: answer classes, instruments and question strings."""

import functools
from collections import Counter
from collections.abc import Sequence

ORGANS = ("kidney",)
STATES = (
    "Idle",
    "Grasping",
    "Retraction",
    "Tissue_Manipulation",
    "Tool_Manipulation",
    "Cutting",
    "Cauterization",
    "Suction",
    "Looping",
    "Suturing",
    "Clipping",
    "Staple",
    "Ultrasound_Sensing",
)
LOCATIONS = ("left-top", "right-top", "left-bottom", "right-bottom")
TOOLS = (
    "bipolar_forceps",
    "monopolar_curved_scissors",
    "prograsp_forceps",
    "large_needle_driver",
    "ultrasound_probe",
    "clip_applier",
    "suction",
    "stapler",
)

# Official index orders: longbai1006/Surgical-VQLA (18 classes) and Surgical-VQLAPlus (26).
CLASSES = ORGANS + STATES + LOCATIONS
EXTENDED_CLASSES = CLASSES + TOOLS

KINDS = ("organ", "state", "location", "tool", "other")
ORGAN, STATE, LOCATION, TOOL, OTHER = range(len(KINDS))  # the code of a question type in arrays

_KIND_OF = {name: kind for kind, names in enumerate((ORGANS, STATES, LOCATIONS, TOOLS)) for name in names}


def class_kind(index: int, classes: Sequence[str] = EXTENDED_CLASSES) -> int:
    """Kind code of a class index: OTHER for a class that is none of the official ones; -1 stays -1."""
    return -1 if index < 0 else _KIND_OF.get(classes[index], OTHER)


def class_index(text: str, classes: Sequence[str] = CLASSES) -> int:
    """Index of the class that `text` names, whatever its separators (`_`, `-`, space) and case; -1 if none.

    Names that differ only by case (in the 26 classes `Suction`, a state, and `suction`, a tool) keep their
    case. Text that is not ASCII names no class, so look-alike letters never match.
    """
    if not text.isascii():
        return -1
    exact, folded = _class_tables(tuple(classes))
    name = _spaced(text)
    return exact.get(name, folded.get(name.lower(), -1))


def ask(kind: int, tool: str | None = None) -> str:
    """The official question of a kind about an instrument; of kind TOOL, about a location (extended sets)."""
    if kind == ORGAN:
        return "What organ is being operated?"
    if kind == STATE:
        return f"What is the state of {tool}?"
    if kind == LOCATION:
        return f"Where is {tool} located?"
    return f"What is the tool in the {tool.replace('-', ' ')}?"


def question_kind(question: str) -> tuple[int, str | None]:
    """What `ask` needs to give the official form of a question: (kind code, topic); (-1, None) if unknown.

    The topic is an instrument, for kind TOOL a location, for kind ORGAN None. Separators and case are free.
    """
    unknown = (-1, None)
    return _question_table().get(_spaced(question).lower(), unknown) if question.isascii() else unknown


def _spaced(text: str) -> str:
    return text.strip(" ").replace("_", " ").replace("-", " ")


@functools.cache
def _class_tables(classes: tuple[str, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """Index by spaced name, and by its lower case where only one class has it."""
    exact = {_spaced(name): index for index, name in enumerate(classes)}
    owners = Counter(name.lower() for name in exact)
    folded = {name.lower(): index for name, index in exact.items() if owners[name.lower()] == 1}
    return exact, folded


@functools.cache
def _question_table() -> dict[str, tuple[int, str | None]]:
    topics = [(ORGAN, None)]
    topics += [(kind, tool) for kind in (STATE, LOCATION) for tool in TOOLS]
    topics += [(TOOL, location) for location in LOCATIONS]
    return {_spaced(ask(kind, topic)).lower(): (kind, topic) for kind, topic in topics}
