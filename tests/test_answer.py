import itertools
import json
import math
import random
import sys
import time
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_r1_jax import answer, codec, vocabulary
from surgery_r1_jax.answer import Reason, parse, render
from surgery_r1_jax.errors import InputError

ANSWER, BOX, BOTH = range(3)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SETS = (vocabulary.CLASSES, vocabulary.EXTENDED_CLASSES)
IDLE = vocabulary.CLASSES.index("Idle")
GOOD = '<answer>{"answer": "Idle", "bbox_2d": [10, 20, 110, 220]}</answer>'
UNITS = (10, 20, 110, 220)


def tagged(body, think="the reason"):
    return f"<think>{think}</think><answer>{body}</answer>"


def with_box(box):
    """A completion that is right but for its box, given as text."""
    return '<answer>{"answer": "Idle", "bbox_2d": ' + box + "}</answer>"


def made_of(text, pieces):
    """Whether text is a concatenation of pieces and single digits."""
    reached = {0}
    for start in range(len(text)):
        if start in reached:
            reached |= {start + len(piece) for piece in pieces if text.startswith(piece, start)}
    return len(text) in reached


# What is written


@settings(deadline=None, derandomize=True)
@given(
    st.sampled_from(SETS),
    st.data(),
    st.none() | st.text().filter(lambda text: not any(tag in text for tag in TAGS)),
    st.lists(st.integers(0, 9999), min_size=4, max_size=4, unique=True),
    st.integers(0, 2),
)
def test_what_is_rendered_is_read_back_as_strictly_canonical(classes, data, think, numbers, want):
    name = data.draw(st.sampled_from(classes)) if want != BOX else None
    units = (*sorted(numbers[:2]), *sorted(numbers[2:])) if want != ANSWER else None
    box = (units[0], units[2], units[1], units[3]) if units else None
    parsed = parse(render(answer=name, box=box, think=think), want=want, classes=classes)
    assert parsed.format_ok and parsed.reason is Reason.OK
    assert parsed.answer == (classes.index(name) if name else -1)
    assert parsed.box == box
    assert parsed.think == (think or "")


@pytest.mark.parametrize("think", [None, "", "Idle"])
@pytest.mark.parametrize("name", [None, "left-top"])
@pytest.mark.parametrize("box", [None, UNITS])
def test_rendered_text_is_canonical_json_made_of_the_pieces(think, name, box):
    if name is None and box is None:
        return
    text = render(answer=name, box=box, think=think)
    assert made_of(text, (*answer.PIECES, *vocabulary.CLASSES, *"0123456789"))
    wanted = {key: value for key, value in {"answer": name, "bbox_2d": box}.items() if value is not None}
    assert text.partition("<answer>")[2] == json.dumps(wanted) + "</answer>"


def test_every_piece_is_needed():
    texts = [
        render(answer=name, box=box, think=think)
        for think, name, box in itertools.product((None, "Idle"), (None, "Idle"), (None, UNITS))
        if name or box
    ]
    for piece in answer.PIECES:
        others = {*answer.PIECES, "Idle", *"0123456789"} - {piece}
        assert not all(made_of(text, others) for text in texts), piece


@pytest.mark.parametrize("tag", TAGS)
def test_reasoning_that_holds_a_tag_is_refused(tag):
    with pytest.raises(InputError, match=tag):
        render(answer="Idle", think=f"as {tag} says")


def test_nothing_to_render_is_an_error():
    with pytest.raises(ValueError):
        render()


def test_numpy_integers_render_and_floats_do_not():
    assert render(box=np.array(UNITS)) == render(box=UNITS)
    with pytest.raises(ValueError):
        render(box=(0.5, 1.0, 2.0, 3.0))


@pytest.mark.parametrize(("codec", "word"), [(codec.RESIZED_PIXELS, "pixels"), (codec.PER_MILLE, "thousandths")])
def test_the_instruction_is_short_names_the_grid_and_shows_what_render_writes(codec, word):
    text = answer.instruction(codec.units)
    assert len(text.split()) <= 60
    shown = render(answer="class", box=(1, 2, 3, 4), think="reasoning").replace("1, 2, 3, 4", "x1, y1, x2, y2")
    assert shown in text
    assert word in text


def test_prompts_differ_by_what_they_want():
    question = "Where is suction located?"
    prompts = [answer.prompt(question, want) for want in range(len(answer.WANT))]
    assert prompts[BOTH] == answer.prompt(question) == question
    assert len(set(prompts)) == 3
    assert all(text.startswith(question) for text in prompts)
    assert "answer" in prompts[ANSWER] and "box" not in prompts[ANSWER]
    assert "box" in prompts[BOX] and "answer" not in prompts[BOX]


