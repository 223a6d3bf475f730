"""One question about one image: what the model says is told plainly, and drawn where wanted."""

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from PIL import Image

from surgery_r1_jax import answer, ask, evaluate, hf, sampling
from surgery_r1_jax.errors import InputError

STATE = "What is the state of monopolar_curved_scissors?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.write_model(tmp_path_factory.mktemp("ask") / "model")


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "frame.png"
    Image.new("RGB", (1260, 840), (150, 60, 50)).save(path)
    return path


@pytest.fixture
def says(monkeypatch):
    """Makes every completion this text; the questions that were asked."""
    asked = []

    def arrange(text, stopped=True):
        def decode(graph, params, prompts, words, settings):
            encoder = hf.encoder_of(*arrange.source)
            ids = np.asarray(prompts.branch_ids_BJT[0, 0])[np.asarray(prompts.branch_segment_BJT[0, 0]) > 0]
            asked.append(encoder.chat.decode(ids).partition("<|im_end|>")[0])
            tokens = encoder.chat.completion_ids(text)[: None if stopped else -1]
            return sampling.Rollout(jnp.asarray([[tokens]]), None, None, jnp.asarray([[stopped]]))

        monkeypatch.setattr(evaluate, "decode", decode)
        return asked

    real = evaluate.runner_of

    def runner_of(where, settings, *more, **how):
        arrange.source = (where, settings)
        return real(where, settings, *more, **how)

    monkeypatch.setattr(evaluate, "runner_of", runner_of)
    return arrange


def test_reasoning_answer_and_box_are_told_in_pixels_of_the_image(folder, image, says, capsys):
    says(answer.render(answer="Cutting", box=(21, 14, 84, 56), think="The scissors are closed."))  # of 84 x 56
    assert ask.run(folder, image, STATE) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"question:  {STATE}",
        "reasoning: The scissors are closed.",
        "answer:    Cutting",
        "box:       315, 210, 1260, 840 of 1260 x 840 pixels (0.2500, 0.2500, 1.0000, 1.0000)",
    ]


def test_an_untrained_model_is_told_to_be_out_of_the_grammar_and_its_words_are_shown(folder, image, tmp_path, capsys):
    drawn = tmp_path / "drawn.png"
    assert ask.run(folder, image, "Is there blood?", save=drawn, max_tokens=8) == 0
    out = capsys.readouterr().out
    assert "question:  Is there blood?" in out
    assert "answer:    none" in out
    reason = out.partition("not in the grammar: ")[2].split()[0]
    assert reason in answer.Reason.__members__
    assert "completion: " in out
    with Image.open(drawn) as picture:
        assert picture.format == "PNG"
        assert picture.size[0] == 1260
        assert picture.size[1] > 840  # the caption stands below


def test_a_known_question_is_put_in_its_official_words_and_a_free_one_as_it_is(folder, image, says):
    asked = says("<answer>{}</answer>")
    ask.run(folder, image, " what is the state of MONOPOLAR curved scissors? ")
    ask.run(folder, image, " How many tools?\n")
    assert asked == [STATE, "How many tools?"]


@pytest.mark.parametrize(
    ("text", "stopped", "reason", "name"),
    [
        ('<answer>{"answer": "Cutting"}</answer>', True, "MISSING_BOX", "Cutting"),
        ('<answer>{"answer": "Dancing", "bbox_2d": [1, 2, 3, 4]}</answer>', True, "UNKNOWN_CLASS", "none"),
        ('<answer>{"answer": "Cutting", "bbox_2d": [1, 2, 3, 4]}</answer>', False, "TRUNCATED", "none"),
        ("\x1b[2Jnothing", True, "NO_ANSWER_TAG", "none"),
    ],
)
def test_a_completion_out_of_the_grammar_gives_its_reason(folder, image, says, capsys, text, stopped, reason, name):
    says(text, stopped)
    assert ask.run(folder, image, STATE) == 0
    out = capsys.readouterr().out
    assert f"answer:    {name}\n" in out
    assert f"not in the grammar: {reason}\n" in out
    assert "\x1b" not in out


def test_the_predicted_box_is_drawn(folder, image, says, tmp_path):
    says(answer.render(answer="Cutting", box=(21, 14, 63, 42)))
    ask.run(folder, image, STATE, save=tmp_path / "a.png")
    says("nothing")
    ask.run(folder, image, STATE, save=tmp_path / "b.png")
    with_box, without = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("a.png", "b.png"))
    changed = np.abs(with_box[:840] - without[:840]).max(-1) > 0
    rows, columns = np.nonzero(changed)
    assert (rows.min(), columns.min()) == pytest.approx((210, 315), abs=6)
    assert (rows.max(), columns.max()) == pytest.approx((630, 945), abs=6)


def test_what_cannot_be_read_or_written_is_refused(folder, image, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    for arguments, message in (
        ((folder, tmp_path / "none.png", STATE), r"none\.png: cannot be opened"),
        ((folder, bad, STATE), r"bad\.png: not a whole PNG or JPEG"),
        ((tmp_path / "nowhere", image, STATE), r"nowhere: no config\.json"),
        ((folder, image, "  "), "the question is empty"),
    ):
        with pytest.raises(InputError, match=message):
            ask.run(*arguments)
    with pytest.raises(InputError, match="its folder does not exist"):
        ask.run(folder, image, STATE, save=tmp_path / "not" / "there.png")


def test_a_picture_that_cannot_be_saved_is_refused(folder, image, says, tmp_path):
    says("nothing")
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(InputError, match=r"taken\.png: cannot be written"):
        ask.run(folder, image, STATE, save=tmp_path / "taken.png")
