"""Token lengths against the chat template and transformers' own image processor, and against a model's limit."""

import json
import shutil

import pytest
import toy
from PIL import Image
from test_check import write
from test_examples import rows_of
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from surgery_r1_jax import answer, check, hf, lengths, records, survey, tiny
from surgery_r1_jax.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("model") / "tiny", toy.SIZES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Frames of three sizes."""
    root = tmp_path_factory.mktemp("data")
    for index, size in enumerate([(60, 40), (40, 60), (200, 100)]):
        write(root, f"seq_2/frame{index:03}", colour=index, size=size)
    return root


def with_limit(folder, target, limit):
    """The folder again, made for another number of tokens."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"]):
        part["max_position_embeddings"] = limit
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_lengths_are_those_of_template_and_image_processor(folder, data):
    encoder = hf.encoder_of(folder, hf.read_config(folder))
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder)
    found = lengths.measure(records.read(data), encoder)
    assert len(found) == 9
    for each in found:
        with Image.open(each.frame.image) as image:
            _, *grid = processor(images=[image], return_tensors="np")["image_grid_thw"][0].tolist()
        reply = encoder.chat.decode(encoder.branch(each.frame, each.record, think=True).completion)
        row = rows_of(tokenizer, [grid], answer.prompt(each.record.question), reply)
        assert each.total == len(row) - len(tokenizer.encode("\n"))  # the template ends a turn in a line feed


def test_questions_longer_than_the_model_takes_are_errors_of_their_lines(folder, data, tmp_path, capsys):
    longest = max(
        each.total for each in lengths.measure(records.read(data), hf.encoder_of(folder, hf.read_config(folder)))
    )
    assert survey.main(data, model=with_limit(folder, tmp_path / "enough", longest), json_path=tmp_path / "a.json") == 0
    assert json.loads((tmp_path / "a.json").read_text())["tokens"]["over"] == 0
    assert (
        survey.main(data, model=with_limit(folder, tmp_path / "short", longest - 1), json_path=tmp_path / "b.json") == 1
    )
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["tokens"]["total"] == longest and found["tokens"]["limit"] == longest - 1
    over = [problem for problem in found["problems"] if problem["severity"] == "error"]
    assert found["tokens"]["over"] == found["errors"] == len(over) > 0
    assert all(p["source"].rpartition(":")[2].isdecimal() and "lower max_pixels" in p["reason"] for p in over)
    assert f"the model takes {longest - 1:,}" in capsys.readouterr().out


def test_a_picture_that_no_model_takes_is_told_and_not_measured(folder, tmp_path):
    write(tmp_path, "seq_2/frame000", size=(300, 1), text="What organ is being operated?|kidney|1,1,61,2\n")
    encoder = hf.encoder_of(folder, hf.read_config(folder))
    summary = check.inspect(tmp_path, model=check.Model(encoder, 5))
    assert [p.reason for p in summary.problems] == ["sides of 300x1 differ over 200 to 1; crop or drop it"]
    assert summary.tokens is None


def test_a_model_folder_that_is_none_is_refused_before_the_images(data, tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        survey.main(data, model=tmp_path)


@pytest.mark.parametrize("written", ["{", "[]", '{"text_config": 3}'])
def test_a_config_that_is_none_is_refused(tmp_path, written):
    (tmp_path / "config.json").write_text(written)
    with pytest.raises(InputError, match=r"config\.json: cannot be used"):
        lengths.most_tokens(tmp_path)


def test_the_limit_is_that_of_the_text_part(tmp_path):
    for written, limit in (
        ({"max_position_embeddings": 7}, 7),
        ({"text_config": {"max_position_embeddings": 8}}, 8),
        ({}, None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert lengths.most_tokens(tmp_path) == limit
