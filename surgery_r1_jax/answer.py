"""The output grammar, and the only place that knows it: what to ask, how to write an answer, how to read one.

    <think>...</think><answer>{"answer": "Idle", "bbox_2d": [10, 20, 110, 220]}</answer>

The reasoning may be left out. The object holds the answer, the box, or both: what the prompt wants.

Reading has two verdicts. `format_ok` is strict: the text is what `render` writes, give or take ASCII white
space around the tagged parts. Answer and box come from one lenient read, so that a right answer in clumsy
spelling keeps its own reward. What was cut off or said twice is never repaired.

    text                                               format_ok  read             reason
    canonical, exactly the wanted keys                 yes        answer and box   OK
    other spacing, key order, class spelling, decimals,
      single quotes, ``` fence, list of one object     no         answer and box   NOT_CANONICAL
    text before, between or after the tagged parts     no         answer and box   EXTRA_TEXT
    a key the prompt did not want                      no         the wanted part  UNWANTED_KEY
    a wanted key missing                               no         the other part   MISSING_ANSWER, MISSING_BOX
    a class that is not in the list                    no         the box          UNKNOWN_CLASS
    not four plain numbers                             no         the answer       BAD_BOX
    x0 >= x1 or y0 >= y1                               no         the answer       INVERTED_BOX
    any other key                                      no         nothing          UNKNOWN_KEY
    not an object of one string and one flat list      no         nothing          BAD_JSON
    tags in another order                              no         nothing          BAD_ORDER
    no answer tags                                     no         nothing          NO_ANSWER_TAG
    a tag (even in the reasoning), key or object twice no         nothing          DOUBLED
    stopped by the token limit, or a tag not closed    no         nothing          TRUNCATED
    more than MAX_CHARS characters                     no         nothing          TOO_LONG

Of several reasons the first found is given: tags before object before values. A plain number is ASCII digits
with at most one point between them, MAX_NUMBER_CHARS in all: no sign (no pixel is negative), exponent, NaN,
infinity or leading zero.

The reader never raises and is linear in the length: it looks for fixed strings, a fixed number of times.
"""

import dataclasses
import enum
import itertools
from collections.abc import Callable, Sequence

from surgery_r1_jax import vocabulary
from surgery_r1_jax.errors import InputError
from surgery_r1_jax.labels import Box

WANT = ("answer", "box", "both")  # what a prompt asks for; the index is its code

MAX_CHARS = 32_768
MAX_NUMBER_CHARS = 12
MAX_THINK_BOXES = 4


def instruction(units: str) -> str:
    """The system text; `units` are those of the family's box codec."""
    return (
        "Answer the question about this frame of robotic surgery. "
        'Write <think>reasoning</think><answer>{"answer": "class", "bbox_2d": [x1, y1, x2, y2]}</answer>. '
        "The reasoning may be left out. The box encloses what the answer is about, in "
        f"{units}: left, top, right, bottom."
    )


# Everything `render` writes besides reasoning, classes and integers, for a tokenizer to hold piece by piece.
PIECES = (
    "<think>",
    '</think><answer>{"answer": "',
    '</think><answer>{"bbox_2d": [',
    '<answer>{"answer": "',
    '<answer>{"bbox_2d": [',
    '", "bbox_2d": [',
    ", ",
    '"}</answer>',
    "]}</answer>",
)

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_KEYS = ({"answer"}, {"bbox_2d"}, {"answer", "bbox_2d"})  # by code of WANT
_SUFFIX = (" Give only the answer.", " Give only the box.", "")  # by code of WANT
_SPACE = " \t\n\r"
# Words end at ASCII signs only: a foreign letter or a zero-width sign stays in its word and spoils it.
_WORDS = {code: " " for code in range(128) if not (chr(code).isalnum() or chr(code) in "_-")}


class Reason(enum.IntEnum):
    """Why a completion is not strictly in the grammar; the module's table says what is read all the same."""

    OK = 0
    TOO_LONG = enum.auto()
    TRUNCATED = enum.auto()
    DOUBLED = enum.auto()
    NO_ANSWER_TAG = enum.auto()
    BAD_ORDER = enum.auto()
    BAD_JSON = enum.auto()
    UNKNOWN_KEY = enum.auto()
    MISSING_ANSWER = enum.auto()
    UNKNOWN_CLASS = enum.auto()
    MISSING_BOX = enum.auto()
    BAD_BOX = enum.auto()
    INVERTED_BOX = enum.auto()
    UNWANTED_KEY = enum.auto()
    EXTRA_TEXT = enum.auto()
    NOT_CANONICAL = enum.auto()


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What a completion says. Boxes are xyxy in the codec's units: finite, not clipped, x0 < x1, y0 < y1."""

    format_ok: bool  # reason is OK
    answer: int  # class index, -1 for none
    box: Box | None
    reason: Reason
    think: str = ""  # the reasoning, "" where there is none or the tags are wrong
    think_answers: tuple[int, ...] = (-1,) * len(vocabulary.KINDS)  # last class named in it, by kind; -1 for none
    think_boxes: tuple[Box, ...] = ()  # first boxes [x0, y0, x1, y1] in it, at most MAX_THINK_BOXES


