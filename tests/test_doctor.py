"""The doctor tells what a run would be, for the real configurations too, and what would stop or spoil it."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
import toy
from flax import nnx

from surgery_r1_jax import (
    cli,
    codec,
    config,
    doctor,
    hf,
    images,
    memory,
    model,
    options,
    pipeline,
    programs,
    sizes,
    synth,
    tiny,
)
from surgery_r1_jax.errors import InputError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# Total sizes that the safetensors indices of the two cards give, in parameters.
PARAMETERS = {"3b": 3_754_622_976, "7b": 8_292_166_656}


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory):
    """A function giving a folder of a published size: its config.json and pixel bounds, the tiny tokenizer."""

    def get(size):
        folder = tiny.write_folder(tmp_path_factory.mktemp(size))
        image_token_id = json.loads((folder / "config.json").read_text())["image_token_id"]
        released = sizes.transformers_config(f"Qwen2.5-VL-{size.upper()}", image_token_id=image_token_id)
        released.save_pretrained(folder)
        images.Preprocessor(14, 2, 2, 4 * 28 * 28, 16384 * 28 * 28, tiny.MEAN, tiny.STD).to_folder(folder)
        return folder

    return get


@pytest.fixture(scope="module")
def endoscopy(tmp_path_factory):
    """Frames of EndoVis size in its layout; seq_6 is the dev split."""
    root = tmp_path_factory.mktemp("endoscopy") / "data"
    synth.write(root, frames=20, seed=1, size=(1280, 1024), sequences=("seq_2", "seq_3", "seq_4", "seq_7", "seq_6"))
    return root


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A toy model and toy data."""
    home = tmp_path_factory.mktemp("toys")
    return toy.write_model(home / "model"), toy.write_data(home / "data", frames=20)


def write(path, text):
    path.write_text(text)
    return path


def toy_settings(tmp_path, toys, more=""):
    folder, data = toys
    text = f"model: {folder}\ndata:\n  root: {data}\n  frames: 8\n  questions: 3\nevaluation:\n  frames: 8\n{more}"
    return write(tmp_path / "run.yaml", text)


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_the_published_sizes_have_the_published_numbers_of_parameters(real_folder, size):
    _, abstract = model.build(hf.read_config(real_folder(size)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(abstract))) == PARAMETERS[size]


@pytest.mark.parametrize("name", ["sft_3b", "sft_7b", "grpo_3b", "grpo_7b"])
def test_the_real_configurations_pass(real_folder, endoscopy, capsys, name):
    size = name.removeprefix("sft_").removeprefix("grpo_")
    folder = real_folder(size)
    overrides = [f"--model={folder}", f"--data.root={endoscopy}"]
    assert run_doctor(CONFIGS / f"{name}.yaml", overrides) == 0
    printed = capsys.readouterr().out
    words = printed.split()
    assert f"{PARAMETERS[size]:,}" in words
    assert "1,702 at 1288 x 1036 pixels" in printed  # 46 x 37 units of 28 pixels
    assert "estimated, within a factor of two" in printed
    warned = [line for line in printed.splitlines() if line.startswith("warning")]
    assert warned == [f"warning: {folder} has no safetensors weights yet"]
    assert ("reference" in words) == name.startswith("grpo")


def run_doctor(path, overrides=()):
    return doctor.start(options.load(path, overrides), path)


def test_missing_model_and_data_are_both_named(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", "--config", str(CONFIGS / "sft_3b.yaml")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: checkpoints/Qwen2.5-VL-3B-Instruct: no config.json, no tokenizer_config.json, "
        "no preprocessor_config.json; give a Hugging Face folder of a Qwen-VL model as model",
        "error: data/EndoVis-18-VQLA: no such folder; give a data set in the layout of EndoVis-18-VQLA as data.root",
    ]


