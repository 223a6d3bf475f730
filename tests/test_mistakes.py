"""Mistakes that people make with the folder of a model: one clear line through the command line, exit status 2."""

import hashlib
import json
import shutil

import pytest
import randomised
import toy
from toy import few_devices  # noqa: F401

from surgery_r1_jax import cli, errors, families, hf, tensors, weights

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4000000000\n"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound folder, inside `home`/checkpoints/qwen."""
    return toy.write_model(tmp_path_factory.mktemp("home") / "checkpoints" / "qwen")


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "models" / "qwen")


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def configured(folder, change):
    """Change config.json by a function of its entries."""
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return folder


def entries(**changes):
    return lambda folder: configured(folder, lambda config: config | changes)


def text(**changes):
    return lambda folder: configured(folder, lambda c: c | {"text_config": c["text_config"] | changes})


def tower(**changes):
    return lambda folder: configured(folder, lambda c: c | {"vision_config": c["vision_config"] | changes})


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


def instead_of_weights(name, content="weights"):
    def change(folder):
        (folder / tensors.SINGLE).unlink()
        write(folder / name, content)
        return folder

    return change


def gguf_alone(folder):
    write(emptied(folder) / "qwen2.5-vl-3b-q4_k_m.gguf", "GGUF")
    return folder


def data_set(folder):
    write(
        emptied(folder) / "seq_2" / "vqla" / "label" / "frame000_QA.txt", "What organ is being operated?|kidney|1,1,2,2"
    )
    return folder


def records(folder):
    write(emptied(folder) / "records.jsonl", "{}\n")
    return folder


def run_folder(folder):
    """As a run leaves it: tokenizer and configuration in `model`, weights elsewhere."""
    run = folder.parent / "run"
    hf.copy_side_files(folder, (run / "model").mkdir(parents=True) or run / "model")
    for place in ("best/100/params", "checkpoints/100/state"):
        (run / place).mkdir(parents=True)
    return run


def cached(folder):
    """As a hub's cache holds it."""
    snapshot = folder.parent / "models--Qwen--qwen" / "snapshots" / "c0ffee"
    shutil.copytree(folder, snapshot)
    return snapshot.parent.parent