# What is read: the table of the module, and the cases that published reward functions got wrong

BODY = '{"answer": "Idle", "bbox_2d": [10, 20, 110, 220]}'
LENIENT = {
    "list of one": f"[{BODY}]",
    "code fence": f"```json\n{BODY}\n```",
    "bare code fence": f"```{BODY}```",
    "fenced list": f"```json [ {BODY} ] ```",
    "spaces around": f"\n {BODY}\t",
    "spaces inside": '{ "answer" : "Idle" ,\n"bbox_2d" :[ 10,20 , 110,220 ] }',
    "no spaces": BODY.replace(" ", ""),
    "key order": '{"bbox_2d": [10, 20, 110, 220], "answer": "Idle"}',
    "single quotes": BODY.replace('"', "'"),
    "decimals": BODY.replace("10,", "10.0,", 1),
    "class case": BODY.replace("Idle", "idle"),
}


@pytest.mark.parametrize("body", LENIENT.values(), ids=LENIENT)
def test_clumsy_spelling_is_read_but_is_not_canonical(body):
    parsed = parse(tagged(body))
    assert (parsed.answer, parsed.box) == (IDLE, UNITS)
    assert not parsed.format_ok and parsed.reason is Reason.NOT_CANONICAL


def test_white_space_around_the_tagged_parts_is_canonical():
    assert parse(f"\n<think>two\nlines</think>\r\n {GOOD}\t\n").format_ok