def test_the_program_is_known_by_its_keys_and_the_closer_ones_mistakes_are_told(tmp_path):
    both = "model: m\ndata: {root: d}\n"
    assert isinstance(options.load(write(tmp_path / "a.yaml", both + "samples: 4")), options.GRPO)
    assert isinstance(options.load(write(tmp_path / "b.yaml", both + "targets: {reasoning: 0.5}")), options.SFT)
    with pytest.raises(InputError, match=r"a\.yaml:4: unknown key 'sampels'; did you mean 'samples'") as refusal:
        options.load(write(tmp_path / "a.yaml", both + "objective: {beta: 0.1}\nsampels: 4"))
    assert "objective" not in str(refusal.value)
    with pytest.raises(InputError, match=r"did you mean 'targets\.reasoning'") as refusal:
        options.load(write(tmp_path / "b.yaml", both + "smoothing_sigma: 1.0\ntargets: {raesoning: 0.5}"))
    assert "smoothing" not in str(refusal.value)


def test_what_would_stop_the_run_is_refused_after_the_report(tmp_path, toys, capsys):
    path = toy_settings(tmp_path, toys, "targets: {reasoning: 1.0}\n")
    with pytest.raises(InputError) as refusal:
        run_doctor(path, ["--compute.mesh=[1, 3, 1]"])
    wanted = "data.frames 8 cannot be spread over 3 devices (data x fsdp); take a multiple of 3"
    assert str(refusal.value) == f"{path}: {wanted}"
    assert "the mesh is for 3 devices, here are 8" in capsys.readouterr().out


def test_a_rule_that_one_program_breaks_is_told_rather_than_the_keys_of_the_other(tmp_path, toys):
    path = toy_settings(tmp_path, toys, "accumulate: 3\ntargets: {reasoning: 1.0}\n")
    with pytest.raises(InputError, match=r"data\.frames 8 does not divide by accumulate 3"):
        run_doctor(path)


def test_what_would_spoil_the_run_is_a_warning(tmp_path, toys, capsys):
    path = toy_settings(tmp_path, toys, "samples: 2\nsampler: {max_tokens: 9}\naccumulate: 2\n")
    overrides = [f"--optimizer.rates.{part}=0.0" for part in model.PARTS]
    assert run_doctor(path, [*overrides, "--compute.mesh=[2, 2, 4]"]) == 0
    printed = capsys.readouterr().out
    for warning in (
        "sampler.max_tokens 9 cuts the longest true answer with reasoning",
        "num_key_value_heads 2 does not divide by tensor 4",
        "optimizer.rates are all 0: nothing is trained",
        "the model sees too few pixels",
    ):
        assert warning in printed
    long = json.loads((toys[0] / "config.json").read_text())
    assert "the model was made for" not in printed
    short = toys[0].with_name("short")
    hf.copy_side_files(toys[0], (short.mkdir(exist_ok=True), short)[1])
    (short / "config.json").write_text(json.dumps(shorter(long)))
    assert run_doctor(path, [f"--model={short}", "--compute.mesh=[2, 2, 4]"]) == 0
    assert "the model was made for 20" in capsys.readouterr().out


def shorter(entries):
    if "max_position_embeddings" in entries:
        return entries | {"max_position_embeddings": 20}
    return entries | {"text_config": entries["text_config"] | {"max_position_embeddings": 20}}


def test_every_answer_of_the_data_is_read_back_and_a_broken_codec_is_seen(toys, endoscopy, real_folder):
    folder = real_folder("3b")
    encoder = hf.encoder_of(folder, hf.read_config(folder))
    frames = pipeline.read(options.Data(root=str(endoscopy), split="all"))
    lengths = doctor.measure(frames, encoder)
    assert lengths.lost == 0
    assert lengths.miou >= 0.99

    class Wrong(codec.BoxCodec):
        def decode(self, units, width, height):
            return codec.PER_MILLE.decode(units, width, height)

    broken = dataclasses.replace(encoder, codec=Wrong("wrong"))
    assert doctor.measure(frames, broken).miou < 0.9


