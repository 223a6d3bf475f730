import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given
from hypothesis import settings as runs
from hypothesis import strategies as st
from labelled import LOCATION, ORGAN, STATE, TOOL
from PIL import Image

from surgery_r1_jax import augment, labellist, location, tracecheck, traces, vocabulary
from surgery_r1_jax.augment import Move
from surgery_r1_jax.location import LocationRule
from surgery_r1_jax.options import Augment
from surgery_r1_jax.records import Frame, Record

LABELS = SHARED / "data" / "endovis18" / "labels_train.txt"
RULES = [LocationRule(*choice) for choice in itertools.product(location.REFERENCES, location.TOPS)]
FLIPS = [(True, False), (False, True), (True, True)]
MOVES = dict(flip_left_right=0.5, flip_top_bottom=0.5, crop=0.7)
ALL = Augment(**MOVES, crop_least=0.5, light=0.5, colour=0.5, smoke=0.3, blood=0.3)


def word(box, organ, size, rule):
    """The location by the README's words, in whole hundredths of a pixel; shares no code with the package."""
    about = organ if rule.reference == "organ" else (0, 0, 1, 1)
    twice = [[round(100 * (edges[axis] + edges[axis + 2]) * size[axis]) for edges in (box, about)] for axis in range(2)]
    low = twice[1][0] >= twice[1][1]
    side = "right" if twice[0][0] >= twice[0][1] else "left"
    return f"{side}-{'top' if low == (rule.top == 'larger_y') else 'bottom'}"


@st.composite
def frames(draw, traced=True):
    """A frame with its organ and up to four instruments, and the rule that most of its locations follow."""
    size = draw(st.tuples(st.integers(24, 90), st.integers(24, 90)))
    rule = draw(st.sampled_from(RULES))

    def box():
        edges = [sorted(draw(st.lists(st.integers(0, side), min_size=2, max_size=2, unique=True))) for side in size]
        return tuple(edge / size[axis] for end in range(2) for axis, edge in ((0, edges[0][end]), (1, edges[1][end])))

    organ = box()
    records = [Record(vocabulary.ask(ORGAN), "kidney", organ, ORGAN, None, "")]
    for tool in draw(st.lists(st.sampled_from(vocabulary.TOOLS), min_size=1, max_size=4, unique=True)):
        here = box()
        place = word(here, organ, size, rule)
        if draw(st.integers(0, 5)) == 0:
            place = draw(st.sampled_from(vocabulary.LOCATIONS))  # a label that contradicts its box
        records.append(
            Record(vocabulary.ask(STATE, tool), draw(st.sampled_from(vocabulary.STATES)), here, STATE, tool, "")
        )
        records.append(Record(vocabulary.ask(LOCATION, tool), place, here, LOCATION, tool, ""))
        if draw(st.booleans()):
            records.append(Record(vocabulary.ask(TOOL, place), tool, here, TOOL, None, ""))
    whole = Frame("seq_2/frame000", "seq_2", Path("x.png"), *size, tuple(records), None, vocabulary.EXTENDED_CLASSES)
    return (written(whole, rule) if traced and draw(st.booleans()) else whole), rule


def written(frame, rule=RULES[0]):
    """The frame with reasoning by our own writer in front of each answer."""
    about = dict(want=2, seed="0", reference=rule.reference)
    return dataclasses.replace(
        frame,
        records=tuple(
            dataclasses.replace(record, think=traces.write(frame, record, **about), want=2) for record in frame.records
        ),
    )


def painted(frame, record):
    """A black picture with the record's box white."""
    x0, y0, x1, y1 = pixels(frame, record.box)
    picture = np.zeros((frame.height, frame.width, 3), np.uint8)
    picture[y0:y1, x0:x1] = 255
    return Image.fromarray(picture)


def pixels(frame, box):
    return tuple(round(edge * side) for edge, side in zip(box, (frame.width, frame.height) * 2, strict=True))


def shows(picture, box):
    """Whether what is white in a picture is what lies in the box, to a pixel or two."""
    bright = np.asarray(picture)[..., 1] > 127
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    if not rows.size:  # less than half a pixel of it is left
        return min((box[2] - box[0]) * picture.width, (box[3] - box[1]) * picture.height) < 2
    seen = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    true = [edge * side for edge, side in zip(box, picture.size * 2, strict=True)]
    return max(abs(a - b) for a, b in zip(seen, true, strict=True)) <= 2