# (text, answer is read, box is read, reason) for a prompt that wants both
JUDGED = {
    "canonical": (tagged(BODY), True, True, Reason.OK),
    "no reasoning": (GOOD, True, True, Reason.OK),
    "empty reasoning": (tagged(BODY, ""), True, True, Reason.OK),
    "text before": ("Sure! " + GOOD, True, True, Reason.EXTRA_TEXT),
    "text between": (f"<think>a</think> so {GOOD}", True, True, Reason.EXTRA_TEXT),
    "text after": (GOOD + " I hope this helps.", True, True, Reason.EXTRA_TEXT),
    "wide space after": (GOOD + "\u3000", True, True, Reason.EXTRA_TEXT),
    "endless text after": (GOOD + " and so on" * 500, True, True, Reason.EXTRA_TEXT),
    "a full megabyte after": (GOOD + "x" * (1 << 20), False, False, Reason.TOO_LONG),
    "nothing": ("", False, False, Reason.NO_ANSWER_TAG),
    "prose": ("The state is Idle.", False, False, Reason.NO_ANSWER_TAG),
    "reasoning only": ("<think>Idle</think>", False, False, Reason.NO_ANSWER_TAG),
    "no answer tags": (BODY, False, False, Reason.NO_ANSWER_TAG),
    "closing tag alone": (BODY + "</answer>", False, False, Reason.NO_ANSWER_TAG),
    "tags in capitals": (GOOD.upper(), False, False, Reason.NO_ANSWER_TAG),
    "cut in the reasoning": ("<think>Idle at", False, False, Reason.TRUNCATED),
    "cut in the box": (GOOD[:-16], False, False, Reason.TRUNCATED),
    "cut after the object": (GOOD[:-9], False, False, Reason.TRUNCATED),
    "cut in the last tag": (GOOD[:-1], False, False, Reason.TRUNCATED),
    "reasoning not closed": ("<think>a" + GOOD, False, False, Reason.TRUNCATED),
    "reasoning not opened": ("a</think>" + GOOD, False, False, Reason.BAD_ORDER),
    "reasoning last": (GOOD + "<think>a</think>", False, False, Reason.BAD_ORDER),
    "reasoning inside": (f"<answer><think>a</think>{BODY}</answer>", False, False, Reason.BAD_ORDER),
    "answer in the reasoning": (f"<think>a{GOOD}</think>", False, False, Reason.BAD_ORDER),
    "answer closed first": ("</answer>Idle<answer>", False, False, Reason.BAD_ORDER),
    "answer tag in the reasoning": (tagged(BODY, "in <answer> I"), False, False, Reason.TRUNCATED),
    "answer tags in the reasoning": (tagged(BODY, "<answer></answer>"), False, False, Reason.DOUBLED),
    "wrong answer, then right": (GOOD.replace("Idle", "Cutting") + GOOD, False, False, Reason.DOUBLED),
    "right answer twice": (GOOD + GOOD, False, False, Reason.DOUBLED),
    "nested answers": (f"<answer>{GOOD}</answer>", False, False, Reason.DOUBLED),
    "reasoning twice": ("<think>a</think>" + tagged(BODY), False, False, Reason.DOUBLED),
    "two objects": (tagged(f"[{BODY}, {BODY}]"), False, False, Reason.DOUBLED),
    "two objects in a row": (tagged(BODY + BODY), False, False, Reason.DOUBLED),
    "two answers": (tagged('{"answer": "Idle", "answer": "Idle"}'), False, False, Reason.DOUBLED),
    "two boxes": (
        tagged(BODY[:-1] + ', "bbox_2d": [10, 20, 110, 220]}'),
        False,
        False,
        Reason.DOUBLED,
    ),
    "answer without object": (tagged("Idle"), False, False, Reason.BAD_JSON),
    "empty answer": (tagged(""), False, False, Reason.BAD_JSON),
    "box without object": (tagged("[10, 20, 110, 220]"), False, False, Reason.BAD_JSON),
    "box of Qwen2-VL": (tagged("<|box_start|>(10,20),(110,220)<|box_end|>"), False, False, Reason.BAD_JSON),
    "empty object": (tagged("{}"), False, False, Reason.BAD_JSON),
    "object in a list in a list": (tagged(f"[[{BODY}]]"), False, False, Reason.BAD_JSON),
    "object in an object": (tagged('{"answer": ' + BODY + "}"), False, False, Reason.BAD_JSON),
    "words around the object": (tagged("It is " + BODY), False, False, Reason.BAD_JSON),
    "words after the object": (tagged(BODY + " I think"), False, False, Reason.BAD_JSON),
    "comma after the object": (tagged(BODY + ","), False, False, Reason.BAD_JSON),
    "comma after the last value": (tagged(BODY[:-1] + ",}"), False, False, Reason.BAD_JSON),
    "object not closed": (tagged(BODY[:-1]), False, False, Reason.BAD_JSON),
    "box not closed": (tagged(BODY[:-2]), False, False, Reason.BAD_JSON),
    "text not closed": (tagged('{"answer": "Idle}'), False, False, Reason.BAD_JSON),
    "quotes that differ": (tagged('{\'answer": "Idle"}'), False, False, Reason.BAD_JSON),
    "escape": (tagged('{"answer": "\\u0049dle"}'), False, False, Reason.BAD_JSON),
    "answer null": (tagged('{"answer": null}'), False, False, Reason.BAD_JSON),
    "answer a number": (tagged('{"answer": 1}'), False, False, Reason.BAD_JSON),
    "answer a list": (tagged('{"answer": ["Idle"]}'), False, False, Reason.BAD_JSON),
    "no colon": (tagged('{"answer" "Idle"}'), False, False, Reason.BAD_JSON),
    "other key": (tagged(BODY[:-1] + ', "label": "x"}'), False, False, Reason.UNKNOWN_KEY),
    "key in capitals": (tagged('{"Answer": "Idle"}'), False, False, Reason.UNKNOWN_KEY),
    "answer missing": (tagged('{"bbox_2d": [10, 20, 110, 220]}'), False, True, Reason.MISSING_ANSWER),
    "box missing": (tagged('{"answer": "Idle"}'), True, False, Reason.MISSING_BOX),
    "no class": (GOOD.replace("Idle", "liver"), False, True, Reason.UNKNOWN_CLASS),
    "empty class": (GOOD.replace("Idle", ""), False, True, Reason.UNKNOWN_CLASS),
    "one letter off": (GOOD.replace("Idle", "Idel"), False, True, Reason.UNKNOWN_CLASS),
    "class in a sentence": (GOOD.replace("Idle", "It is Idle"), False, True, Reason.UNKNOWN_CLASS),
    "several classes": (GOOD.replace("Idle", "Idle or Cutting"), False, True, Reason.UNKNOWN_CLASS),
    "a tool where states are asked": (GOOD.replace("Idle", "stapler"), False, True, Reason.UNKNOWN_CLASS),
    "corners reversed": (with_box("[110, 220, 10, 20]"), True, False, Reason.INVERTED_BOX),
    "coordinate below zero": (with_box("[-3, 20, 110, 220]"), True, False, Reason.BAD_BOX),
    "coordinate of 400 digits": (with_box(f"[10, 20, 110, {'9' * 400}]"), True, False, Reason.BAD_BOX),
    "box beyond any image": (GOOD.replace("220", "9000"), True, True, Reason.OK),
}


