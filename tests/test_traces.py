import random
from collections import Counter

import pytest
import trace_mutations as lies
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import ELSEWHERE, HERE, LOCATION, ORGAN, STATE, THERE, TOOL, frame, record

from surgery_r1_jax import answer, labellist, tracecheck, traces, vocabulary

LABELS = SHARED / "data" / "endovis18" / "labels_train.txt"


KIDNEY = record(ORGAN, "kidney", box=ELSEWHERE)
IDLE = record(STATE, "Idle", "bipolar_forceps")
LEFT = record(LOCATION, "left-top", "bipolar_forceps")
CUTTING = record(STATE, "Cutting", "monopolar_curved_scissors", THERE)
RIGHT = record(LOCATION, "right-bottom", "monopolar_curved_scissors", THERE)


@pytest.fixture(scope="module")
def real_traces():
    """Every reasoned record of some of the real training frames: (frame, record, want, text)."""
    if not LABELS.is_file():
        pytest.skip(f"{LABELS} is not on this machine")
    frames = labellist.read(LABELS)
    assert sum(len(one.records) for one in frames) == 9014
    return [
        (one, each, want, traces.write(one, each, want=want, seed=f"0/{one.id}/{index}/{want}"))
        for one in frames[::40]
        for index, each in enumerate(one.records)
        for want in range(3)
    ]


def test_every_real_trace_is_borne_out_by_its_labels(real_traces):
    assert len(real_traces) > 600
    for one, each, want, text in real_traces:
        assert tracecheck.check(text, one, each, want=want) == "ok", text


@pytest.mark.parametrize("what", ["instrument", "state", "location", "box"])
def test_every_lie_in_a_real_trace_is_found(real_traces, what):
    rng, tried = random.Random(what), 0
    for one, each, want, text in real_traces[::2]:
        if lie := lies.mutate(text, what, rng):
            tried += 1
            assert tracecheck.check(lie, one, each, want=want) != "ok", lie
    assert tried > 250


def test_the_phrasings_are_many_and_none_prevails(real_traces):
    found = Counter()
    for *_, text in real_traces:
        found.update({lies.skeleton(sentence) for sentence in lies.sentences(text)})
    assert len(found) >= 30
    assert found.most_common(1)[0][1] <= 0.1 * len(real_traces)
    whole = Counter(lies.skeleton(text) for *_, text in real_traces)
    assert whole.most_common(1)[0][1] <= 0.01 * len(real_traces)
    lengths = sorted(len(text) for *_, text in real_traces)
    assert lengths[len(lengths) * 9 // 10] >= 1.5 * lengths[len(lengths) // 10]


def test_the_reader_of_completions_finds_answer_and_box_in_a_trace(real_traces):
    for _, each, want, text in real_traces[:300]:
        said = answer.parse(answer.render(answer=each.answer, think=text), want=0)
        assert said.format_ok
        assert want == 1 or vocabulary.CLASSES[said.think_answers[each.kind]] == each.answer
        own = tuple(edge * side for edge, side in zip(each.box, (1280, 1024) * 2, strict=True))
        assert want == 0 or any(box == pytest.approx(own) for box in said.think_boxes)


def test_the_same_seed_writes_the_same_text_and_another_another():
    whole = frame(KIDNEY, IDLE, CUTTING, LEFT, RIGHT)
    texts = [traces.write(whole, IDLE, want=2, seed=seed) for seed in "aab"]
    assert texts[0] == texts[1] != texts[2]


def test_instruments_of_one_name_are_told_apart_by_their_boxes():
    right = record(LOCATION, "right-bottom", "bipolar_forceps", THERE)
    busy = record(STATE, "Cutting", "bipolar_forceps", THERE)
    one, other = traces.instruments(frame(right, IDLE, busy, LEFT))
    assert (one.state, one.place, one.box) == ("Cutting", "right-bottom", THERE)
    assert (other.state, other.place, other.box) == ("Idle", "left-top", HERE)


def test_a_single_label_counts_wherever_its_box_is():
    busy = record(STATE, "Cutting", "bipolar_forceps", THERE)  # a state's box may hold the tissue as well
    (one,) = traces.instruments(frame(busy, LEFT))
    assert (one.state, one.place, one.box) == ("Cutting", "left-top", HERE)


def test_the_organ_is_no_reference_where_locations_are_relative_to_the_image():
    whole = frame(KIDNEY, IDLE, CUTTING, LEFT, RIGHT)
    for seed in range(50):
        text = traces.write(whole, LEFT, want=2, seed=str(seed), reference="image")
        assert "left-top of" not in text
        assert tracecheck.check(text, whole, LEFT, want=2, reference="image") == "ok"


def test_boxes_that_are_not_on_pixels_are_written_with_decimals():
    whole = frame(record(STATE, "Idle", "stapler", (0.1, 0.2, 1 / 3, 0.5)), record(LOCATION, "left-top", "stapler"))
    text = traces.write(whole, whole.records[0], want=1, seed="0")
    assert "[128, 204.8, 426.67, 512]" in text
    assert tracecheck.check(text, whole, whole.records[0], want=1) == "ok"


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


@settings(deadline=None, derandomize=True, max_examples=40)
@given(records, st.integers(0, 2), st.integers(0, 99))
def test_a_trace_of_any_labels_says_only_what_they_hold(records, want, seed):
    whole = frame(*records)
    told = {other.answer for other in records} | {other.tool for other in records}
    told |= {vocabulary.question_kind(other.question)[1] for other in records}
    for one in records:
        text = traces.write(whole, one, want=want, seed=str(seed))
        words = text.translate(dict.fromkeys(map(ord, ",.;:()[]"), " ")).split()
        assert not set(words) & (set(vocabulary.EXTENDED_CLASSES) - told), text
        if len({(other.tool, other.kind, other.question) for other in records}) == len(records):
            assert tracecheck.check(text, whole, one, want=want) == "ok", text
