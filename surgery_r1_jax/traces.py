"""Full reasoning for a training set: what the labels say of the whole frame, in many phrasings and orders.

    Two instruments are in view: the clip_applier and the bipolar_forceps. The clip_applier at left-top of the kidney
    stays Idle. Turning to the bipolar_forceps [5, 637, 533, 940]: it lies at left-top of the kidney and performs
    Looping. So the answer is Looping.

Every statement is one label or several: nothing is said of what a label does not hold. Boxes are pixels of the frame.
The phrasings are ours: the traces of the paper were never published. `reasoning.write` is the one-phrase form of this,
for small models and small budgets; `tracecheck` is the reader that checks what is written here, or by a teacher.
"""

import random
from collections import Counter
from dataclasses import dataclass, replace

from surgery_r1_jax import answer, vocabulary
from surgery_r1_jax.records import Box, Frame, Record

COUNTS = ("One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")

# T is an instrument, P its place, S its state, V what it does, O the organ, B a box, N a number, L a list.
OVERVIEW = (
    "N are in view: L.",
    "N can be seen: L.",
    "The frame shows N: L.",
    "There are N here, namely L.",
    "L are the N of this frame.",
    "In the picture I find N: L.",
    "This frame has N: L.",
    "I make out N, L.",
    "The scene holds N: L.",
    "What I see are N: L.",
    "Counting gives N: L.",
    "N appear in this frame, L.",
)
ALONE = (
    "Only the T is in view.",
    "The T is the only instrument.",
    "The one instrument here is the T.",
    "The frame shows a single instrument, the T.",
    "A single instrument is here: the T.",
    "One instrument can be seen, the T.",
)
ORGAN = (
    "The organ in view is the O.",
    "The O is being operated on.",
    "This is surgery of the O.",
    "The operation is on the O.",
    "The tissue here belongs to the O.",
    "The field of view holds the O.",
    "The frame shows the O.",
    "The O is the organ of this frame.",
)
ORGAN_BOXED = (
    "The O fills the region B.",
    "The O spans B.",
    "The O extends across B.",
    "The organ, the O, takes up B.",
    "The O can be seen within B.",
    "In B lies the O.",
    "I take the O to cover B.",
    "The visible part of the O is B.",
)
DONE = (
    "The T at P V.",
    "The T is at P and V.",
    "At P, the T V.",
    "At P lies the T, which V.",
    "The T V at P.",
    "The T, seen at P, V.",
    "The T can be seen at P; it V.",
    "As for the T, it is at P and V.",
    "Located at P, the T V.",
    "Turning to the T: it lies at P and V.",
    "Looking at P, I find that the T V.",
    "The T lies at P. It V.",
    "Next, the T: it V, at P.",
    "The T is found at P, where it V.",
    "At P one sees that the T V.",
    "I notice the T at P, and it V.",
)
PLACED = (
    "The T is at P.",
    "The T lies at P.",
    "At P there is the T.",
    "The T can be seen at P.",
    "The place of the T is P.",
    "Looking at P, I find the T.",
)
DOING = (
    "The T V.",
    "As for the T, it V.",
    "Here the T V.",
    "One sees that the T V.",
    "In this frame the T V.",
    "Turning to the T: it V.",
)
BARE = ("The T is there.", "The T can be seen.", "The T is in view.")
IDLE = ("is S", "stays S", "rests and is S", "waits and is S", "remains S", "is in the state S")
ACTIVE = ("performs S", "is busy with S", "is engaged in S", "carries out S", "is used for S", "is in the state S")
BOXED = ("T B", "T (box B)", "T within B", "T in the region B")