@pytest.mark.parametrize("case", JUDGED.values(), ids=JUDGED)
def test_each_way_to_miss_the_grammar_has_its_verdict(case):
    text, has_answer, has_box, reason = case
    parsed = parse(text)
    assert parsed.reason is reason
    assert parsed.format_ok == (reason is Reason.OK)
    assert parsed.answer == (IDLE if has_answer else -1)
    assert (parsed.box is not None) == has_box


@pytest.mark.parametrize("text", [GOOD, tagged(BODY), "", GOOD[:-5]])
def test_a_completion_stopped_by_the_token_limit_gives_nothing(text):
    parsed = parse(text, truncated=True)
    assert (parsed.answer, parsed.box, parsed.reason) == (-1, None, Reason.TRUNCATED)


def test_only_what_the_prompt_wanted_is_read():
    answer_only, box_only = render(answer="Idle"), render(box=UNITS)
    assert parse(answer_only, want=ANSWER).format_ok and parse(box_only, want=BOX).format_ok
    for want, expected in ((ANSWER, (IDLE, None)), (BOX, (-1, UNITS))):
        parsed = parse(GOOD, want=want)
        assert (parsed.answer, parsed.box) == expected
        assert parsed.reason is Reason.UNWANTED_KEY and not parsed.format_ok
    assert parse(box_only, want=ANSWER).reason is Reason.MISSING_ANSWER
    assert parse(answer_only, want=BOX).reason is Reason.MISSING_BOX


def test_every_reason_is_reached():
    reached = {case[-1] for case in JUDGED.values()} | {Reason.NOT_CANONICAL, Reason.UNWANTED_KEY}
    assert reached == set(Reason)


MALFORMED = [
    *("[nan, 20, 110, 220]", "[NaN, 20, 110, 220]", "[10, 20, inf, 220]", "[10, 20, 110, Infinity]"),
    *("[-Infinity, 20, 110, 220]", "[10, 20, 1e308, 220]", "[10, 20, 1e3, 220]", "[10, 20, 1E3, 220]"),
    *("[-0, 20, 110, 220]", "[-0.0, 20, 110, 220]", "[-1, 20, 110, 220]", "[+10, 20, 110, 220]"),
    *("[110, 20, 10, 220]", "[10, 220, 110, 20]", "[110, 220, 10, 20]", "[10, 20, 10, 220]"),
    *("[10, 20, 110, 20]", "[10, 20, 10, 20]", "[0, 0, 0, 0]", "[10, 20, 110]", "[10, 20, 110, 220, 5]"),
    *("[]", "[10]", "[,,,]", "[10, 20, 110, 220,]", "[10 20 110 220]", "[10; 20; 110; 220]"),
    *("[true, 20, 110, 220]", "[false, 20, 110, 220]", "[null, 20, 110, 220]", '"10, 20, 110, 220"'),
    *('["10", "20", "110", "220"]', '[10, 20, 110, "220"]', "[[10, 20, 110, 220]]", "[[10, 20], [110, 220]]"),
    *("[10, [20, 110], 220]", '{"x1": 10, "y1": 20, "x2": 110, "y2": 220}', "null", "true", "10", "{}"),
    *("[\uff11\uff10, 20, 110, 220]", "[\u0661\u0660, 20, 110, 220]", "[1_0, 20, 110, 220]", "[\u00b2, 1, 2, 3]"),
    *("[0x0a, 20, 110, 220]", "[010, 20, 110, 220]", "[00, 20, 110, 220]", "[10., 20, 110, 220]"),
    *("[.5, 20, 110, 220]", "[1.0.0, 20, 110, 220]", "[1 0, 20, 110, 220]", "[10/1, 20, 110, 220]"),
    *("[10%, 20, 110, 220]", "[10px, 20, 110, 220]", "[10,\u00a020, 110, 220]", "[10\u200b, 20, 110, 220]"),
    *("[10, 20, 110, 2200000000000]", "[10, 20, 110, 220.0000000000001]", "(10, 20, 110, 220)"),
    *("[10, 20], [110, 220]", "[10, 20, 110, 220][10, 20, 110, 220]", "[10, 20, 110, 220"),
    "[" + "10, 20, 110, 220, " * 1000 + "10, 20, 110, 220]",
    '[10, 20, 110, 220], "bbox_2d": ' * 1000 + "[10, 20, 110, 220]",
    "[" * 1000 + "10, 20, 110, 220" + "]" * 1000,
    f"[10, 20, 110, {'2' * 4301}]",
]


