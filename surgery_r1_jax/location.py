"""What left, right, top and bottom mean in a data set: a rule that is fitted to its labels, never assumed."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from surgery_r1_jax import vocabulary
from surgery_r1_jax.records import Box, Frame

REFERENCES = ("organ", "image")
TOPS = ("larger_y", "smaller_y")

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


def flip_location(answer: str) -> str:
    """The answer after a left-right mirroring of the frame; answers other than locations stay."""
    side, dash, height = answer.partition("-")
    mirrored = {"left": "right", "right": "left"}.get(side, side)
    return mirrored + dash + height