def without(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()
        return folder

    return change


def pointer(name):
    return lambda folder: write(folder / name, POINTER).parent


def sums(folder, sum_of=lambda path: hashlib.sha256(path.read_bytes()).hexdigest()):
    write(folder / "SHA256SUMS", "".join(f"{sum_of(path)}  {path.name}\n" for path in sorted(folder.iterdir())))
    return folder


def spoiled_after_sums(folder):
    sums(folder)
    path = folder / tensors.SINGLE
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    return folder


SUPPORTED = "supported: qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe"


def text_alone(folder):
    return configured(folder, lambda c: c["text_config"] | {"model_type": "qwen2"})


# What was done to a folder: where the error line points, and what it says.
MISTAKES = {
    "no folder": (
        lambda f: f.parent / "qwen2",
        "{0}: no config.json: there is no such folder; give a Hugging Face folder",
    ),
    "a weight file": (lambda f: f / tensors.SINGLE, "{0}: no config.json: this is a file; give {f}"),
    "another file": (
        lambda f: write(f.parent / "notes.txt"),
        "{0}: no config.json: this is a file; give a Hugging Face",
    ),
    "an empty folder": (emptied, "{0}: no config.json: the folder is empty; give a Hugging Face folder"),
    "a data set": (data_set, "{0}: no config.json: this is a data set; give a Hugging Face folder"),
    "records": (records, "{0}: no config.json: this is a data set"),
    "a folder of folders": (lambda f: f.parent, "{0}: no config.json here; give {f}"),
    "a hub's cache": (cached, "{0}: no config.json here; give {0}/snapshots/c0ffee"),
    "a run's checkpoints": (lambda f: run_folder(f) / "checkpoints", "{0}: no config.json here; give {0.parent}"),
    "a run's checkpoint": (
        lambda f: run_folder(f) / "checkpoints" / "100",
        "{0}: no config.json here; give {0.parent.parent}",
    ),
    "a run's best": (lambda f: run_folder(f) / "best", "{0}: no config.json here; give {0.parent}"),
    "a folder of runs": (lambda f: run_folder(f).parent, "{0}: no config.json here; give {0}/qwen or {0}/run"),
    "a run's model": (lambda f: run_folder(f) / "model", "{0}: configuration and tokenizer of a run"),
    "GGUF alone": (
        gguf_alone,
        "{0}: GGUF weights (qwen2.5-vl-3b-q4_k_m.gguf) are not read; take the model's release in saf",
    ),
    "GGUF": (instead_of_weights("q4.gguf"), "{0}: GGUF weights (q4.gguf) are not read"),
    "GPTQ": (
        entries(quantization_config={"quant_method": "gptq", "bits": 4}),
        "weights quantized by gptq are not read; take",
    ),
    "AWQ": (entries(quantization_config={"quant_method": "awq"}), "weights quantized by awq are not read; take"),
    "bitsandbytes": (
        entries(quantization_config={"quant_method": "bitsandbytes"}),
        "weights quantized by bitsandbytes are",
    ),
    "FP8": (entries(quantization_config={"quant_method": "fp8"}), "weights quantized by fp8 are not read; take"),
    "old GPTQ": (lambda f: write(f / "quantize_config.json", "{}").parent, "weights quantized are not read; take"),
    "Qwen2": (text_alone, f"model_type 'qwen2', a model of text alone, is not supported; {SUPPORTED}"),
    "Qwen3.5": (entries(model_type="qwen3_5"), f"model_type 'qwen3_5' is not supported; {SUPPORTED}"),
    "Qwen3-Omni": (entries(model_type="qwen3_omni_moe"), f"model_type 'qwen3_omni_moe' is not supported; {SUPPORTED}"),
    "no family": (entries(model_type=None), f"model_type 'None' is not supported; {SUPPORTED}"),
    "a family of lists": (entries(model_type=["qwen2_5_vl"]), f"is not supported; {SUPPORTED}"),
    "heads that do not divide": (
        text(num_key_value_heads=3),
        "num_attention_heads 2 must be a multiple of num_key_value_heads 3",
    ),
    "a tower that does not divide": (tower(num_heads=3), "width 32 must be a multiple of 4 x num_heads 3"),
    "too many layers": (text(num_hidden_layers=10**9), "num_hidden_layers 1000000000 is above 10000"),
    "no sections": (text(rope_parameters={"rope_theta": 1e6}), "no mrope_section in rope_scaling or rope_parameters"),
    "words for numbers": (
        text(hidden_size="many"),
        "transformers cannot read it (Validation error for field 'hidden_size'",
    ),
    "one layer more": (
        text(num_hidden_layers=3, layer_types=None),
        "{0}: tensor 'model.layers.2.",
    ),
    "one layer less": (text(num_hidden_layers=1, layer_types=None), "unknown tensors model.layers.1."),
    "a wider MLP": (text(intermediate_size=65), "has shape [32, 64], but config.json makes it [32, 65]; take both"),
    "more rows than the weights": (
        text(vocab_size=4096),
        "'model.embed_tokens.weight' has shape [512, 32], but config.json makes it [4096, 32]; take",
    ),
    "fewer rows than words": (
        text(vocab_size=384),
        "{0}: the tokenizer has ids up to 413, config.json 384 vocabulary rows",
    ),
    "another image token": (entries(image_token_id=3), "{0}: image token is"),
    "a pickle": (
        instead_of_weights("pytorch_model.bin"),
        "not pytorch_model.bin (it can run code when it is opened); save the",
    ),
    "a shard without its index": (
        instead_of_weights("model-00001-of-00002.safetensors"),
        "{0}: no model.safetensors and no mod",
    ),
    "a pointer for weights": (
        pointer(tensors.SINGLE),
        "{0}/model.safetensors: this is a git-lfs pointer, not the file; run git",
    ),
    "a pointer for the index": (pointer(tensors.INDEX), "{0}/model.safetensors.index.json: this is a git-lfs pointer"),
    "a pointer for words": (pointer("tokenizer.json"), "{0}/tokenizer.json: this is a git-lfs pointer"),
    "a pointer for config.json": (pointer("config.json"), "{0}/config.json: this is a git-lfs pointer"),
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json"),
        "{0}: no usable tokenizer (no tokenizer.json); copy",
    ),
    "half a tokenizer": (without("tokenizer.json"), "{0}: no usable tokenizer (no tokenizer.json); copy the"),
    "no preprocessor": (
        without("preprocessor_config.json"),
        "{0}/preprocessor_config.json: No such file or directory; take",
    ),
    "a wrong sum": (spoiled_after_sums, "{0}/model.safetensors: its SHA-256 is not the one in SHA256SUMS:"),
}


def refused(capsys, *words):
    """The one line that a command refuses with."""
    assert cli.main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    *bar, line = err.splitlines()
    assert out == "" and line.startswith("error: ") and (not bar or bar[0].startswith("importing")), (out, err)
    return line.removeprefix("error: ")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_that_says_what_and_where(folder, tmp_path, capsys, mistake):
    change, says = MISTAKES[mistake]
    given = change(folder)
    line = refused(capsys, "import", given, tmp_path / "out")
    assert says.format(given, f=folder) in line and line.startswith(str(tmp_path)) and "; " in line, line
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("start", ["", "./", "*", "upper", "tag", "alone"])
def test_weights_that_keep_their_sums_are_read_in_every_form_of_list(folder, start):
    """As `sha256sum` writes them: plain, of paths, of binary files, tagged; and a sum alone beside its file."""
    path = folder / tensors.SINGLE
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    lists = {
        "upper": f"# sums\n\n{found.upper()}  {path.name}\n",
        "tag": f"SHA256 ({path.name}) = {found}\n",
        "alone": found + "\n",
        "*": f"{found} *{path.name}\n",
    }
    write(folder / f"{path.name}.sha256", lists.get(start, f"{found}  {start}{path.name}\n{'0' * 64}  video.mp4\n"))
    assert list(tensors.opened(folder))
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(
        errors.InputError, match=r"model\.safetensors: its SHA-256 is not the one in model\.safetensors\.sha2"
    ):
        tensors.opened(folder)