def job_of(toys, program, offload=False, **more):
    folder, data = toys
    source = options.Data(root=str(data), frames=8, questions=3)
    compute = options.Compute(mesh=(1, 8, 1), remat=True, offload=offload)
    return job_for(program(model=str(folder), data=source, compute=compute, **more), folder)


def job_for(settings, folder):
    architecture = hf.read_config(folder)
    encoder = hf.encoder_of(folder, architecture)
    batch = doctor.largest_batch(doctor.stream_of(settings, pipeline.read(settings.data), encoder))
    return programs.Job(settings, architecture, doctor.mesh_of(settings.compute.mesh), batch)


@pytest.mark.parametrize(("program", "more"), [(options.SFT, {}), (options.GRPO, {"samples": 2})], ids=["sft", "grpo"])
def test_the_programs_of_a_run_are_lowered_without_any_array(toys, program, more):
    found = programs.of(job_of(toys, program, **more))
    assert set(found) == ({"update", "rollout", "reference"} if program is options.GRPO else {"update"})
    assert all("sharding" in each.lower().as_text() for each in found.values())


@pytest.mark.parametrize("program", [options.SFT, options.GRPO])
def test_a_blank_batch_has_the_shape_of_a_real_one(toys, program):
    job = job_of(toys, program)
    lengths = job.batch.prefix_unit_BP
    text = lengths.shape[1] - int((lengths[0] >= 0).sum())
    lanes = job.shape._replace(lanes=job.batch.branch_ids_BJT.shape[1], lane_tokens=job.batch.branch_ids_BJT.shape[2])
    lanes = lanes._replace(scored=job.batch.score_target_BL.shape[1])
    encoder = hf.encoder_of(toys[0], job.architecture)
    blank = programs.blank_batch(job.architecture, encoder.preprocessor.resized(112, 84), text, lanes, 8)
    for name, ours, real in zip(blank._fields, blank, job.batch, strict=True):
        assert (ours.shape, ours.dtype) == (real.shape, real.dtype), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft_3b", "grpo_3b"])
def test_the_estimate_is_close_to_what_the_compiler_says(real_folder, endoscopy, name):
    path, folder = CONFIGS / f"{name}.yaml", real_folder("3b")
    overrides = [f"--model={folder}", f"--data.root={endoscopy}", "--data.frames=8", "--compute.dtype=float32"]
    job = job_for(options.load(path, overrides), folder)
    by_compiler, by_arithmetic = memory.compiled(job), memory.estimated(job)
    print(by_compiler, by_arithmetic, sep="\n")
    assert by_compiler[:4] == by_arithmetic[:4]
    assert 0.7 < by_arithmetic.peak / by_compiler.peak < 1.4


def test_lasting_memory_is_counted_by_shape_and_sharding(toys):
    job = job_of(toys, options.GRPO, samples=2, objective={"beta": 0.04})
    bytes_of = memory.estimated(job)
    total = 4 * sum(leaf.size for leaf in jax.tree.leaves(job.params))
    assert total / 8 <= bytes_of.parameters < total / 4  # norms and biases are on every device
    assert bytes_of.reference == bytes_of.gradients == bytes_of.parameters
    assert bytes_of.moments == pytest.approx(2 * bytes_of.parameters, rel=0.01)
    assert memory.estimated(job_of(toys, options.GRPO, objective={"beta": 0.0})).reference == 0


def test_what_the_hosts_memory_keeps_takes_nothing_of_the_devices(toys):
    more = dict(samples=2, objective={"beta": 0.04})
    plain = memory.estimated(job_of(toys, options.GRPO, **more))
    job = job_of(toys, options.GRPO, offload=True, **more)
    found, (state, _) = memory.estimated(job), programs.state_of(job)
    assert found.reference == 0 and found.moments < 100  # counters stay
    assert found.offloaded == plain.moments + plain.reference - found.moments
    assert found.peak < plain.peak - plain.moments
    assert programs.bytes_of(state.train.params) == plain.parameters
    every = programs.of(job)
    assert every["rollout"].beside == found.moments and every["update"].beside == 0