@pytest.mark.parametrize("box", MALFORMED, ids=lambda box: ascii(box[:40]))
def test_a_malformed_box_is_no_box(box):
    for want in (BOX, BOTH):
        parsed = parse(with_box(box), want=want)
        assert parsed.box is None and not parsed.format_ok
    assert parse(with_box("[10, 20, 110, 220]")).format_ok  # the frame of the test is sound


# Names


CYRILLIC = dict(
    zip(
        "aceiopsxyABCEHIKMOPSTX",
        "\u0430\u0441\u0435\u0456\u043e\u0440\u0455\u0445\u0443\u0410"
        "\u0412\u0421\u0415\u041d\u0406\u041a\u041c\u041e\u0420\u0405\u0422\u0425",
        strict=True,
    )
)
LOOKALIKE = {"K": "\u212a", "k": "\u212a", "s": "\u017f", "S": "\u017f", "i": "\u0131", "I": "\u0130", "l": "\u2113"}
INVISIBLE = "\u00ad\u034f\u061c\u180e\u200b\u200c\u200d\u200e\u2060\u202e\u2066\ufe0f\ufeff\x00\x1f\x7f"


def confusable_names():
    """Names that look like, sound like or normalise to a class, and are not it."""
    for name in vocabulary.EXTENDED_CLASSES:
        yield "".join(chr(ord(char) + 0xFEE0) for char in name)  # full-width
        for place, char in enumerate(name):
            swaps = [chr(ord(char) + 0xFEE0), CYRILLIC.get(char), LOOKALIKE.get(char), char + "\u0301"]
            swaps += [char + sign for sign in INVISIBLE[place % 3 :: 3]]
            yield from (name[:place] + swap + name[place + 1 :] for swap in swaps if swap)
        yield from (name + sign for sign in INVISIBLE)
        yield from (f"{name}\u00a0", f"\u2003{name}", f"{name}.", f"not {name}", f"{name} {name}", name * 2)
        yield from (name[:-1], name[1:], f"{name}s", f"'{name}'", f"<{name}>", f"{name}|", f"{name}\udcff")
    for name in ("ldle", "1dle", "|dle", "Idie", "IdIe", "Cuttlng", "Retractlon", "Cl1pping", "kidney5", "k1dney"):
        yield name
    yield from ("left_top_", "top-left", "left", "top", "lefttop", "left--top", "Tissue__Manipulation", "tool", "")


def test_no_confusable_name_is_accepted():
    names = sorted(set(confusable_names()) - {"staple"})  # a letter short of stapler, and a class
    assert len(names) >= 500
    normalised = {unicodedata.normalize("NFKC", name) for name in names}
    assert len(normalised & set(vocabulary.EXTENDED_CLASSES)) >= 20  # NFKC would have let some through
    for classes, name in itertools.product(SETS, names):
        text = GOOD.replace("Idle", name)
        assert parse(text, classes=classes).answer == -1, ascii(name)
        if not name.isascii() and not any(char.isspace() for char in name):
            found = parse(tagged("", think=f"It is {name} now"), classes=classes).think_answers
            assert set(found) == {-1}, ascii(name)


@pytest.mark.parametrize("classes", SETS, ids=len)
def test_every_class_is_accepted_as_listed(classes):
    for index, name in enumerate(classes):
        parsed = parse(GOOD.replace("Idle", name), classes=classes)
        assert parsed.format_ok and parsed.answer == index
        parsed = parse(tagged("", think=f"({name}), then."), classes=classes)
        assert parsed.think_answers[vocabulary.class_kind(index)] == index


# The reasoning


def test_the_last_class_of_each_kind_in_the_reasoning_counts():
    think = "Cutting? No, the suction at left-top of the kidney's edge is Idle; not Retractions, at right-bottom."
    names = vocabulary.EXTENDED_CLASSES
    found = parse(tagged(BODY, think), classes=names).think_answers
    assert [names[index] for index in found[:4]] == ["kidney", "Idle", "right-bottom", "suction"]
    found = parse(tagged(BODY, think)).think_answers  # of 18 classes none is a tool, and `suction` no state
    assert [names[index] for index in found[:3]] == ["kidney", "Idle", "right-bottom"]
    assert found[3] == -1
    own = parse(tagged(BODY, "The jaw is half-open, the organ kidney."), classes=("open", "half-open", "kidney"))
    assert own.think_answers == (2, -1, -1, -1, 1)