def prompt(question: str, want: int = 2) -> str:
    """The text of a question that wants WANT[want]; to want both adds nothing."""
    return question + _SUFFIX[want]


def render(*, answer: str | None = None, box: Sequence[int] | None = None, think: str | None = None) -> str:
    """The canonical text of an answer, a box in codec units, or both, after the reasoning if there is any.

    Raises InputError where the reasoning holds a tag of the grammar, since that text could not be read back.
    """
    if think is None:
        return f"<answer>{_object(answer, box)}</answer>"
    for tag in _TAGS:
        if tag in think:
            raise InputError(f"the reasoning {think[:60]!r} holds the tag {tag}; take it out")
    return f"<think>{think}</think><answer>{_object(answer, box)}</answer>"


def parse(text: str, *, want: int = 2, truncated: bool = False, classes: Sequence[str] = vocabulary.CLASSES) -> Parsed:
    """Reads a completion, without its end token, to a prompt that wanted WANT[want], by the module's table.

    `truncated` says that it ran into the token limit. A part the prompt did not want is never read.
    """
    think, answer, box = "", -1, None
    try:
        think, body, around = _split(text, truncated)
        fields = _fields(body)
    except _Unreadable as unreadable:
        reason = unreadable.reason
    else:
        answer, box, reason = _judge(fields, body, around, want, classes)
    return Parsed(
        format_ok=reason is Reason.OK,
        answer=answer,
        box=box,
        reason=reason,
        think=think,
        think_answers=_think_answers(think, classes),
        think_boxes=_think_boxes(think),
    )


def read_box(text: str) -> Box | None:
    """The box of four plain numbers with commas between them; None where the text is not one."""
    return _box(text)[0]


def map_boxes(text: str, change: Callable[[Box], Sequence[float]]) -> str:
    """The text with every box `[x0, y0, x1, y1]` in it changed, as from pixels to the units of a codec."""
    head, *pieces = text.split("[")
    for piece in pieces:
        inside, closed, rest = piece.partition("]")
        box = read_box(inside) if closed else None
        head += "[" + (piece if box is None else f"{', '.join(map(plain, change(box)))}]{rest}")
    return head


def plain(number: float) -> str:
    """A number as a box in a text holds it: whole, or with at most two decimals."""
    return f"{number:.2f}".rstrip("0").rstrip(".")


class _Unreadable(Exception):
    def __init__(self, reason: Reason):
        self.reason = reason


def _object(answer: str | None, box: Sequence[int] | None) -> str:
    if answer is None and box is None:
        raise ValueError("nothing to write: neither an answer nor a box")
    fields = []
    if answer is not None:
        fields.append(f'"answer": "{answer}"')
    if box is not None:
        fields.append(f'"bbox_2d": [{", ".join(f"{unit:d}" for unit in box)}]')
    return "{" + ", ".join(fields) + "}"


def _split(text: str, truncated: bool) -> tuple[str, str, str]:
    """The reasoning, the text inside the answer tags, and all text outside of tags."""
    if len(text) > MAX_CHARS:
        raise _Unreadable(Reason.TOO_LONG)
    counts = [text.count(tag) for tag in _TAGS]
    think, end_think, answer, end_answer = counts
    if truncated or think > end_think or answer > end_answer:
        raise _Unreadable(Reason.TRUNCATED)
    if max(counts) > 1:
        raise _Unreadable(Reason.DOUBLED)
    if not answer:
        raise _Unreadable(Reason.NO_ANSWER_TAG)
    places = [text.find(tag) for tag in _TAGS if tag in text]
    if end_think > think or places != sorted(places):
        raise _Unreadable(Reason.BAD_ORDER)

    around, _, rest = text.partition("<answer>")
    body, _, after = rest.partition("</answer>")
    reasoning = ""
    if think:
        around, _, rest = around.partition("<think>")
        reasoning, _, between = rest.partition("</think>")
        around += between
    return reasoning, body, around + after


