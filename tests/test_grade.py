"""grade.py: the text of every lane is read once and lands beside the gold of its question."""

import numpy as np

from surgery_r1_jax import answer, grade, vocabulary
from surgery_r1_jax.batch import ANSWER, BOTH, BOX, padding_gold, stack

WIDTH, HEIGHT = 80, 40  # of the image as the model sees it


def gold_of(*questions, organ=None):
    """Gold of a frame with questions (class, box, wanted), and room for one more."""
    gold = padding_gold(len(questions) + 1)
    for q, (name, box, want) in enumerate(questions):
        gold.answer_BQ[q] = vocabulary.class_index(name)
        gold.kind_BQ[q] = vocabulary.class_kind(gold.answer_BQ[q])
        gold.box_BQ4[q], gold.want_BQ[q], gold.valid_BQ[q] = box, want, True
    gold.resized_B2[:] = WIDTH, HEIGHT
    return gold._replace(
        frame_B=np.int32(0), organ_ok_B=np.bool_(organ is not None), organ_box_B4=np.float32(organ or [0] * 4)
    )


def graded(encoder, texts, gold, samples=1, stopped=True):
    """Grade texts [B][J]; None is an empty lane."""
    tokens = np.full((len(texts), len(texts[0]), 120), encoder.chat.pad_id)
    for b, lanes in enumerate(texts):
        for j, text in enumerate(lanes):
            ids = encoder.chat.completion_ids(text) if text else []
            tokens[b, j, : len(ids)] = ids
    return grade.grade(tokens, np.broadcast_to(stopped, tokens.shape[:2]), gold, encoder, samples)


IDLE, LEFT = ("Idle", (0.1, 0.1, 0.5, 0.5), BOTH), ("left-top", (0.2, 0.2, 0.4, 0.4), BOTH)


def test_samples_of_a_question_stand_beside_its_gold(encoder):
    names = [["Idle", "Cutting", "left-top", "right-top"], ["Suction", "Idle", "left-top", "left-top"]]
    texts = [[answer.render(answer=name, box=(8, 4, 40, 20)) for name in lanes] + [None] * 2 for lanes in names]
    gold = stack([gold_of(IDLE, LEFT, organ=(0, 0, 1, 1)), gold_of(IDLE, LEFT)])
    found = graded(encoder, texts, gold, samples=2)
    judged = found.judged
    index = vocabulary.class_index
    assert judged.answer[:, :4].tolist() == [[index(name) for name in lanes] for lanes in names]
    assert judged.gold_answer[:, :4].tolist() == [[index("Idle")] * 2 + [index("left-top")] * 2] * 2
    assert judged.kind[:, :4].tolist() == [[vocabulary.STATE] * 2 + [vocabulary.LOCATION] * 2] * 2
    np.testing.assert_array_equal(judged.gold_box[0, 2], np.float32(LEFT[1]))
    np.testing.assert_allclose(judged.box[:, :4], np.broadcast_to((0.1, 0.1, 0.5, 0.5), (2, 4, 4)), atol=1e-7)
    assert judged.valid.tolist() == [[True] * 4 + [False] * 2] * 2
    assert judged.organ_ok.tolist() == [[True] * 6, [False] * 6] and judged.organ_box[0, 5].tolist() == [0, 0, 1, 1]
    assert found.texts[1][:4] == texts[1][:4] and found.texts[1][4:] == ["", ""]
    assert [parsed is None for parsed in found.parsed[0]] == [False] * 4 + [True] * 2
    assert all(field.shape[:2] == (2, 6) for field in judged)


def test_an_answer_is_held_against_what_was_wanted(encoder):
    name, box = "Idle", (8, 4, 40, 20)
    texts = [answer.render(answer=name), answer.render(box=box), answer.render(answer=name, box=box)]
    for want, right in ((ANSWER, 0), (BOX, 1), (BOTH, 2)):
        gold = stack([gold_of(*[(name, (0.1, 0.1, 0.5, 0.5), want)] * 3)])
        judged = graded(encoder, [[*texts, None]], gold).judged
        assert np.flatnonzero(judged.format_ok[0]).tolist() == [right]
        assert judged.wants_answer[0, :3].all() == (want != BOX) and judged.wants_box[0, :3].all() == (want != ANSWER)
        assert not judged.box_ok[0].any() or want != ANSWER
        assert np.all(judged.answer[0] == -1) or want != BOX


def test_what_ran_out_of_tokens_is_not_read(encoder):
    text = answer.render(answer="Idle", box=(8, 4, 40, 20))
    found = graded(
        encoder, [[text, text, None]], stack([gold_of(IDLE, IDLE)]), stopped=np.array([[True, False, False]])
    )
    assert found.judged.answer[0].tolist() == [vocabulary.class_index("Idle"), -1, -1]
    assert found.judged.box_ok[0].tolist() == found.judged.format_ok[0].tolist() == [True, False, False]
    assert found.parsed[0][1].reason is answer.Reason.TRUNCATED and found.texts[0][1] == text


def test_the_reasoning_is_read_for_the_questions_kind(encoder):
    trace = "The suction at left-top is Cutting, not Idle, in [8, 4, 40, 20] or [1, 1, 0, 0] or [0, 0, 80, 40]"
    text = answer.render(answer="Idle", box=(8, 4, 40, 20), think=trace)
    judged = graded(encoder, [[text, text, None]], stack([gold_of(IDLE, LEFT)])).judged
    assert judged.think_answer[0].tolist() == [vocabulary.class_index(n) for n in ("Idle", "left-top")] + [-1]
    np.testing.assert_allclose(judged.think_box[0, 0, :2], [[0.1, 0.1, 0.5, 0.5], [0, 0, 1, 1]], atol=1e-7)
    assert judged.think_box_ok[0, 0].tolist() == [True, True, False, False]
    many = answer.render(answer="Idle", think="[0, 0, 1, 1] " * 9)
    assert graded(encoder, [[many, None]], stack([gold_of(IDLE)])).judged.think_box_ok[0, 0].all()