def test_classes_inside_longer_words_do_not_count():
    think = "Idles _Idle Idle_ xIdle Idle-Cutting left-top-left kidneys \u00e9Idle Idle\u0301 Id\u200ble idle"
    assert set(parse(tagged(BODY, think)).think_answers) == {-1}


def test_the_first_four_sound_boxes_of_the_reasoning_count():
    think = "at [1, 2, 3] [5, 6, 1, 9] [[1,2,3,4] [ 2.5 ,3,4,5] [nan, 1, 2, 3] [3,4,5,6][4,5,6,7] [5,6,7,8] [6,7,8,9"
    boxes = parse(tagged(BODY, think)).think_boxes
    assert boxes == ((1, 2, 3, 4), (2.5, 3, 4, 5), (3, 4, 5, 6), (4, 5, 6, 7))


def test_reasoning_is_kept_when_only_the_object_is_bad():
    parsed = parse(tagged("?", "is Idle [1, 2, 3, 4]"))
    assert parsed.reason is Reason.BAD_JSON and parsed.think == "is Idle [1, 2, 3, 4]"
    assert parsed.think_answers[vocabulary.STATE] == IDLE and parsed.think_boxes == ((1, 2, 3, 4),)


# Any text at all

NOISE = (
    *TAGS,
    *('{"answer": "', '", "bbox_2d": [', "]}", "{", "}", "[", "]", '"', "'", ",", ", ", ":", "```", "```json\n"),
    *("Idle", "kidney", "left-top", "suction", "liver", "answer", "bbox_2d", "10", "0", "-1", "1e9", "nan", "."),
    *(" ", "\n", "\t", "\\", "\\u0041", "[10, 20, 110, 220]", BODY, GOOD, "\u200b", "\uff11", "\udcff", "\U0001f600"),
    *("<|im_end|>", "<|vision_start|><|image_pad|><|vision_end|>", "\x00", "null", "__import__('os')"),
)


def random_render(rng):
    """What a well-trained model writes, and what it was asked."""
    want, low = rng.randrange(3), (rng.randrange(900), rng.randrange(900))
    box = (*low, low[0] + rng.randrange(1, 400), low[1] + rng.randrange(1, 400))
    name = rng.choice(vocabulary.CLASSES)
    think = f"The suction at {rng.choice(vocabulary.LOCATIONS)} {list(box)} is {name}."
    parts = ({"answer": name}, {"box": box}, {"answer": name, "box": box})[want]
    return render(**parts, think=think if rng.random() < 0.7 else None), want


def grammar_built(rng):
    """A text by the rules of the lenient grammar, each broken now and then."""
    pick, odd = rng.choice, rng.random

    def or_noise(text):
        return text if odd() < 0.985 else pick(NOISE)

    space, quote = pick(("", "", "", " ", "\n")), pick('"""\'')
    low, high = (rng.randrange(700), rng.uniform(0, 700)), (rng.randrange(400, 1300), rng.randrange(400, 1300))
    numbers = [or_noise(f"{number:.{pick((0, 0, 0, 0, 1))}f}") for number in (*low, *high)]
    numbers = numbers if odd() < 0.95 else numbers * rng.randrange(3)
    fields = [
        f"{quote}answer{quote}: {space}" + or_noise(quote + pick(vocabulary.CLASSES) + quote),
        f"{quote}bbox_2d{quote}: [{space}{or_noise(', ').join(numbers)}{space}]",
    ]
    fields = pick((fields, fields, fields, fields[::-1], fields[:1], fields[1:], fields + fields[1:]))
    body = or_noise("{") + or_noise(", ").join(fields) + or_noise("}")
    body = pick((body, body, body, body, body, f"[{body}]", f"```json\n{body}\n```", f"[{body}, {body}]"))
    think = "" if odd() < 0.4 else f"<think>{' '.join(rng.choices(NOISE[4:-10], k=4))}</think>"
    parts = (space, think, space, "<answer>", body, "</answer>", space)
    return "".join(map(or_noise, parts)), pick((ANSWER, BOX, BOTH, BOTH, BOTH))


def mutated(rng):
    """A good completion after one to three accidents."""
    text, want = random_render(rng)
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.randrange(1, 12))
        new = rng.choice(
            ("", "", rng.choice(NOISE), text[start:end] * 2, text[start:end].upper(), chr(rng.randrange(0xD800)))
        )
        text = text[:start] + new + text[rng.choice((start, end)) :]
    return text, want