def _fields(body: str) -> dict[str, str]:
    """The raw values by key: the answer without its quotes, the box without its brackets.

    With two keys, none of them twice, the loop ends in its third turn at the latest.
    """
    rest = body.strip(_SPACE)
    if rest.startswith("```") and rest.endswith("```"):
        rest = rest[3:-3].removeprefix("json").strip(_SPACE)
    if rest.startswith("[") and rest.endswith("]"):
        rest = rest[1:-1].strip(_SPACE)
    fields = {}
    rest = _after("{", rest)
    while True:
        key, rest = _string(rest)
        rest = _after(":", rest)
        if key in fields:
            raise _Unreadable(Reason.DOUBLED)
        if key == "answer":
            fields[key], rest = _string(rest)
        elif key == "bbox_2d":
            fields[key], rest = _until("]", _after("[", rest))
        else:
            raise _Unreadable(Reason.UNKNOWN_KEY)
        if rest.startswith("}"):
            break
        rest = _after(",", rest)
    rest = rest[1:].lstrip(_SPACE)
    if rest:
        another = rest.lstrip(_SPACE + ",").startswith("{")
        raise _Unreadable(Reason.DOUBLED if another else Reason.BAD_JSON)
    return fields


def _after(mark: str, text: str) -> str:
    """What follows the mark that the text must begin with."""
    if not text.startswith(mark):
        raise _Unreadable(Reason.BAD_JSON)
    return text[len(mark) :].lstrip(_SPACE)


def _until(mark: str, text: str) -> tuple[str, str]:
    """The text before the mark, and what follows the mark."""
    value, found, rest = text.partition(mark)
    if not found:
        raise _Unreadable(Reason.BAD_JSON)
    return value, rest.lstrip(_SPACE)


def _string(text: str) -> tuple[str, str]:
    """The text in quotes, and what follows it. No key or class needs an escape, so there are none."""
    if not text.startswith(('"', "'")):
        raise _Unreadable(Reason.BAD_JSON)
    value, rest = _until(text[0], text[1:])
    if "\\" in value:
        raise _Unreadable(Reason.BAD_JSON)
    return value, rest


def _judge(
    fields: dict[str, str], body: str, around: str, want: int, classes: Sequence[str]
) -> tuple[int, Box | None, Reason]:
    """The wanted answer and box, and the first thing that keeps the text from being canonical."""
    answer, box, reasons = -1, None, []
    if "answer" in _KEYS[want]:
        answer, reason = _answer(fields.get("answer"), classes)
        reasons.append(reason)
    if "bbox_2d" in _KEYS[want]:
        box, reason = _box(fields.get("bbox_2d"))
        reasons.append(reason)
    if fields.keys() - _KEYS[want]:
        reasons.append(Reason.UNWANTED_KEY)
    if around.strip(_SPACE):
        reasons.append(Reason.EXTRA_TEXT)
    if any(reasons):
        return answer, box, next(filter(None, reasons))
    name = classes[answer] if answer >= 0 else None
    units = [int(unit) for unit in box] if box else None
    return answer, box, Reason.OK if body == _object(name, units) else Reason.NOT_CANONICAL


def _answer(text: str | None, classes: Sequence[str]) -> tuple[int, Reason]:
    if text is None:
        return -1, Reason.MISSING_ANSWER
    index = vocabulary.class_index(text, classes)
    return index, Reason.UNKNOWN_CLASS if index < 0 else Reason.OK


def _box(text: str | None) -> tuple[Box | None, Reason]:
    if text is None:
        return None, Reason.MISSING_BOX
    numbers = [_number(part) for part in text.split(",", 4)]
    if len(numbers) != 4 or None in numbers:
        return None, Reason.BAD_BOX
    x0, y0, x1, y1 = numbers
    if x0 >= x1 or y0 >= y1:
        return None, Reason.INVERTED_BOX
    return (x0, y0, x1, y1), Reason.OK


def _number(text: str) -> float | None:
    """The value of a plain number; `float` alone also takes `1_0`, `inf`, `1e308` and full-width digits."""
    text = text.strip(_SPACE)
    whole, point, decimals = text.partition(".")
    if len(text) > MAX_NUMBER_CHARS or not _digits(whole) or (point and not _digits(decimals)):
        return None
    if whole[0] == "0" and whole != "0":
        return None
    return float(text)


def _digits(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _think_answers(think: str, classes: Sequence[str]) -> tuple[int, ...]:
    """By kind, the last whole word spelled just as a class: `suction`, a tool, is not `Suction`, a state."""
    index_of = {name: index for index, name in enumerate(classes)}
    found = [-1] * len(vocabulary.KINDS)
    for word in think.translate(_WORDS).split():
        if (index := index_of.get(word, -1)) >= 0:
            found[vocabulary.class_kind(index, classes)] = index
    return tuple(found)


def _think_boxes(think: str) -> tuple[Box, ...]:
    brackets = (piece.partition("]") for piece in think.split("[")[1:])
    boxes = (_box(inside)[0] for inside, closed, _ in brackets if closed)
    return tuple(itertools.islice(filter(None, boxes), MAX_THINK_BOXES))
