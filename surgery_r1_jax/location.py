"""What left, right, top and bottom mean in a data set: a rule that is fitted to its labels, never assumed."""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from surgery_r1_jax import vocabulary
from surgery_r1_jax.records import Box, Frame

REFERENCES = ("organ", "image")
TOPS = ("larger_y", "smaller_y")

SETTLED = 0.9  # of the location answers must follow the rule for it to be believed

ACROSS = {"left": "right", "leftmost": "rightmost", "leftward": "rightward", "leftwards": "rightwards"}
DOWN = {"top": "bottom", "topmost": "bottommost", "upper": "lower", "uppermost": "lowermost", "above": "below"}
ACROSS |= {other: word for word, other in ACROSS.items()}
DOWN |= {other: word for word, other in DOWN.items()}

_WORD = re.compile("[A-Za-z]+")
_TIE = 1e-9  # centres closer than this are equal; pixels are 1e-3 apart


@dataclass(frozen=True)
class LocationRule:
    """Where the centre of an instrument's box lies against the centre of the organ's box, or of the image.

    EndoVis-18-VQLA follows ("organ", "larger_y") on all of its 3,727 training instances: its "top" is low in
    the picture. Later rephrasings of the same frames follow ("image", "smaller_y").
    """

    reference: str = "organ"  # one of REFERENCES
    top: str = "larger_y"  # one of TOPS; y grows downwards

    def answer(self, tool_box: Box, organ_box: Box | None) -> str | None:
        """The location class of a tool's box; None where the rule needs an organ box and there is none.

        A centre level with the reference counts as right of it and below it.
        """
        reference = organ_box if self.reference == "organ" else (0.0, 0.0, 1.0, 1.0)
        if reference is None:
            return None
        right = tool_box[0] + tool_box[2] >= reference[0] + reference[2] - _TIE
        below = tool_box[1] + tool_box[3] >= reference[1] + reference[3] - _TIE
        top = below == (self.top == "larger_y")
        return f"{'right' if right else 'left'}-{'top' if top else 'bottom'}"


def fit(frames: Iterable[Frame]) -> tuple[LocationRule, float, int]:
    """The rule that most location records agree with, the share of them that do, and their number.

    Without location records: the default rule, 0.0 and 0.
    """
    cases = [
        (record.answer, record.box, frame.organ_box)
        for frame in frames
        for record in frame.records
        if record.kind == vocabulary.LOCATION
    ]
    rules = [LocationRule(*choice) for choice in itertools.product(REFERENCES, TOPS)]
    agreed = [sum(rule.answer(tool, organ) == answer for answer, tool, organ in cases) for rule in rules]
    best = max(agreed)
    return rules[agreed.index(best)], best / max(len(cases), 1), len(cases)


def settled(frames: Iterable[Frame]) -> LocationRule | None:
    """The fitted rule; None where so many location answers contradict it that they may mean something else."""
    rule, agreed, _ = fit(frames)
    return rule if agreed >= SETTLED else None


def words(text: str) -> set[str]:
    """The words of a text or a class name in small letters."""
    return set(_WORD.findall(text.lower()))


def mirrored(text: str, *, across: bool = False, down: bool = False) -> str:
    """The text about a frame that is mirrored left-right (`across`), top-bottom (`down`) or both; case is kept."""
    swaps = (ACROSS if across else {}) | (DOWN if down else {})

    def swap(found: re.Match) -> str:
        word = found[0]
        other = swaps.get(word.lower(), word)
        return other.capitalize() if word.istitle() else other.upper() if word.isupper() else other

    return _WORD.sub(swap, text) if swaps else text