def soup(rng):
    """Bytes or grammar pieces in no order."""
    if rng.random() < 0.5:
        text = rng.randbytes(rng.randrange(200)).decode(rng.choice(("latin-1", "utf-8")), "surrogateescape")
    else:
        text = "".join(rng.choices(NOISE, k=rng.randrange(12)))
    return text, rng.randrange(3)


TAG_REASONS = (Reason.TOO_LONG, Reason.TRUNCATED, Reason.DOUBLED, Reason.NO_ANSWER_TAG, Reason.BAD_ORDER)
KIND_INDICES = [[i for i in range(26) if vocabulary.class_kind(i) == kind] for kind in range(len(vocabulary.KINDS))]


def sound(box):
    return (
        len(box) == 4 and all(map(math.isfinite, box)) and 0 <= box[0] < box[2] < 1e12 and 0 <= box[1] < box[3] < 1e12
    )


def test_a_hundred_thousand_texts_never_break_the_reader():
    rng = random.Random(20250624)
    makers = itertools.cycle((grammar_built, mutated, soup))
    reasons = Counter()
    boxes = 0
    for make in itertools.islice(makers, 100_000):
        text, want = make(rng)
        classes = SETS[len(text) % 2]
        parsed = parse(text, want=want, classes=classes)
        assert parsed == parse(text, want=want, classes=classes)
        assert -1 <= parsed.answer < len(classes)
        assert all(map(sound, (*parsed.think_boxes, parsed.box or (0, 0, 1, 1))))
        assert all(i in (-1, *kind) for i, kind in zip(parsed.think_answers, KIND_INDICES, strict=True))
        assert parsed.format_ok == (parsed.reason is Reason.OK)
        if parsed.format_ok:
            assert (parsed.answer >= 0, parsed.box is not None) == (want != BOX, want != ANSWER)
        reasons[parsed.reason] += 1
        boxes += parsed.box is not None or parsed.reason in (Reason.BAD_BOX, Reason.INVERTED_BOX)
    # Random text alone would prove little: enough of it must get past the tags, and as far as the box.
    assert sum(count for reason, count in reasons.items() if reason not in TAG_REASONS) >= 30_000
    assert boxes >= 10_000
    assert set(reasons) >= set(Reason) - {Reason.TOO_LONG}


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def gains(parsed, gold, gold_box):
    """Everything a reward could pay for."""
    return (
        parsed.format_ok,
        parsed.answer == gold,
        iou(parsed.box, gold_box) if parsed.box else 0.0,
        parsed.think_answers[vocabulary.class_kind(gold)] == gold,
        max((iou(box, gold_box) for box in parsed.think_boxes), default=0.0),
    )


def test_adding_boxes_tags_or_text_after_an_answer_never_pays():
    rng = random.Random(7)
    for _ in range(10_000):
        text, want = random_render(rng)
        parsed = parse(text, want=want)
        assert parsed.format_ok
        gold = parsed.answer if rng.random() < 0.7 and parsed.answer >= 0 else rng.randrange(18)
        gold_box = (100, 100, 400, 300)
        name, place = vocabulary.CLASSES[gold], list(gold_box)
        right = render(answer=name, box=gold_box, think=f"{name} {place}")
        extras = (*NOISE, right, right[:-3], name, str(place), f'"bbox_2d": {place}', f'"answer": "{name}"')
        extra = "".join(rng.choices(extras, k=rng.randrange(1, 5)))
        end = text.index("</answer>")
        at = rng.choice((len(text), end, end - 1))  # after the answer, after the object, still in the object
        more = parse(text[:at] + extra + text[at:], want=want)
        before, after = gains(parsed, gold, gold_box), gains(more, gold, gold_box)
        assert all(a <= b for a, b in zip(after, before, strict=True)), (text, extra, at)


# Cost

