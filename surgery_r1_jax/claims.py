"""Reads reasoning back into claims, whoever wrote it; it shares nothing with the writers but the vocabulary.

A text is cut into clauses; in each, the names of instruments, states, locations and organs and the boxes are found, in
whatever spelling, and every state, location and box counts as said of

    the instrument before it in the clause, or all in a row ("the A and the B are ..."); a box of one, or of an organ,
    else the one behind it,
    else, in a clause with "answer", "asked" or "question", what the question asks about,
    else what the text spoke of last ("It ...", "Its box ...").

What cannot be read that way, such as a sentence with "not" or "above", is refused rather than passed over. Linear in
the length of the text: it looks for fixed words, each once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from surgery_r1_jax import answer, vocabulary
from surgery_r1_jax.records import Box

MAX_CHARS = 8_192


@dataclass
class Claim:
    """What a clause says of one thing: an instrument, an organ or, with neither, what the question asks about."""

    tools: frozenset[str] = frozenset()  # those that the words may mean
    organ: str | None = None
    states: list[frozenset[str]] = field(default_factory=list)  # each: the classes that the word may mean
    places: list[frozenset[str]] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)  # in pixels of the frame


@dataclass
class Reading:
    """A text as claims, in its order."""

    claims: list[Claim] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)  # said numbers of instruments
    organs: set[str] = field(default_factory=set)
    of_organ: bool = False  # a location is said to be relative to an organ
    listed_twice: bool = False  # a clause names an instrument twice
    last: dict[int, frozenset[str]] = field(default_factory=dict)  # last classes named, by kind of question
    last_box: Box | None = None


class Unreadable(Exception):
    """A text whose claims cannot be made out."""


class NotPlain(Unreadable):
    """A text that is too long or not plain English."""


def read(text: str) -> Reading:
    """The claims of a text. Raises: Unreadable."""
    if len(text) > MAX_CHARS or not text.isascii() or "<" in text or ">" in text or not text.strip():
        raise NotPlain
    reading = Reading()
    sentence, clause = [], []
    for mention in (*_mentions(text), _Mention(_END, ".")):
        if mention.kind != _END:
            clause.append(mention)
            continue
        sentence.append(clause)
        clause = []
        if mention.value == ".":
            _read_sentence(reading, sentence)
            sentence = []
    return reading


# Words to claims

_TOOL, _STATE, _PLACE, _ORGAN, _BOX, _WORD, _END = range(7)
_KIND = {_ORGAN: vocabulary.ORGAN, _STATE: vocabulary.STATE, _PLACE: vocabulary.LOCATION, _TOOL: vocabulary.TOOL}


class _Mention(NamedTuple):
    """A name, a box, another word, or the end of a clause (";") or sentence (".")."""

    kind: int
    value: frozenset[str] | Box | str


# Words that tell a state without being its name begin so. ("suction" is the instrument, "Suction" the state.)
_STEMS = {
    "idl": {"Idle"},
    "grasp": {"Grasping"},
    "retract": {"Retraction"},
    "manipul": {"Tissue_Manipulation", "Tool_Manipulation"},
    "cut": {"Cutting"},
    "cauter": {"Cauterization"},
    "coagul": {"Cauterization"},
    "suctioni": {"Suction"},
    "aspirat": {"Suction"},
    "loop": {"Looping"},
    "sutur": {"Suturing"},
    "stitch": {"Suturing"},
    "clip": {"Clipping"},
    "stapl": {"Staple"},
    "sensing": {"Ultrasound_Sensing"},
}
_STEM_SIZES = sorted({len(stem) for stem in _STEMS})
_NUMBERS = {word: n for n, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight"), 1)}
_NUMBERS |= {str(n): n for n in range(1, 10)} | {"single": 1, "only": 1}
_COUNTED = {"instrument", "instruments", "tool", "tools"}
_ASKING = {"answer", "asked", "question"}
# A sentence with one of these may turn its claims round, or share them out among several things.
_UNCLEAR_WORDS = """
    not no none never neither nor without cannot except isn't aren't doesn't don't instead unlike unless if false wrong
    above below over under upper lower beneath beyond higher
    other others former latter respectively they them their both each every