def test_a_list_of_sums_is_whole_or_of_other_files(folder):
    settings = hf.read_config(folder)
    other = write(folder / "SHA256SUMS.txt", f"{'0' * 64}  README.md\n")
    assert tensors.opened(folder)
    other.write_text("not a sum\n")
    with pytest.raises(errors.InputError, match=r"SHA256SUMS\.txt:1: not a line as sha256sum writes it"):
        tensors.opened(folder)
    other.unlink()
    several = folder.parent / "several"
    hf.write_folder(several, hf.read_params(folder, settings), settings, folder, max_shard_bytes=60_000)
    first, second, *_ = sorted(several.glob("*.safetensors"))
    write(several / "SHA256SUMS", f"{hashlib.sha256(first.read_bytes()).hexdigest()}  {first.name}\n")
    with pytest.raises(errors.InputError, match=f"{second.name}: in no list of SHA-256 sums, though others are"):
        tensors.opened(several)


@pytest.mark.parametrize("command", ["doctor", "ask", "evaluate", "export", "sft"])
def test_every_command_that_takes_a_model_tells_the_mistake(folder, tmp_path, capsys, command):
    data = toy.write_data(tmp_path / "data", frames=2)
    image = next((data / "seq_2" / "left_frames").iterdir())
    config = write(tmp_path / "run.yaml", f"model: {folder}\ndata: {{root: {data}, frames: 2}}\n")
    words = {
        "doctor": ("doctor", "--checkpoint", folder),
        "ask": ("ask", "--checkpoint", folder, "--image", image, "What organ is being operated?"),
        "evaluate": (
            "evaluate",
            "--checkpoint",
            folder,
            "--data",
            data,
            "--split",
            "all",
            "--out",
            tmp_path / "x.json",
        ),
        "export": ("export", folder, tmp_path / "out"),
        "sft": ("sft", "--config", config, "--out", tmp_path / "out"),
    }[command]
    capsys.readouterr()
    entries(model_type="qwen3_5")(folder)
    assert SUPPORTED in refused(capsys, *words)
    gguf_alone(folder)
    assert "GGUF weights" in refused(capsys, *words)
    assert not (tmp_path / "out").exists() and not (tmp_path / "x.json").exists()


# config.json edited by hand: every entry of every family's, in turn, with values that do not belong there.

GONE = object()
VALUES = (GONE, None, True, "many", -1, 0, 1, 3, 1.5, 10**9, [], [0, 0, 0], [10**9], {"a": 1})


def edits(family):
    """Every configuration that one edit makes, with what was edited."""
    whole = randomised.configuration(family, tied=False).to_dict()
    for part in (None, "text_config", "vision_config"):
        for key in whole if part is None else whole[part]:
            for value in VALUES:
                changed = json.loads(json.dumps(whole))
                at = changed if part is None else changed[part]
                if value is GONE:
                    del at[key]
                else:
                    at[key] = value
                yield f"{part}.{key} = {'gone' if value is GONE else value!r}", changed


def our_sizes(settings):
    """Shapes of a model's tensors by name; some writers swap the experts' last two axes."""
    layout = hf.file_layout(settings)
    return {weights.plain(name): sorted(shape) if ".experts." in name else list(shape) for name, shape in layout}


def sizes_by_transformers(folder):
    torch = pytest.importorskip("torch", reason="transformers makes models with PyTorch")
    import transformers

    whole = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        reference = transformers.AutoModelForImageTextToText.from_config(whole)
    found = {weights.plain(name): list(value.shape) for name, value in reference.named_parameters()}
    return {name: sorted(shape) if ".experts." in name else shape for name, shape in found.items()}


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_an_edited_configuration_is_refused_in_one_line_or_is_the_model_that_transformers_makes(
    tmp_path, family, every
):
    path, kept = tmp_path / "config.json", {}
    path.write_text(json.dumps(randomised.configuration(family, tied=False).to_dict()))
    same, refused = hf.read_config(tmp_path), 0
    for number, (edit, changed) in enumerate(edits(family)):
        if number % every:
            continue
        path.write_text(json.dumps(changed))
        try:
            kept.setdefault(hf.read_config(tmp_path), (edit, changed))
        except errors.InputError as problem:
            line, refused = str(problem), refused + 1
            assert line.startswith(f"{path}: ") and line.isprintable() and "; " in line and len(line) < 600, (
                edit,
                line,
            )
    assert refused > 20
    kept.pop(same, None)
    assert kept
    for settings, (edit, changed) in list(kept.items())[: None if every == 1 else 1]:
        path.write_text(json.dumps(changed))
        assert our_sizes(settings) == sizes_by_transformers(tmp_path), edit