SO = ("So ", "Hence ", "Thus ", "Therefore ", "This means that ", "It follows that ", "In conclusion, ", "Altogether, ")
CONCLUSION = {
    vocabulary.ORGAN: (
        "the organ being operated is the O.",
        "the organ is the O.",
        "the answer is the O.",
        "it is the O that is operated on.",
    ),
    vocabulary.STATE: (
        "the T V.",
        "the state of the T is S.",
        "the answer is S.",
        "the answer for the T is S.",
        "S is the state of the T.",
    ),
    vocabulary.LOCATION: (
        "the T is at P.",
        "the T is located at P.",
        "the answer is P.",
        "the place of the T is P.",
        "P is where the T is.",
        "the answer for the T is P.",
    ),
    vocabulary.TOOL: (
        "the tool at P is the T.",
        "the T is the tool at P.",
        "the answer is the T.",
        "it is the T that lies at P.",
        "the instrument asked about is the T.",
    ),
}
BOX = (
    "the answer lies in B.",
    "the box of the answer is B.",
    "what is asked about lies within B.",
    "the region asked for is B.",
    "the answer is to be seen in B.",
    "B encloses what is asked about.",
    "B holds the answer.",
    "B is the box to answer with.",
)
AND_BOX = (", in B.", ", within B.", ", to be seen in B.", ", and the box is B.", ", which B shows.", ", as B shows.")

_MOST_BOXES = answer.MAX_THINK_BOXES  # the reader of completions looks at no more


@dataclass(frozen=True)
class Instrument:
    """What the labels of a frame hold of one instrument."""

    tool: str
    state: str | None
    place: str | None
    box: Box


def instruments(frame: Frame) -> list[Instrument]:
    """The instruments of a frame in the order of its labels.

    Two of one name are told apart by their boxes; records of one name that agree are one instrument, whatever their
    boxes, since the box of a state may hold the tissue as well.
    """
    found: dict[str, list[tuple[Record, str | None, str | None]]] = {}
    for record in frame.records:
        if record.kind == vocabulary.TOOL:
            place = vocabulary.question_kind(record.question)[1]
            found.setdefault(record.answer, []).append((record, None, place))
        elif record.kind in (vocabulary.STATE, vocabulary.LOCATION) and record.tool:
            said = (record.answer, None) if record.kind == vocabulary.STATE else (None, record.answer)
            found.setdefault(record.tool, []).append((record, *said))
    made = []
    for tool, labels in found.items():
        if (one := _instrument(tool, labels)) is not None:
            made.append(one)
            continue
        for box in dict.fromkeys(record.box for record, *_ in labels):
            here = [label for label in labels if label[0].box == box]
            made.append(_instrument(tool, here) or Instrument(tool, None, None, box))
    return made


def write(frame: Frame, record: Record, *, want: int, seed: str, reference: str = "organ") -> str:
    """The reasoning for one record whose prompt wants `answer.WANT[want]`; the same for the same seed.

    `reference` is what locations are relative to, as in `reasoning.write`. Where the question tells no instrument that
    the labels know, the conclusion is the answer alone.
    """
    rng = random.Random(seed)
    return _Writer(frame, record, rng, reference).trace(want)