"""
_UNCLEAR = set(_UNCLEAR_WORDS.split())
_PLURAL = {"are", "were"}
_MOST_TOOLS = 16  # named in a clause


def _names() -> dict[tuple[str, ...], _Mention]:
    """What names mean, as tuples of small words."""
    found = {}
    heads: dict[str, set[str]] = {}
    for kind, names in (
        (_ORGAN, vocabulary.ORGANS),
        (_STATE, vocabulary.STATES),
        (_PLACE, vocabulary.LOCATIONS),
        (_TOOL, vocabulary.TOOLS),
    ):
        for name in names:
            words = tuple(name.lower().replace("_", " ").replace("-", " ").split())
            found[words] = _Mention(kind, frozenset({name}))
            if kind == _PLACE:
                found[words[::-1]] = found[words]  # "top left"
                heads.setdefault(words[0], set()).add(name)  # "left"
            if kind in (_PLACE, _TOOL):
                heads.setdefault(words[-1], set()).add(name)  # "bottom"; "the forceps"
    for word, names in heads.items():
        kind = _PLACE if names <= set(vocabulary.LOCATIONS) else _TOOL
        found.setdefault((word,), _Mention(kind, frozenset(names)))
    return found


_NAMES = _names()
_FIRST_WORDS = {words[0] for words in _NAMES}
_LONGEST_NAME = max(map(len, _NAMES))


def _mentions(text: str) -> Iterator[_Mention]:
    """The text in its order."""
    head, *pieces = text.split("[")
    yield from _in_words(head)
    for piece in pieces:
        inside, closed, rest = piece.partition("]")
        box = answer.read_box(inside) if closed else None
        if box is None:
            raise Unreadable
        yield _Mention(_BOX, box)
        yield from _in_words(rest)


def _in_words(text: str) -> Iterator[_Mention]:
    marked = [
        (part.strip("\"'().,;:!?").removesuffix("'s"), part[-1:])
        for part in text.replace("_", " ").replace("-", " ").split()
    ]
    at = 0
    while at < len(marked):
        length, mention = _name_at(marked, at)
        if mention.value:
            yield mention
        at += length
        mark = marked[at - 1][1]
        if mark in ".!?":
            yield _Mention(_END, ".")
        elif mark in ";:":
            yield _Mention(_END, ";")


def _name_at(marked: list[tuple[str, str]], at: int) -> tuple[int, _Mention]:
    """The longest name that begins at a word, or the word itself; and how many words that is."""
    word = marked[at][0]
    if word in ("suction", "Suction"):
        return 1, _Mention(_TOOL if word == "suction" else _STATE, frozenset({word}))
    low = word.lower()
    lengths = range(min(_LONGEST_NAME, len(marked) - at), 0, -1) if low in _FIRST_WORDS else ()
    for length in lengths:
        part = marked[at : at + length]
        whole = all(mark.isalnum() for _, mark in part[:-1])  # no comma or stop within a name
        if whole and (found := _NAMES.get(tuple(word.lower() for word, _ in part))):
            return length, found
    for size in _STEM_SIZES:
        if states := _STEMS.get(low[:size]):
            return 1, _Mention(_STATE, frozenset(states))
    return 1, _Mention(_WORD, low)


def _read_sentence(reading: Reading, clauses: list[list[_Mention]]) -> None:
    """Add what a sentence claims."""
    words = {mention.value for clause in clauses for mention in clause if mention.kind == _WORD}
    if words & _UNCLEAR and any(mention.kind != _WORD for clause in clauses for mention in clause):
        raise Unreadable
    for clause in clauses:
        _read_clause(reading, clause)


def _read_clause(reading: Reading, clause: list[_Mention]) -> None:
    words = {value for kind, value in clause if kind == _WORD}
    asking = _ASKING & words or not reading.claims
    spoken_of = Claim() if asking else reading.claims[-1]
    if asking:
        reading.claims.append(spoken_of)
    tools: list[Claim] = []  # named so far
    meant: list[Claim] = []  # those that a state or a place is said of: one, or several in a row
    thing: Claim | None = None  # the last named
    waiting: list[tuple[int, frozenset[str] | Box]] = []  # said before anything that it could be said of
    row_ended = True
    for at, (kind, value) in enumerate(clause):
        if kind in _KIND:
            reading.last[_KIND[kind]] = value
        if kind == _TOOL:
            thing = Claim(tools=value)
            reading.claims.append(thing)
            reading.listed_twice |= any(value == tool.tools for tool in tools)
            tools.append(thing)
            meant = [thing] if row_ended else [*meant, thing]
            row_ended = False
            for early in waiting:
                _say([thing], *early)
            waiting = []
        elif kind == _ORGAN:
            reading.organs |= value
            if any(before.kind == _PLACE for before in clause[max(at - 3, 0) : at]):
                reading.of_organ = True  # "left-top of the kidney" says where, and nothing of the kidney
            else:
                thing = Claim(organ=min(value))
                reading.claims.append(thing)
                thing.boxes += [box for kind, box in waiting if kind == _BOX]
                waiting = [early for early in waiting if early[0] != _BOX]
        elif kind == _WORD and value in _PLURAL:
            meant = list(tools)
        elif kind in (_STATE, _PLACE, _BOX):
            if kind == _BOX:
                reading.last_box = value
            about = meant if kind != _BOX else [thing] if thing else []
            if about:
                _say(about, kind, value)
                row_ended |= kind != _BOX
            else:
                waiting.append((kind, value))
        if len(tools) > _MOST_TOOLS:
            raise Unreadable
    for late in waiting:
        _say([spoken_of], *late)
    reading.counts += _counts([value for kind, value in clause if kind == _WORD])


def _say(about: list[Claim], kind: int, value: frozenset[str] | Box) -> None:
    for claim in about:
        {_STATE: claim.states, _PLACE: claim.places, _BOX: claim.boxes}[kind].append(value)


def _counts(words: list[str]) -> Iterator[int]:
    for at, word in enumerate(words):
        if word in _NUMBERS and _COUNTED & set(words[at + 1 : at + 3]):
            yield _NUMBERS[word]