@runs(deadline=None, max_examples=100)
@given(frames(), st.integers(0, 2**32 - 1), st.floats(0.3, 1), st.floats(0.05, 1))
def test_words_boxes_and_picture_agree_after_every_move(made, seed, least, visible):
    frame, rule = made
    settings = Augment(**MOVES, crop_least=least, crop_visible=visible)
    size = frame.width, frame.height
    about = frame.records[seed % len(frame.records)]
    picture = painted(frame, about)
    moved, seen = augment.apply(frame, picture, settings, np.random.default_rng(seed), rule=rule)

    assert (moved.width, moved.height) == size == seen.size
    assert dataclasses.replace(moved, records=frame.records) == frame
    assert shows(seen, moved.records[frame.records.index(about)].box)
    for old, new in zip(frame.records, moved.records, strict=True):
        x0, y0, x1, y1 = new.box
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1
        assert (new.kind, new.tool, new.source, new.want) == (old.kind, old.tool, old.source, old.want)
        assert vocabulary.question_kind(new.question)[0] == vocabulary.question_kind(old.question)[0]
        if old.kind == LOCATION:
            agreed = old.answer == word(old.box, frame.organ_box, size, rule)
            assert (new.answer == word(new.box, moved.organ_box, size, rule)) == agreed
        else:
            assert new.answer == old.answer
        if old.kind == TOOL:
            asked, answered = (vocabulary.question_kind(one.question)[1] for one in (old, new))
            agreed = asked == word(old.box, frame.organ_box, size, rule)
            assert (answered == word(new.box, moved.organ_box, size, rule)) == agreed
        if old.think:
            assert tracecheck.check(new.think, moved, new, want=2, reference=rule.reference) == "ok"


@runs(deadline=None, max_examples=40)
@given(frames(), st.sampled_from(FLIPS))
def test_mirroring_twice_restores_labels_reasoning_and_picture(made, flips):
    frame, rule = made
    move = Move((frame.width, frame.height), (0, 0, frame.width, frame.height), *flips)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (frame.height, frame.width, 3), np.uint8))
    assert move.picture(move.picture(picture)).tobytes() == picture.tobytes() != move.picture(picture).tobytes()
    if (once := move.frame(frame, rule, 0.5)) is not None:
        assert move.frame(once, rule, 0.5) == frame


@runs(deadline=None, max_examples=40)
@given(frames(), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 1, 3]))
def test_the_same_draw_makes_the_same_frame_and_the_arguments_stay(made, seed, scale):
    frame, rule = made
    size = round(frame.width * scale), round(frame.height * scale)  # the picture may come in another resolution
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (*size[::-1], 3), np.uint8))
    before = picture.tobytes()
    (first, one), (second, two) = (
        augment.apply(frame, picture, ALL, np.random.default_rng(seed), rule=rule) for _ in range(2)
    )
    assert (first, one.tobytes(), one.size, one.mode) == (second, two.tobytes(), size, "RGB")
    assert picture.tobytes() == before


@given(frames(), st.integers(0, 2**32 - 1))
@runs(deadline=None, max_examples=20)
def test_without_shares_frame_and_picture_are_given_back_untouched(made, seed):
    frame, rule = made
    picture = painted(frame, frame.records[0])
    same, seen = augment.apply(frame, picture, Augment(), np.random.default_rng(seed), rule=rule)
    assert same is frame
    assert seen is picture
    assert not Augment().on
    assert all(Augment(**{kind: 0.1}).on for kind in (*MOVES, "light", "colour", "smoke", "blood"))


def test_every_share_is_about_what_happens():
    frame = one_tool((10, 10, 20, 20))
    settings = Augment(flip_left_right=0.3, flip_top_bottom=0.2, crop=0.6, crop_visible=0.1)
    counts = np.zeros(3)
    for seed in range(400):
        _, move = drawn(frame, settings, seed)
        counts += (move.across, move.down, move.window != (0, 0, 100, 100))
    assert np.abs(counts / 400 - (0.3, 0.2, 0.6)).max() < 0.07


def boxes(text):
    """The boxes in a text about a frame of 1280 x 1024 pixels, in parts of it."""
    found = (piece.partition("]")[0].split(", ") for piece in text.split("[")[1:])
    return {tuple(float(edge) / side for edge, side in zip(edges, (1280, 1024) * 2, strict=True)) for edges in found}