FAMILIES = {
    "tag pairs": lambda n: "<think></think><answer>" * n,
    "answer tags": lambda n: "<answer>" * n,
    "closing tags": lambda n: "<think>" + "</answer>" * n,
    "half tags": lambda n: "<answer" * n,
    "signs": lambda n: "<" * n,
    "boxes in braces": lambda n: tagged("{[1,2,3,4]}" * n),
    "objects": lambda n: tagged(BODY * n),
    "list of objects": lambda n: tagged("[" + ",".join([BODY] * n) + "]"),
    "brackets": lambda n: tagged("[" * n + "]" * n),
    "braces": lambda n: tagged("{" * n),
    "fences": lambda n: tagged("```json" * n + "```"),
    "quotes": lambda n: tagged("{" + '"' * n),
    "one key": lambda n: tagged('{"' + "a" * n + '": 1}'),
    "one class": lambda n: tagged('{"answer": "' + "left top " * n + '", "bbox_2d": [1, 2, 3, 4]}'),
    "repeated key": lambda n: tagged("{" + '"answer": "Idle", ' * n + "}"),
    "spaces": lambda n: tagged(" " * n + BODY.replace(" ", " " * n) + "\n" * n),
    "commas": lambda n: tagged('{"bbox_2d": [' + "," * n + "]}"),
    "one number": lambda n: tagged('{"bbox_2d": [1, 2, 3, ' + "4" * n + "]}"),
    "space in a box": lambda n: tagged('{"bbox_2d": [1, 2, 3, ' + " " * n + "4]}"),
    "text after": lambda n: GOOD + "text " * n,
    "boxes in the reasoning": lambda n: tagged(BODY, "[1, 2, 3, 4]" * n),
    "open boxes in the reasoning": lambda n: tagged(BODY, "[1,2," * n),
    "brackets in the reasoning": lambda n: tagged(BODY, "[" * n + "]" * n),
    "commas in the reasoning": lambda n: tagged(BODY, "[" + "," * n + "]"),
    "classes in the reasoning": lambda n: tagged(BODY, "left-top " * n),
    "one word in the reasoning": lambda n: tagged(BODY, "left-top" * n),
    "foreign letters": lambda n: tagged(BODY, "\u0436" * n),
}


def cost(text):
    """Processor seconds of one reading, the least of several batches."""
    repeats = max(1, 100_000 // len(text))
    best = math.inf
    for _ in range(3):
        start = time.process_time_ns()
        for _ in range(repeats):
            parse(text)
        best = min(best, (time.process_time_ns() - start) / repeats)
    return best / 1e9


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_reading_time_is_linear_in_the_length(family, monkeypatch):
    monkeypatch.setattr(answer, "MAX_CHARS", 1 << 30)
    unit = (len(family(200)) - len(family(100))) / 100
    texts = [family(math.ceil(1024 * 2**k / unit)) for k in range(9)]  # about 1 kB to 256 kB
    exponent = np.polyfit([math.log(len(text)) for text in texts], [math.log(cost(text)) for text in texts], 1)[0]
    assert exponent <= 1.3


def test_texts_up_to_the_cap_are_read():
    longest = GOOD.ljust(answer.MAX_CHARS)
    assert parse(longest).format_ok
    assert parse(longest + " ").reason is Reason.TOO_LONG


def test_the_longest_texts_are_read_in_milliseconds():
    for name, family in FAMILIES.items():
        unit = (len(family(200)) - len(family(100))) / 100
        text = family(int((answer.MAX_CHARS - 200) / unit))
        assert answer.MAX_CHARS * 0.9 < len(text) <= answer.MAX_CHARS
        assert cost(text) < 0.01, name


# Safety

events = []


def watch(event, _):
    if watch.on:
        events.append(event)


watch.on = False

PAYLOADS = (
    *("__import__('os').system('true')", "open('/tmp/x', 'w')", "eval('1')", "exec('x=1')", "lambda: 0"),
    *("().__class__.__bases__[0].__subclasses__()", "9**9**9**9", "${jndi:ldap://x}", "{{7*7}}", "%s%n", "!!python"),
)


def test_reading_touches_nothing_but_the_text():
    sys.addaudithook(watch)
    texts = [
        make.replace("?", payload) for payload in PAYLOADS for make in (tagged("?"), with_box("[?, 1, 2, 3]"), "?")
    ]
    parse(GOOD)
    watch.on = True
    results = [parse(text) for text in texts]
    watch.on = False
    assert not events
    assert all((parsed.answer, parsed.box) in ((-1, None), (IDLE, None)) for parsed in results)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("The kidney [1, 2, 3, 4].", "The kidney [10, 20, 30, 40]."),
        ("[1,2,3,4][5, 6, 7, 8.25]", "[10, 20, 30, 40][50, 60, 70, 82.5]"),
        (
            "none [1, 2, 3] [4, 3, 2, 1] [[1, 2, 3, 4]] [1, 2, 3, 4",
            "none [1, 2, 3] [4, 3, 2, 1] [[10, 20, 30, 40]] [1, 2, 3, 4",
        ),
        ("", ""),
    ],
)
def test_every_box_in_a_text_can_be_changed_and_nothing_else(text, changed):
    assert answer.map_boxes(text, lambda box: [10 * edge for edge in box]) == changed