class _Writer:
    """One trace in the making."""

    def __init__(self, frame: Frame, record: Record, rng: random.Random, reference: str):
        self.frame, self.record, self.rng = frame, record, rng
        organs = [other for other in frame.records if other.kind == vocabulary.ORGAN]
        self.organ = organs[0] if len({organ.answer for organ in organs}) == 1 else None
        self.relative = f" of the {self.organ.answer}" if self.organ and reference == "organ" else ""
        self.instruments = instruments(frame)
        self.asked = self._asked()
        # Without their boxes, two instruments that do the same at the same place could be taken for each other.
        likes = Counter((one.state, one.place) for one in self.instruments)
        self.alike = {one for one in self.instruments if likes[one.state, one.place] > 1}
        self.boxes_left = _MOST_BOXES - 1 - len(self.alike)

    def trace(self, want: int) -> str:
        rng = self.rng
        described = [one for one in self.instruments if one is self.asked or rng.random() < 0.75]
        rng.shuffle(described)
        parts = []
        if self.organ and rng.random() < 0.6:
            parts.append(self._organ())
        if described != self.instruments or rng.random() < 0.5:
            parts.append(self._overview(named=set(described) >= set(self.instruments)))
        rng.shuffle(parts)
        parts += [self._describe(one) for one in described]
        return " ".join([*filter(None, parts), self._conclusion(want)])

    def _asked(self) -> Instrument | None:
        """The instrument that the record is about, told by its box where several have its name."""
        tool = self.record.answer if self.record.kind == vocabulary.TOOL else self.record.tool
        named = [one for one in self.instruments if one.tool == tool]
        return next((one for one in named if len(named) == 1 or one.box == self.record.box), None)

    def _organ(self) -> str:
        box = self._maybe(self.organ.box, 0.5)
        phrase = self.rng.choice(ORGAN_BOXED if box else ORGAN)
        return _fill(phrase, O=self.organ.answer, B=box)

    def _overview(self, *, named: bool) -> str:
        """How many instruments and which; without the number where two have one name."""
        tools = [one.tool for one in self.instruments]
        if len(set(tools)) < len(tools) or not 0 < len(tools) <= len(COUNTS):
            return (
                "" if named or not tools else " ".join(_fill(self.rng.choice(BARE), T=t) for t in dict.fromkeys(tools))
            )
        if len(tools) == 1:
            return _fill(self.rng.choice(ALONE), T=tools[0])
        self.rng.shuffle(tools)
        *most, last = (f"the {tool}" for tool in tools)
        number = f"{COUNTS[len(tools) - 1].lower()} {self.rng.choice(('instruments', 'tools'))}"
        text = _fill(self.rng.choice(OVERVIEW), N=number, L=f"{', '.join(most)} and {last}")
        return text[0].upper() + text[1:]

    def _describe(self, one: Instrument) -> str:
        chance = 0.6 if one is self.asked else 0.2
        box = pixels(one.box, self.frame) if one in self.alike else self._maybe(one.box, chance)
        phrases = [[BARE, DOING], [PLACED, DONE]][one.place is not None][one.state is not None]
        return self._say(self.rng.choice(phrases), one, box)

    def _say(self, phrase: str, one: Instrument, box: str = "") -> str:
        tool = _fill(self.rng.choice(BOXED), T=one.tool, B=box) if box else one.tool
        doing = _fill(self.rng.choice(IDLE if one.state == "Idle" else ACTIVE), S=one.state)
        return _fill(phrase, T=tool, V=doing, S=one.state, P=f"{one.place}{self.relative}")

    def _maybe(self, box: Box, chance: float) -> str:
        """A box as text, or nothing."""
        if self.boxes_left <= 0 or self.rng.random() >= chance:
            return ""
        self.boxes_left -= 1
        return pixels(box, self.frame)

    def _conclusion(self, want: int) -> str:
        """The answer, the box, or both, as the prompt wants."""
        box = "" if answer.WANT[want] == "answer" else pixels(self.record.box, self.frame)
        record, so = self.record, self.rng.choice(SO)
        if answer.WANT[want] == "box":
            return so + _fill(self.rng.choice(BOX), B=box)
        if record.kind == vocabulary.ORGAN:
            said = _fill(self.rng.choice(CONCLUSION[vocabulary.ORGAN]), O=record.answer)
        elif self.asked is None or vocabulary.question_kind(record.question)[0] != record.kind:
            said = f"the answer is {record.answer}."
        else:
            said = self._say(self.rng.choice(CONCLUSION[record.kind]), _as_asked(self.asked, record))
        return so + (said.removesuffix(".") + _fill(self.rng.choice(AND_BOX), B=box) if box else said)


def _as_asked(one: Instrument, record: Record) -> Instrument:
    """An instrument with what this record says of it, even where another contradicts."""
    if record.kind == vocabulary.STATE:
        return replace(one, state=record.answer)
    if record.kind == vocabulary.LOCATION:
        return replace(one, place=record.answer)
    return replace(one, place=vocabulary.question_kind(record.question)[1])


def _instrument(tool: str, labels: list[tuple[Record, str | None, str | None]]) -> Instrument | None:
    """One instrument of labels that agree, else None."""
    states = {state for _, state, _ in labels if state}
    places = {place for _, _, place in labels if place}
    if len(states) > 1 or len(places) > 1:
        return None
    box = next((record.box for record, _, place in labels if place), labels[0][0].box)
    return Instrument(tool, *states or {None}, *places or {None}, box)


def pixels(box: Box, frame: Frame) -> str:
    """A box as reasoning holds it."""
    sides = (frame.width, frame.height) * 2
    return f"[{', '.join(answer.plain(edge * side) for edge, side in zip(box, sides, strict=True))}]"


def _fill(phrase: str, **parts: str) -> str:
    """The phrase with its letters, each a word of its own, replaced."""
    words = phrase.split(" ")
    for index, word in enumerate(words):
        letter = word.strip(".,;:()")
        if letter in parts:
            words[index] = word.replace(letter, str(parts[letter]))
    return " ".join(words)