def one_tool(box, organ=(0, 0, 100, 100), answer="left-bottom", **more):
    """A frame of 100 x 100 pixels with one instrument."""
    unit = [tuple(edge / 100 for edge in edges) for edges in (box, organ)]
    records = (
        Record(vocabulary.ask(ORGAN), "kidney", unit[1], ORGAN, None, ""),
        Record(vocabulary.ask(LOCATION, "suction"), answer, unit[0], LOCATION, "suction", "", **more),
    )
    return Frame("seq_2/frame000", "seq_2", Path("x.png"), 100, 100, records)


def drawn(frame, settings, seed, rule=RULES[0]):
    """The frame and the move that `apply` would draw."""
    moves = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Move, "picture", lambda move, picture: moves.append(move) or picture)
        picture = Image.new("RGB", (100, 100))
        moved, _ = augment.apply(frame, picture, settings, np.random.default_rng(seed), rule=rule)
    whole = Move((100, 100), (0, 0, 100, 100))
    return moved, moves[0] if moves else whole


def test_the_kidney_example_of_a_mirrored_frame():
    frame = one_tool((10, 60, 30, 90), answer="left-top")  # "top" is low in the picture, as in EndoVis-18
    moved, _ = drawn(frame, Augment(flip_left_right=1), 0)
    assert (moved.records[1].answer, moved.records[1].box) == ("right-top", (0.7, 0.6, 0.9, 0.9))
    moved, _ = drawn(frame, Augment(flip_left_right=1, flip_top_bottom=1), 0)
    assert (moved.records[1].answer, moved.records[1].box) == ("right-bottom", (0.7, 0.1, 0.9, 0.4))


def test_a_crop_that_would_cut_too_much_or_turn_a_word_false_is_not_made():
    settings = Augment(crop=1, crop_least=0.5, crop_visible=0.5)
    seen = {drawn(one_tool((0, 0, 12, 12)), settings, seed)[0].records[1].box for seed in range(60)}
    for x0, y0, x1, y1 in seen:
        assert (x1 - x0) * (y1 - y0) >= 0.5 * 0.12**2
    assert len(seen) > 20
    # Left of the middle of the picture by a little: most windows would put it on the right.
    frame, rule = one_tool((44, 44, 54, 54)), LocationRule("image", "larger_y")
    words = set()
    for seed in range(60):
        moved, move = drawn(frame, settings, seed, rule)
        x0, y0, x1, y1 = moved.records[1].box
        words.add((x0 + x1 < 1, y0 + y1 < 1))
        assert moved.records[1].answer == "left-bottom"
    assert words == {(True, True)}


def test_a_level_centre_has_no_mirror_image():
    frame = one_tool((40, 10, 60, 30), answer="right-bottom")  # a tie counts as right, whatever side is mirrored
    assert drawn(frame, Augment(flip_left_right=1), 0)[1].across is False
    assert drawn(frame, Augment(flip_top_bottom=1), 0)[1].down is True


def test_an_organ_without_a_box_allows_mirrors_and_no_crop():
    frame = dataclasses.replace(one_tool((10, 10, 30, 30)), records=one_tool((10, 10, 30, 30)).records[1:])
    moved, move = drawn(frame, Augment(flip_left_right=1, crop=1), 0)
    assert (move.across, move.window) == (True, (0, 0, 100, 100))
    assert moved.records[0].answer == "right-bottom"


def test_words_whose_rule_is_not_known_are_not_moved():
    frame = one_tool((10, 10, 30, 30))
    assert drawn(frame, Augment(**dict.fromkeys(MOVES, 1)), 0, rule=None)[0] is frame
    organ_only = dataclasses.replace(frame, records=frame.records[:1])
    assert drawn(organ_only, Augment(flip_left_right=1), 0, rule=None)[1].across


@pytest.mark.parametrize(
    ("question", "classes", "moves"),
    [
        ("Is the grasper open?", ("open", "closed"), True),
        ("Is the grasper open?", ("half-open", "inside"), True),  # not places, though they look alike
        ("Is the left grasper open?", ("open", "closed"), False),
        ("Is the upper jaw open?", ("open", "closed"), False),
        ("Which hand is it?", ("Left_Hand", "other"), False),  # a class that is none of the four locations
        ("Where does it point?", ("up", "elsewhere"), False),
        ("Is it at 2 o'clock?", ("open", "closed"), False),
        ("Is it in the centre?", ("open", "closed"), False),
    ],
)
def test_own_frames_that_speak_of_places_stay_as_they_are(question, classes, moves):
    record = Record(question, classes[0], (0.1, 0.1, 0.3, 0.3), vocabulary.OTHER, None, "")
    frame = Frame("a.png", "all", Path("a.png"), 100, 100, (record,), "train", classes)
    settings = Augment(flip_left_right=1, light=1)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 100, 3), np.uint8))
    moved, seen = augment.apply(frame, picture, settings, np.random.default_rng(0), rule=None)
    assert (moved is not frame) == moves
    assert seen.tobytes() != picture.tobytes()  # the light changes all the same


