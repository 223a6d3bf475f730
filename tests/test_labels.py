from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_r1_jax import labels, vocabulary
from surgery_r1_jax.errors import InputError
from surgery_r1_jax.labels import parse_line

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "endovis18" / "labels_train.txt"
LINE = "What is the state of bipolar_forceps?|Idle|2,205,106,291"
W, H = 1280, 1024


def refusal(text, **options):
    with pytest.raises(InputError) as caught:
        parse_line(text, "f.txt:7", W, H, **options)
    return str(caught.value)


def test_a_line_becomes_a_record_in_official_spelling():
    record, problem = parse_line(" what is the state of Bipolar forceps? |idle| 2, 205, 106, 291\t", "f.txt:7", W, H)
    assert problem is None
    assert record == labels.Record(
        question="What is the state of bipolar_forceps?",
        answer="Idle",
        box=(1 / W, 204 / H, 105 / W, 290 / H),
        kind=vocabulary.STATE,
        tool="bipolar_forceps",
        source="f.txt:7",
    )


def test_tool_questions_need_the_extended_classes_and_are_about_no_tool():
    line = "What is the tool in the left bottom?|Suction|1,1,9,9"
    assert "'Suction' does not answer a question of kind tool" in refusal(line)
    record, _ = parse_line(line.replace("S", "s"), "f.txt:7", W, H, vocabulary.EXTENDED_CLASSES)
    assert (record.answer, record.kind, record.tool) == ("suction", vocabulary.TOOL, None)


@pytest.mark.parametrize(
    "old, new, place, reason",
    [
        ("|Idle", "", "f.txt:7:1", "2 fields"),
        ("|Idle", "|Idle|", "f.txt:7:1", "4 fields"),
        ("state", "stale", "f.txt:7:1", "unknown question"),
        ("Idle", "Idel", "f.txt:7:39", "none of the 18"),
        ("Idle", "", "f.txt:7:39", "none of the 18"),
        ("Idle", "kidney", "f.txt:7:39", "kind state"),
        ("2,205", "205", "f.txt:7:44", "four integers"),
        ("2,205", "2,2,205", "f.txt:7:44", "four integers"),
        ("2,205", "2.0,205", "f.txt:7:44", "four integers"),
        ("2,205", "1_0,205", "f.txt:7:44", "four integers"),
        ("2,205", "+2,205", "f.txt:7:44", "four integers"),
        ("2,205", "0x2,205", "f.txt:7:44", "four integers"),
        ("2,205", "nan,205", "f.txt:7:44", "four integers"),
        ("2,205", ",205", "f.txt:7:44", "four integers"),
        ("2,205", "\uff12,205", "f.txt:7:44", "four integers"),
        ("2,205", "\u00b2,205", "f.txt:7:44", "four integers"),
        ("2,205", "1000000,205", "f.txt:7:44", "four integers"),
        ("2,205", "9" * 400 + ",205", "f.txt:7:44", "four integers"),
        ("2,205", "9" * 4301 + ",205", "f.txt:7:501", "500 is the most"),
        ("2,205", "106,205", "f.txt:7:44", "empty or inverted"),
        ("2,205", "107,205", "f.txt:7:44", "empty or inverted"),
        ("2,205", "2,291", "f.txt:7:44", "empty or inverted"),
        ("2,205,106", "1281,205,1300", "f.txt:7:44", "leaves the image"),
    ],
)
def test_a_bad_line_is_refused_with_its_place_and_reason(old, new, place, reason):
    message = refusal(LINE.replace(old, new))
    assert message.startswith(place + ": ")
    assert reason in message


def test_refusals_stay_on_one_line_whatever_the_label_holds():
    assert "\x1b" not in refusal("\x1b[31m\u2028|Idle|1,1,2,2")
    assert refusal("a\nb\r|Idle|1,1,2,2").isprintable()


@settings(deadline=None, max_examples=300)
@given(st.tuples(*[st.integers(-99, 150)] * 4), st.booleans())
def test_boxes_are_clipped_to_the_image_or_refused_as_exact_fractions_say(corners, strict):
    width, height = 60, 40
    text = f"What organ is being operated?|kidney|{','.join(map(str, corners))}"
    x0, y0, x1, y1 = (corner - 1 for corner in corners)
    inside = 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    visible = x0 < x1 and y0 < y1 and left < right and top < bottom
    if not visible or (strict and not inside):
        with pytest.raises(InputError, match=r"^f:1:38: "):
            parse_line(text, "f:1", width, height, strict=strict)
        return
    record, warning = parse_line(text, "f:1", width, height, strict=strict)
    exact = Fraction(left, width), Fraction(top, height), Fraction(right, width), Fraction(bottom, height)
    assert record.box == tuple(map(float, exact))
    assert (warning is None) == inside
    if warning:
        assert warning.severity == "warning" and warning.reason.startswith(labels.OUTSIDE)


def test_the_outermost_valid_corners_are_the_whole_image():
    record, warning = parse_line("What organ is being operated?|kidney|1,1,1281,1025", "f:1", W, H)
    assert (record.box, warning) == ((0.0, 0.0, 1.0, 1.0), None)


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is missing")
def test_the_9014_real_training_lines_have_the_published_counts():
    parsed = [
        parse_line(line.split("|", 1)[1], f"{REAL}:{number}", W, H)
        for number, line in enumerate(REAL.read_text().splitlines(), 1)
    ]
    assert len(parsed) == 9014
    assert Counter(record.kind for record, _ in parsed) == {0: 1560, 1: 3727, 2: 3727}
    counts = Counter(record.answer for record, _ in parsed)
    published = (1560, 1641, 59, 381, 707, 128, 483, 13, 60, 123, 6, 41, 13, 72, 1507, 1214, 531, 475)
    assert tuple(counts[name] for name in vocabulary.CLASSES) == published
    tools = Counter(record.tool for record, _ in parsed if record.kind == vocabulary.STATE)
    assert tuple(tools[name] for name in vocabulary.TOOLS) == (1321, 1093, 736, 120, 141, 31, 154, 131)
    clipped = [record.source.rsplit(":", 1)[1] for record, warning in parsed if warning]
    assert clipped == ["1629", "1631", "7947", "7949"]  # the two boxes known to be out, each on two lines
