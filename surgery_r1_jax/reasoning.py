"""Reasoning traces written from the labels alone: one phrase that leads to the answer, never against it.

    The bipolar_forceps at left-top of the kidney is Idle.        state, location and tool questions
    The organ being operated is the kidney.                       organ questions

The place follows the instrument's name at once, so that a small model gets from one to the other in a single
step of attention, and settles the place before it writes the box. The template is ours: the traces of the
paper were never published. A teacher's traces replace it through `Record.think`.
"""

from surgery_r1_jax import vocabulary
from surgery_r1_jax.records import Frame, Record

# Everything `write` writes besides class and tool names, for a tokenizer to hold piece by piece.
PIECES = (
    "The organ being operated is the ",
    "The ",
    " at ",
    " is at ",
    " of the ",
    " is ",
    ".",
)


def write(frame: Frame, record: Record, *, reference: str = "organ") -> str | None:
    """The reasoning for one record of a frame: what the labels say about its instrument, and nothing else.

    None where they say nothing, as to a question in other words than the published ones.
    `reference` is what the data set's locations are relative to (`LocationRule.reference`): where it is
    "organ", and the frame has an organ record, the location is said to be of that organ.
    """
    if record.kind == vocabulary.ORGAN:
        return f"The organ being operated is the {record.answer}."
    tool = record.answer if record.kind == vocabulary.TOOL else record.tool
    if tool is None:
        return None
    state = _label(frame, record, tool, vocabulary.STATE)
    place = _label(frame, record, tool, vocabulary.LOCATION)
    organs = {other.answer for other in frame.records if other.kind == vocabulary.ORGAN}
    if place and reference == "organ" and len(organs) == 1:
        place = f"{place} of the {organs.pop()}"
    if place and state:
        return f"The {tool} at {place} is {state}."
    if place:
        return f"The {tool} is at {place}."
    return f"The {tool} is {state}." if state else None


def _label(frame: Frame, record: Record, tool: str, kind: int) -> str | None:
    """The state or location of the record's instrument, or None where the labels do not settle it.

    Two instruments of one name in a frame are told apart by their boxes.
    """
    if record.kind == kind:
        return record.answer
    if record.kind == vocabulary.TOOL and kind == vocabulary.LOCATION:
        return vocabulary.question_kind(record.question)[1]  # the question tells the place
    others = [other for other in frame.records if other.kind == kind and other.tool == tool]
    others = [other for other in others if other.box == record.box] or others
    answers = {other.answer for other in others}
    return answers.pop() if len(answers) == 1 else None
