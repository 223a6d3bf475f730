"""Folders to checkpoints and back, byte for byte, with a card that says where a model comes from."""

import ast
import hashlib
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import toy
import transformers
import yaml
from toy import few_devices  # noqa: F401

from surgery_r1_jax import checkpoint, cli, codec, config, hf, modelcard, options, sharding
from surgery_r1_jax.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in bfloat16 with several weight files."""
    home = tmp_path_factory.mktemp("conversion")
    whole = toy.write_model(home / "whole")
    return checkpoint.export(whole, home / "folder", dtype="bfloat16", max_shard_bytes=60_000)


def hashes(folder):
    held = [safetensors.numpy.load_file(file) for file in folder.glob("*.safetensors")]
    return {name: hashlib.sha256(value.tobytes()).hexdigest() for part in held for name, value in part.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_keeps_its_bytes_on_the_way_in_and_out(folder, tmp_path, dtype):
    assert len(list(folder.glob("*.safetensors"))) > 2
    told = []
    imported = checkpoint.import_folder(folder, tmp_path / "in", dtype=dtype, tell=lambda *what: told.append(what))
    assert {name for name, *_ in told} == set(hashes(folder))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    again = checkpoint.export(imported, tmp_path / "out", dtype="bfloat16")
    assert hashes(again) == hashes(folder)
    assert hf.read_config(again) == hf.read_config(folder)


def test_an_imported_folder_is_a_model_to_start_from_on_any_mesh(folder, tmp_path):
    imported = checkpoint.import_folder(folder, tmp_path / "in", dtype="bfloat16")
    want = hf.read_params(folder, hf.read_config(folder))
    for shape in ((1, 1, 1), (2, 2, 2)):
        loaded = checkpoint.load_model(imported, sharding.make_mesh(shape))
        assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded.params))
        jax.tree.map(np.testing.assert_array_equal, loaded.params, want)


def test_an_import_that_was_stopped_is_no_model_and_may_be_repeated(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(hf, "copy_side_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.import_folder(folder, tmp_path / "in")
    with pytest.raises(InputError, match="no config"):
        checkpoint.load_model(tmp_path / "in")
    checkpoint.import_folder(folder, tmp_path / "in")
    assert checkpoint.load_model(tmp_path / "in").config == hf.read_config(folder)
    with pytest.raises(InputError, match="already exists"):
        checkpoint.import_folder(folder, tmp_path / "in")


def test_an_import_touches_no_folder_of_another_kind_and_none_for_a_mistyped_source(folder, tmp_path):
    kept = tmp_path / "mine" / "best" / "photo"
    kept.mkdir(parents=True)
    (tmp_path / "mine" / "notes").mkdir()
    with pytest.raises(InputError, match="already exists"):
        checkpoint.import_folder(folder, tmp_path / "mine")
    (tmp_path / "mine" / "notes").rmdir()
    with pytest.raises(InputError, match="no config"):
        checkpoint.import_folder(tmp_path / "mistyped", tmp_path / "mine")
    assert kept.is_dir()


def test_the_card_of_a_run_tells_base_data_settings_and_scores_but_no_paths(folder, tmp_path):
    run = checkpoint.import_folder(folder, tmp_path / "run")
    settings = options.GRPO(
        model=f"/home/patient/{folder.name}", data=options.Data(root="/home/patient/frames"), seed=7
    )
    config.save(settings, run / "config.yaml")
    rows = [{"step": 3, "split": "train", "loss": 1.0}, {"step": 9, "split": "dev", "accuracy": 0.875, "n": 40}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (checkpoint.export(run, tmp_path / "mine") / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == folder.name
    assert yaml.safe_load(front)["library_name"] == "transformers"
    for part in ("# mine", "Qwen2.5-VL", "GRPO", "seed 7", "frames", "split dev, step 9", "| accuracy | 0.875 |"):
        assert part in body, part
    assert "/home" not in text and "patient" not in text
    assert "Not validated for clinical use" in body


@pytest.mark.parametrize("adapter", [False, True])
def test_the_lines_of_a_card_say_word_for_word_what_the_model_was_trained_with(folder, tmp_path, adapter):
    encoder = hf.encoder_of(folder, hf.read_config(folder))
    text = modelcard.text("mine", "Qwen2.5-VL", encoder.codec, tmp_path, adapter=adapter)
    code = ast.parse(text.split("```python\n")[1].split("```")[0])
    (given,) = (node.value for node in code.body if ast.unparse(node).startswith("system = "))
    system = ast.literal_eval(given)
    assert system == encoder.system and ("PeftModel" in text) == adapter
    messages = [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it open?"}]},
    ]
    assert (folder / "chat_template.json").is_file()  # transformers' processor finds no other template
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids == encoder.chat.prefix_ids(system, [1]) + encoder.chat.prompt_ids("Is it open?")


def test_sizes_are_read_and_nonsense_is_refused(folder, tmp_path, capsys):
    argv = ["export", str(folder), str(tmp_path / "small"), "--max-shard-size", "60KB"]
    assert cli.main(argv) == 0
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 2
    for wrong in ("0", "2XB", "GB", "1.5GB", "9" * 20):
        assert cli.main([*argv[:2], str(tmp_path / "never"), "--max-shard-size", wrong]) == 2
        assert "expected a size as in 500MB or 2GB" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_the_card_of_a_run_on_several_data_sets_names_each_and_no_path(tmp_path):
    parts = [{"root": f"/private/{name}", "weight": 1} for name in ("theirs", "ours")]
    about = dict(model="/private/start", seed=3, schedule=dict(steps=7), data=dict(root=None, split="train", mix=parts))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(about))
    text = modelcard.text("mixed", "Qwen2.5-VL", codec.PER_MILLE, tmp_path)
    assert "on the split train of theirs and ours." in text and "Base: start." in text
    assert "private" not in text
