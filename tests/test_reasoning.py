from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import ELSEWHERE, HERE, LOCATION, ORGAN, STATE, THERE, TOOL, frame, record

from surgery_r1_jax import answer, reasoning, vocabulary
from surgery_r1_jax.records import Record, parse_line

LABELS = Path(__file__).resolve().parents[2] / "shared" / "data" / "endovis18" / "labels_train.txt"
NAMES = vocabulary.EXTENDED_CLASSES


def made_of(text, pieces):
    reached = {0}
    for start in range(len(text)):
        if start in reached:
            reached |= {start + len(piece) for piece in pieces if text.startswith(piece, start)}
    return len(text) in reached


KIDNEY = record(ORGAN, "kidney", box=ELSEWHERE)
IDLE = record(STATE, "Idle", "bipolar_forceps")
LEFT = record(LOCATION, "left-top", "bipolar_forceps")
ASKED = record(TOOL, "bipolar_forceps", "left-top")


@pytest.mark.parametrize(
    ("records", "text"),
    [
        ((IDLE, LEFT, KIDNEY), "The bipolar_forceps at left-top of the kidney is Idle."),
        ((LEFT, IDLE, KIDNEY), "The bipolar_forceps at left-top of the kidney is Idle."),
        ((ASKED, IDLE, LEFT, KIDNEY), "The bipolar_forceps at left-top of the kidney is Idle."),
        ((IDLE, LEFT), "The bipolar_forceps at left-top is Idle."),
        ((IDLE, KIDNEY), "The bipolar_forceps is Idle."),
        ((LEFT, KIDNEY), "The bipolar_forceps is at left-top of the kidney."),
        ((ASKED,), "The bipolar_forceps is at left-top."),
        ((KIDNEY, IDLE, LEFT), "The organ being operated is the kidney."),
    ],
)
def test_a_trace_says_what_the_labels_say(records, text):
    assert reasoning.write(frame(*records), records[0]) == text


def test_the_organ_is_left_out_where_locations_are_relative_to_the_image():
    text = reasoning.write(frame(IDLE, LEFT, KIDNEY), IDLE, reference="image")
    assert text == "The bipolar_forceps at left-top is Idle."


def test_another_instrument_says_nothing_about_this_one():
    other = record(LOCATION, "right-bottom", "stapler")
    assert reasoning.write(frame(IDLE, other), IDLE) == "The bipolar_forceps is Idle."


def test_instruments_of_one_name_are_told_apart_by_their_boxes():
    right = record(LOCATION, "right-bottom", "bipolar_forceps", THERE)
    busy = record(STATE, "Cutting", "bipolar_forceps", THERE)
    both = frame(right, IDLE, busy, LEFT)
    assert reasoning.write(both, IDLE) == "The bipolar_forceps at left-top is Idle."
    assert reasoning.write(both, busy) == "The bipolar_forceps at right-bottom is Cutting."
    assert reasoning.write(both, right) == "The bipolar_forceps at right-bottom is Cutting."
    unplaced = record(STATE, "Looping", "bipolar_forceps", ELSEWHERE)
    assert reasoning.write(frame(right, LEFT, unplaced), unplaced) == "The bipolar_forceps is Looping."


def test_a_single_label_counts_wherever_its_box_is():
    busy = record(STATE, "Cutting", "bipolar_forceps", THERE)  # a state's box may hold the tissue as well
    assert reasoning.write(frame(busy, LEFT), busy) == "The bipolar_forceps at left-top is Cutting."


def check(frame, record, **options):
    """The trace is made of the pieces, supports the answer, and names nothing the frame's labels do not."""
    text = reasoning.write(frame, record, **options)
    assert made_of(text, (*reasoning.PIECES, *NAMES))
    said = answer.parse(answer.render(answer=record.answer, think=text), want=0, classes=NAMES)
    assert said.format_ok
    assert NAMES[said.think_answers[record.kind]] == record.answer
    labels = {other.answer for other in frame.records} | {other.tool for other in frame.records}
    labels.add(vocabulary.question_kind(record.question)[1])
    assert {NAMES[index] for index in said.think_answers if index >= 0} <= labels


boxes = st.sampled_from((HERE, THERE, ELSEWHERE))
tools = st.sampled_from(vocabulary.TOOLS[:3])
records = st.lists(
    st.builds(record, st.just(ORGAN), st.sampled_from(vocabulary.ORGANS), st.none(), boxes)
    | st.builds(record, st.just(STATE), st.sampled_from(vocabulary.STATES), tools, boxes)
    | st.builds(record, st.just(LOCATION), st.sampled_from(vocabulary.LOCATIONS), tools, boxes)
    | st.builds(record, st.just(TOOL), tools, st.sampled_from(vocabulary.LOCATIONS), boxes),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        (STATE, "Idle", None),
        (TOOL, "suction", None),
        (vocabulary.OTHER, "open", None),
        (ORGAN, "kidney", "The organ being operated is the kidney."),
    ],
)
def test_of_a_question_in_other_words_only_what_the_labels_say_is_written(kind, name, text):
    asked = Record("What do you see?", name, HERE, kind, None, "records.csv:2")
    assert reasoning.write(frame(asked, IDLE), asked) == text


@settings(deadline=None, derandomize=True)
@given(records, st.sampled_from(("organ", "image")))
def test_no_trace_contradicts_its_labels(records, reference):
    for one in records:
        check(frame(*records), one, reference=reference)


def test_every_trace_of_the_real_labels_is_the_full_sentence():
    if not LABELS.is_file():
        pytest.skip(f"{LABELS} is not on this machine")
    lines = defaultdict(list)
    for line in LABELS.read_text().splitlines():
        frame_id, _, label = line.partition("|")
        lines[frame_id].append(parse_line(label, frame_id, 1280, 1024)[0])
    assert sum(map(len, lines.values())) == 9014
    for records in lines.values():
        whole = frame(*records)
        for one in records:
            text = reasoning.write(whole, one)
            assert (" at " in text and " of the kidney is " in text) == (one.kind != ORGAN)
    for records in list(lines.values())[::50]:
        for one in records:
            check(frame(*records), one)