def test_flash_kernels_hold_no_scores_and_are_reckoned_on_a_machine_that_cannot_run_them(toys):
    job = job_of(toys, options.SFT)
    compute = job.settings.compute.model_copy(update=dict(attention="pallas"))
    flash = job._replace(settings=job.settings.model_copy(update=dict(compute=compute)))
    assert memory.estimated(flash).activations < memory.estimated(job).activations


def test_adapters_leave_gradients_moments_and_reference_to_themselves(toys):
    whole = memory.estimated(job_of(toys, options.GRPO, samples=2, objective={"beta": 0.04}))
    adapted = {
        base: memory.estimated(
            job_of(toys, options.GRPO, samples=2, objective={"beta": 0.04}, lora=options.Lora(rank=2, base=base))
        )
        for base in ("float32", "bfloat16", "nf4")
    }
    for found in adapted.values():
        assert found.reference == 0 and found.gradients < 0.2 * whole.gradients
        assert found.moments == pytest.approx(2 * found.gradients, rel=0.01)
    held = {base: found.parameters - found.gradients for base, found in adapted.items()}
    assert held["float32"] == whole.parameters == 2 * held["bfloat16"] and held["nf4"] < held["bfloat16"]


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_the_programs_of_a_run_of_adapters_are_lowered_too(toys, base):
    adapters = options.Lora(rank=2, base=base, dropout=0.1)
    for each in programs.of(job_of(toys, options.GRPO, samples=2, lora=adapters)).values():
        assert "sharding" in each.lower().as_text()


def test_a_small_model_is_compiled_and_a_large_one_reckoned(tmp_path, toys, capsys, monkeypatch):
    told = memory.Bytes(1 << 20, 0, 0, 0, 5 << 30, 0, 0, "compiled")
    monkeypatch.setattr(memory, "compiled", lambda job: told)
    path = toy_settings(tmp_path, toys, "targets: {reasoning: 1.0}\n")
    assert run_doctor(path) == 0
    printed = capsys.readouterr().out
    assert "the compiled step" in printed
    assert "5.00 GiB" in printed
    monkeypatch.setattr(doctor, "SMALL", 0)
    assert run_doctor(path) == 0
    assert "estimated, within a factor of two" in capsys.readouterr().out


def test_settings_of_the_file_reach_the_report(tmp_path, toys, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "SMALL", 0)
    path = toy_settings(tmp_path, toys, "targets: {reasoning: 1.0}\noptimizer: {learning_rate: 0.002}\n")
    assert run_doctor(path, ["--schedule.steps=77"]) == 0
    printed = capsys.readouterr().out
    assert "SFT, 77 steps of 8 frames" in printed
    assert "rate 0.002" in printed
    assert config.load(options.SFT, path).schedule.steps != 77


def test_a_folder_is_described(toys, capsys):
    assert cli.main(["doctor", "--checkpoint", str(toys[0])]) == 0
    printed = capsys.readouterr().out
    architecture = hf.read_config(toys[0])
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(model.build(architecture)[1])))
    words = printed.split()
    assert f"{count:,}" in words and "float32" in words
    for part in ("Qwen2.5-VL, model_type qwen2_5_vl", "28 x 28 pixels", "whole pixels of the image", "rows of padding"):
        assert part in printed, part
    assert f"{architecture.text.vocab_size:,} rows" in printed


@pytest.mark.parametrize("words", [[], ["--config", "a.yaml", "--checkpoint", "b"]])
def test_a_run_or_a_folder_not_both_nor_neither(words, capsys):
    assert cli.main(["doctor", *words]) == 2
    assert "give either --config FILE or --checkpoint DIR" in capsys.readouterr().err