@pytest.mark.parametrize(
    ("think", "after"),
    [
        (None, None),
        ("", ""),
        (
            "At the LEFT bottom [10, 10, 30, 30], suction is seen. It is left-bottom.",
            "At the RIGHT bottom [70, 10, 90, 30], suction is seen. It is right-bottom.",
        ),
        ("I see smoke. Suction is at left-top.", None),  # contradicts its labels, before and after
        ("Suction, near the corner, is left-bottom.", None),
        ("Suction [12, 10, 30, 30] is left-bottom.", None),
    ],
)
def test_foreign_reasoning_is_moved_where_the_checker_takes_it(think, after):
    frame = one_tool((10, 10, 30, 30), think=think)
    moved, move = drawn(frame, Augment(flip_left_right=1), 0)
    if think and after is None:
        assert moved is frame
    else:
        assert (move.across, moved.records[1].think) == (True, after)


@pytest.fixture(scope="module")
def real():
    """Some of the real training frames with reasoning of ours, and the rule of all."""
    if not LABELS.is_file():
        pytest.skip(f"{LABELS} is not on this machine")
    found = labellist.read(LABELS)
    return [written(frame) for frame in found[::25]], location.settled(found)


def test_what_is_moved_of_real_labels_is_what_our_writer_would_write_anew(real):
    made, rule = real
    count = 0
    for frame, flips in itertools.product(made, FLIPS):
        moved = Move((1280, 1024), (0, 0, 1280, 1024), *flips).frame(frame, rule, 0.5)
        if moved is not None:
            assert written(moved) == moved
            count += len(moved.records)
    assert count > 0.95 * 3 * sum(len(frame.records) for frame in made)


def test_the_checker_takes_every_cropped_trace_of_real_labels_and_none_that_was_left_behind(real):
    made, rule = real
    cropped, refused, tried = 0, 0, 0
    for number, frame in enumerate(made):
        rng = np.random.default_rng(number)
        picture = Image.new("RGB", (40, 32))
        moved, _ = augment.apply(frame, picture, Augment(**MOVES, crop_least=0.6), rng, rule=rule)
        if moved is frame:
            continue
        cropped += 1
        for old, new in zip(frame.records, moved.records, strict=True):
            assert tracecheck.check(new.think, moved, new, want=2) == "ok"
            assert boxes(new.think) <= {each.box for each in moved.records}  # equal to the last digit
            if "[" in old.think or new.think != old.think:
                tried += 1
                refused += tracecheck.check(old.think, moved, new, want=2) != "ok"
    assert cropped > 40
    assert tried > 200
    assert refused > 0.97 * tried  # an organ over the whole frame stays where it is


def test_a_picture_that_was_not_moved_with_its_boxes_is_told():
    """The check of the property test fails where it must."""
    frame = one_tool((10, 20, 30, 35))
    whole, record = Move((100, 100), (0, 0, 100, 100)), frame.records[1]
    picture = painted(frame, record)
    for flips in FLIPS:
        move = dataclasses.replace(whole, across=flips[0], down=flips[1])
        box = move.frame(frame, RULES[0], 0.5).records[1].box
        assert shows(move.picture(picture), box)
        assert not shows(picture, box)
    window = dataclasses.replace(whole, window=(5, 5, 75, 75))
    box = window.frame(frame, RULES[0], 0.4).records[1].box
    assert shows(window.picture(picture), box)
    assert not shows(picture, box)


def test_words_that_stay_behind_stop_the_move(monkeypatch):
    frame = one_tool((10, 20, 30, 35))
    monkeypatch.setattr(location, "mirrored", lambda text, **flips: text)
    assert drawn(frame, Augment(flip_left_right=1), 0)[0] is frame


def test_our_own_phrases_tell_no_place_but_by_the_words_that_are_swapped():
    phrases = [name for name in vars(traces) if name.isupper()]
    texts = [text for name in phrases for text in _texts(vars(traces)[name])]
    assert len(texts) > 80
    for text in texts:
        assert not location.words(text.replace(augment._NO_PLACE, "")) & augment._PLACES, text


def _texts(value):
    if isinstance(value, str | int):
        return [str(value)]
    values = value.values() if isinstance(value, dict) else value
    return [text for part in values for text in _texts(part)]
