import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_r1_jax import vocabulary
from surgery_r1_jax.vocabulary import CLASSES, EXTENDED_CLASSES, LOCATION, ORGAN, STATE, TOOL, TOOLS

# Typed from the official loaders once more, as one text.
OFFICIAL = """kidney Idle Grasping Retraction Tissue_Manipulation Tool_Manipulation Cutting Cauterization Suction
Looping Suturing Clipping Staple Ultrasound_Sensing left-top right-top left-bottom right-bottom bipolar_forceps
monopolar_curved_scissors prograsp_forceps large_needle_driver ultrasound_probe clip_applier suction stapler"""


def test_classes_are_the_official_ones_in_their_order():
    assert tuple(OFFICIAL.split()) == EXTENDED_CLASSES
    assert tuple(OFFICIAL.split()[:18]) == CLASSES
    assert (CLASSES[8], EXTENDED_CLASSES[24]) == ("Suction", "suction")


def test_class_kinds_follow_the_sizes_of_the_groups():
    kinds = [vocabulary.class_kind(index) for index in range(26)]
    assert kinds == [ORGAN] + 13 * [STATE] + 4 * [LOCATION] + 8 * [TOOL]
    assert vocabulary.class_kind(-1) == -1


@pytest.mark.parametrize("classes", [CLASSES, EXTENDED_CLASSES, list(CLASSES)])
def test_every_class_name_finds_itself(classes):
    assert [vocabulary.class_index(name, classes) for name in classes] == list(range(len(classes)))


@settings(deadline=None)
@given(st.sampled_from(range(18)), st.data())
def test_separators_and_case_do_not_matter_in_the_18_classes(index, data):
    text = "".join(
        data.draw(st.sampled_from("_- ")) if char in "_-" else data.draw(st.sampled_from([char, char.swapcase()]))
        for char in CLASSES[index]
    )
    assert vocabulary.class_index(f"  {text} ") == index


def test_suction_keeps_its_case_only_where_both_meanings_exist():
    assert vocabulary.class_index("suction") == vocabulary.class_index("SUCTION") == 8
    assert vocabulary.class_index("Suction", EXTENDED_CLASSES) == 8
    assert vocabulary.class_index("suction", EXTENDED_CLASSES) == 24
    assert vocabulary.class_index("SUCTION", EXTENDED_CLASSES) == -1
    assert vocabulary.class_index("STAPLER", EXTENDED_CLASSES) == 25


@pytest.mark.parametrize(
    "text",
    [
        "",
        "kidneys",
        "left",
        "left--top",
        "\u212aidney",
        "ki\u200bdney",
        "Id\u0131e",
        "\uff49\uff44\uff4c\uff45",
        "Idle\n",
        "Sta\u017fle",
    ],
)
def test_other_text_and_look_alikes_name_no_class(text):
    assert vocabulary.class_index(text) == -1


TOPICS = [(ORGAN, None), *itertools.product((STATE, LOCATION), TOOLS)]


def test_official_questions_are_spelled_as_published():
    assert [vocabulary.ask(*topic) for topic in TOPICS[:2]] == [
        "What organ is being operated?",
        "What is the state of bipolar_forceps?",
    ]
    assert vocabulary.ask(LOCATION, "suction") == "Where is suction located?"
    assert vocabulary.ask(TOOL, "left-bottom") == "What is the tool in the left bottom?"


@pytest.mark.parametrize("topic", [*TOPICS, *((TOOL, place) for place in vocabulary.LOCATIONS)])
def test_questions_are_read_back_also_with_spaces_and_in_any_case(topic):
    question = vocabulary.ask(*topic)
    for spelling in (question, question.replace("_", " "), question.upper(), f" {question.lower()} "):
        assert vocabulary.question_kind(spelling) == topic


@pytest.mark.parametrize(
    "question",
    ["", "?", "What organ is being operated", "What is the state of hook?", "Where is kidney located?",
     "Where is suction located??", "Where  is suction located?", "What \u00f6rgan is being operated?"],
)  # fmt: skip
def test_other_questions_are_unknown(question):
    assert vocabulary.question_kind(question) == (-1, None)
