import itertools
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_r1_jax import labels, location, vocabulary
from surgery_r1_jax.labels import Record
from surgery_r1_jax.location import LocationRule
from surgery_r1_jax.records import Frame

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "endovis18" / "labels_train.txt"
RULES = [LocationRule(*choice) for choice in itertools.product(location.REFERENCES, location.TOPS)]
W, H = 1280, 1024


def unit(x0, y0, x1, y1):
    return (x0 / W, y0 / H, x1 / W, y1 / H)


@st.composite
def pixel_boxes(draw):
    x0, x1 = sorted(draw(st.lists(st.integers(0, W), min_size=2, max_size=2, unique=True)))
    y0, y1 = sorted(draw(st.lists(st.integers(0, H), min_size=2, max_size=2, unique=True)))
    return x0, y0, x1, y1


def frame(cases, organ):
    """A frame that asks where a tool is once per (answer, box), after its organ question if there is one."""
    records = [Record("", "kidney", organ, vocabulary.ORGAN, None, "")] if organ else []
    records += [Record("", answer, box, vocabulary.LOCATION, "suction", "") for answer, box in cases]
    return Frame("seq_2/frame000", "seq_2", Path("x"), W, H, tuple(records))


@settings(deadline=None, max_examples=300)
@given(pixel_boxes(), pixel_boxes(), st.sampled_from(RULES))
def test_answers_are_those_of_whole_pixel_arithmetic(tool, organ, rule):
    # Twice the centres, in integers: a tie is a tie whatever 1/1280 rounds to.
    reference = (0, 0, W, H) if rule.reference == "image" else organ
    side = "right" if tool[0] + tool[2] >= reference[0] + reference[2] else "left"
    low = tool[1] + tool[3] >= reference[1] + reference[3]
    height = "top" if low == (rule.top == "larger_y") else "bottom"
    assert rule.answer(unit(*tool), unit(*organ)) == f"{side}-{height}"


def test_level_centres_count_as_right_and_below():
    for x in range(1, 1270):  # unequal boxes with equal centres: the sums of these fractions do not all round alike
        tool, organ = unit(x - 1, 10, x + 7, 20), unit(x, 11, x + 6, 19)
        assert LocationRule("organ", "larger_y").answer(tool, organ) == "right-top"
        assert LocationRule("organ", "smaller_y").answer(tool, organ) == "right-bottom"


@pytest.mark.parametrize("rule", RULES)
def test_fit_finds_the_rule_that_wrote_the_labels(rule):
    organ = unit(100, 500, 700, 1000)
    tools = [unit(x, y, x + 90, y + 70) for x in range(0, 1100, 100) for y in range(0, 900, 100)]
    frames = [frame([(rule.answer(tool, organ), tool) for tool in tools], organ)]
    assert location.fit(frames) == (rule, 1.0, len(tools))


def test_without_organ_boxes_only_the_image_can_be_the_reference():
    tool = unit(0, 0, 10, 10)
    assert LocationRule("organ").answer(tool, None) is None
    assert location.fit([frame([("left-bottom", tool)], None)]) == (LocationRule("image", "larger_y"), 1.0, 1)


def test_without_location_questions_the_default_rule_is_returned_with_no_agreement():
    assert location.fit([]) == (LocationRule("organ", "larger_y"), 0.0, 0)


def test_mirroring_words_twice_restores_them_and_touches_no_class_but_locations():
    assert location.mirrored("left-bottom", across=True) == "right-bottom"
    assert location.mirrored("left-bottom", down=True) == "left-top"
    assert location.mirrored("At the LEFT; Lower, leftmost_tool, lefty.", across=True, down=True) == (
        "At the RIGHT; Upper, rightmost_tool, lefty."
    )
    for name, (across, down) in itertools.product(vocabulary.EXTENDED_CLASSES, itertools.product((0, 1), repeat=2)):
        once = location.mirrored(name, across=across, down=down)
        assert location.mirrored(once, across=across, down=down) == name
        assert (once != name) == (name in vocabulary.LOCATIONS and bool(across or down))


def test_a_rule_that_the_answers_contradict_is_not_settled():
    tool = unit(0, 0, 10, 10)
    assert location.settled([frame([("left-bottom", tool)] * 9 + [("right-top", tool)], None)]) == LocationRule("image")
    assert location.settled([frame([("left-bottom", tool)] * 8 + [("right-top", tool)] * 2, None)]) is None
    assert location.settled([]) is None


@settings(deadline=None)
@given(pixel_boxes(), pixel_boxes(), st.sampled_from(RULES))
def test_the_rule_on_a_mirrored_frame_gives_the_flipped_answer(tool, organ, rule):
    reference = (0, 0, W, H) if rule.reference == "image" else organ
    if tool[0] + tool[2] != reference[0] + reference[2]:  # a tie stays right
        mirrored = [unit(W - x1, y0, W - x0, y1) for x0, y0, x1, y1 in (tool, organ)]
        plain = rule.answer(unit(*tool), unit(*organ))
        assert rule.answer(*mirrored) == location.mirrored(plain, across=True)


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is missing")
def test_the_rule_of_real_endovis18_is_exact_on_all_3727_training_instances():
    lines = {}
    for number, line in enumerate(REAL.read_text().splitlines(), 1):
        name, text = line.split("|", 1)
        record, _ = labels.parse_line(text, f"{REAL}:{number}", W, H)
        lines.setdefault(name, []).append(record)
    frames = [Frame(name, name.split("/")[0], Path("x"), W, H, tuple(records)) for name, records in lines.items()]
    assert location.fit(frames) == (LocationRule("organ", "larger_y"), 1.0, 3727)
    naive = LocationRule("image", "smaller_y")
    wrong = Counter(
        naive.answer(record.box, None) != record.answer
        for frame in frames
        for record in frame.records
        if record.kind == vocabulary.LOCATION
    )
    assert wrong[True] > 2000  # the rule one would guess is wrong more often than right
