"""Runs of adapters: they alone are trained and saved, the base beside them held once, and they find it again."""

import gc
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy
from flax.traverse_util import flatten_dict
from toy import few_devices, quick_compile  # noqa: F401

from surgery_r1_jax import checkpoint, doctor, errors, grpo, hf, log, options, peft, run, sft, tiny

ALL = ("tower", "merger", "decoder")


def rewrite(folder, **changes):
    """Change keys of an adapter's configuration."""
    path = folder / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return toy.write_start(tmp_path_factory.mktemp("lora"), frames=8)


def settings_of(program, place, **more):
    more = {"lora": options.Lora(rank=4, alpha=32, dropout=0.05, targets=ALL), "model": str(place / "start")} | more
    if program is options.GRPO:
        more = {
            "samples": 2,
            "sampler": options.Sampler(max_tokens=8),
            "objective": options.Objective(beta=0.04),
        } | more
    return program(
        data=options.Data(root=str(place / "data"), frames=4, questions=2),
        optimizer=options.Optimizer(learning_rate=1e-2, warmup=0.0, schedule="constant"),
        evaluation=options.Evaluation(split="train", frames=4, questions=3, max_tokens=8),
        **{"schedule": options.Schedule(steps=4, save_every=2, log_every=1)} | more,
    )


@pytest.fixture(scope="module")
def trained(place):
    """An SFT run of adapters."""
    settings = settings_of(options.SFT, place, schedule=options.Schedule(steps=20, save_every=10, log_every=1))
    sft.train(settings, place / "sft")
    return place / "sft"


def saved_state(run_folder):
    """The last checkpoint of a run, as it lies on disk."""
    last = max((run_folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return ocp.StandardCheckpointer().restore((last / "state").absolute())


def test_adapters_learn_and_nothing_else_is_trained_or_saved(place, trained):
    losses = [row["loss"] for row in log.read_metrics(trained / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    state = saved_state(trained)
    paths = flatten_dict(state["params"])
    assert paths and all("lora" in path for path in paths)
    count = lambda tree: sum(np.size(leaf) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(state["opt_state"]) <= 2 * count(state["params"]) + 4
    base, merged = hf.read_params(place / "start", hf.read_config(place / "start")), checkpoint.load_model(trained)
    moved = {path for path, leaf in flatten_dict(base).items() if np.any(leaf != flatten_dict(merged.params)[path])}
    assert moved == {(*path[:-2], "kernel") for path in paths}


def test_an_adapter_is_exported_both_ways_and_read_back(place, trained, tmp_path):
    whole = checkpoint.load_model(trained).params
    checkpoint.export(trained, tmp_path / "merged", merge=True)
    checkpoint.export(trained, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        *("README.md", peft.CONFIG, peft.WEIGHTS, hf.CLASSES)
    ]
    assert "library_name: peft" in (tmp_path / "adapter" / "README.md").read_text()
    for folder in ("merged", "adapter"):
        found = checkpoint.load_model(tmp_path / folder).params
        jax.tree.map(np.testing.assert_array_equal, found, whole)
    with pytest.raises(errors.InputError, match="holds a whole model and no adapters; export it without --merge"):
        checkpoint.export(place / "start", tmp_path / "again", merge=True)


@pytest.mark.parametrize("program", [options.SFT, options.GRPO], ids=["sft", "grpo"])
def test_a_stopped_run_of_adapters_goes_on_bit_for_bit(place, tmp_path, uneven_rewards, program):
    train = sft.train if program is options.SFT else grpo.train
    adapters = options.Lora(rank=4, alpha=32, dropout=0.05, targets=("q_proj", "down_proj", "merger"))
    settings = settings_of(program, place, lora=adapters)
    train(settings, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    train(settings, tmp_path / "cut", resume=True)
    whole, cut = saved_state(tmp_path / "whole"), saved_state(tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    assert any(np.any(leaf) for path, leaf in flatten_dict(whole["params"]).items() if path[-1] == "b")


def test_grpo_keeps_the_base_once_and_it_serves_as_the_reference(place, tmp_path, monkeypatch, uneven_rewards):
    """Arrays of the sizes of the model's weights that live in the middle of a step: base and reference are one."""
    reference_logp, seen = grpo.reference_logp, {}
    gc.collect()
    others = {id(array) for array in jax.live_arrays()}

    def watched(graph, settings, params, *rest):
        sizes = {leaf.shape for leaf in jax.tree.leaves(params)}
        seen["reference"] = params
        mine = [array for array in jax.live_arrays() if array.shape in sizes and id(array) not in others]
        seen["bytes"] = sum(array.nbytes for array in mine)
        return reference_logp(graph, settings, params, *rest)

    monkeypatch.setattr(grpo, "reference_logp", watched)
    setups, prepare = [], run.prepare
    monkeypatch.setattr(run, "prepare", lambda *args, **how: setups.append(prepare(*args, **how)) or setups[-1])
    used = {}
    for name, rank in (("adapters", 2), ("whole", 0)):
        settings = settings_of(
            options.GRPO, place, lora=options.Lora(rank=rank), schedule=options.Schedule(steps=1, log_every=1)
        )
        grpo.train(settings, tmp_path / name)
        used[name] = seen["bytes"]
        (row,) = [row for row in log.read_metrics(tmp_path / name / "metrics.jsonl") if "kl" in row]
        assert abs(row["kl"]) < 1e-6, "both start on their reference"
        if rank:
            ours, frozen = flatten_dict(seen["reference"]), flatten_dict(setups[-1].frozen)
            assert ours.keys() == frozen.keys() and all(ours[path] is frozen[path] for path in ours)
            model_bytes = sum(leaf.nbytes for leaf in frozen.values())
            del ours, frozen
        seen.clear()
        setups.clear()
        gc.collect()
    assert used["adapters"] < 1.1 * model_bytes, "one copy"
    assert 3.9 < used["whole"] / model_bytes < 4.1, "weights, two moments and the reference"


def test_adapters_of_another_base_are_refused(place, trained, tmp_path):
    run_copy = shutil.copytree(trained, tmp_path / "run")
    other = toy.write_model(tmp_path / "other", seed=1)
    base = json.loads((run_copy / "model" / "base.json").read_text())
    (run_copy / "model" / "base.json").write_text(json.dumps(base | {"path": str(other)}))
    with pytest.raises(errors.InputError, match=r"its adapters were trained on another model than .* holds now"):
        checkpoint.load_model(run_copy)
    with pytest.raises(errors.InputError, match="was started with other settings of lora, or on another model"):
        settings = settings_of(options.SFT, place, model=str(other))
        sft.train(settings, run_copy, resume=True)
    checkpoint.export(trained, tmp_path / "adapter")
    rewrite(tmp_path / "adapter", base_model_name_or_path=str(other))
    with pytest.raises(errors.InputError, match="trained on another model than"):
        checkpoint.load_model(tmp_path / "adapter")
    wide = toy.write_model(tmp_path / "wide", sizes=tiny.Sizes(**{**vars(toy.SIZES), "hidden": 64, "heads": 4}))
    rewrite(tmp_path / "adapter", base_model_name_or_path=str(wide))
    with pytest.raises(errors.InputError, match=r"has shape .* the base makes it .* an adapter for another base model"):
        checkpoint.load_model(tmp_path / "adapter")
    rewrite(tmp_path / "adapter", base_model_name_or_path="Nobody/has-this-model")
    with pytest.raises(errors.InputError, match="its base model 'Nobody/has-this-model' is not here; set base_model"):
        checkpoint.load_model(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3 is not supported, only LORA"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"some_day": {"a": 1}}, "some_day"),
        ({"init_lora_weights": "pissa"}, "changes the base model"),
        ({"r": 0}, "r is 0, its tensors have 4"),
        ({"r": "four"}, "r is 'four', its tensors have 4"),
        ({"base_model_name_or_path": "x" * 5000}, "its base model 'xxx"),
        ({"lora_alpha": None}, "r, lora_alpha or lora_dropout is amiss"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_peft_can_do_beyond_is_refused_by_name(trained, tmp_path, changes, says):
    checkpoint.export(trained, tmp_path / "adapter")
    rewrite(tmp_path / "adapter", **changes)
    with pytest.raises(errors.InputError, match=says) as caught:
        checkpoint.load_model(tmp_path / "adapter")
    assert "\n" not in str(caught.value) and str(tmp_path / "adapter") in str(caught.value)


def test_adapters_on_adapters_know_their_base_whatever_it_is_kept_in(place, trained, tmp_path):
    plan, adapters = options.Schedule(steps=1, log_every=1), options.Lora(rank=2, base="bfloat16")
    settings = settings_of(options.SFT, place, model=str(trained), lora=adapters, schedule=plan)
    sft.train(settings, tmp_path / "second")
    first, second = checkpoint.load_model(trained), checkpoint.load_model(tmp_path / "second")
    assert checkpoint.identity(first) != checkpoint.identity(second)
    assert jax.tree.structure(first.params) == jax.tree.structure(second.params)
    with pytest.raises(errors.InputError, match="which is no Hugging Face folder; export with --merge"):
        checkpoint.export(tmp_path / "second", tmp_path / "adapter")
    checkpoint.export(tmp_path / "second", tmp_path / "merged", merge=True)


def test_the_doctor_tells_of_adapters_and_of_their_base(place, trained, tmp_path, capsys):
    checkpoint.export(trained, tmp_path / "adapter")
    for path in (trained, tmp_path / "adapter"):
        assert doctor.describe(path) == 0
        told = capsys.readouterr().out
        assert f"adapters: of {place / 'start'}" in told and "rank        4, " in told


def test_adapters_that_are_each_others_base_are_refused(trained, tmp_path):
    for name, other in (("x", "y"), ("y", "x")):
        checkpoint.export(trained, tmp_path / name)
        rewrite(tmp_path / name, base_model_name_or_path=str(tmp_path / other))
    with pytest.raises(errors.InputError, match="is its own base by way of others"):
        checkpoint.load_model(tmp_path / "x")
    copy = shutil.copytree(trained, tmp_path / "run")
    base = json.loads((copy / "model" / "base.json").read_text())
    for path, says in (
        (copy, "is its own base by way of others"),
        (tmp_path / "gone", "is not here; write where it is"),
    ):
        (copy / "model" / "base.json").write_text(json.dumps(base | {"path": str(path)}))
        with pytest.raises(errors.InputError, match=says):
            checkpoint.load_model(copy)
    with pytest.raises(errors.InputError, match="holds adapters; export it with --merge first"):
        checkpoint.import_folder(tmp_path / "x", tmp_path / "imported")


def test_a_start_without_adapters_forgets_those_of_one_that_died(place, tmp_path):
    run.prepare(tmp_path, settings_of(options.SFT, place), resume=False)
    assert checkpoint.Base.of(tmp_path) is not None
    run.prepare(tmp_path, settings_of(options.SFT, place, lora=options.Lora()), resume=False)
    assert checkpoint.Base.of(tmp_path) is None


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_a_base_in_four_bits_is_small_and_its_adapters_learn(place, tmp_path, kind):
    pytest.importorskip("qwix", reason="a base in four bits is packed by qwix")
    plan = options.Schedule(steps=20, save_every=20, log_every=1)
    lora_settings = options.Lora(rank=4, alpha=32, base=kind)
    compute = options.Compute(remat=True)
    settings = settings_of(options.SFT, place, lora=lora_settings, schedule=plan, compute=compute)
    setup = run.prepare(tmp_path / "look", settings, resume=False)
    kernel, base = (
        setup.frozen["decoder"]["blocks"]["mlp"]["up"]["kernel"],
        hf.read_params(place / "start", setup.model),
    )
    true = base["decoder"]["blocks"]["mlp"]["up"]["kernel"]
    off = np.linalg.norm(kernel.astype(jnp.float32) - true) / np.linalg.norm(true)
    assert 0.05 < off < 0.15, "as much as sixteen levels for a block of normal numbers lose"
    held = jax.jit(lambda kernel: kernel.astype(jnp.float32)).lower(kernel).compile().memory_analysis()
    assert held.argument_size_in_bytes < 0.32 * 2 * true.size, "of what bfloat16 takes, blocks being half as long here"
    assert isinstance(setup.frozen["tower"]["merger"]["up"]["kernel"], jax.Array)
    sft.train(settings, tmp_path / "run")
    losses = [row["loss"] for row in log.read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert checkpoint.load_model(tmp_path / "run").params


def test_adapters_over_a_packed_base_learn_the_same_on_a_mesh(place, tmp_path):
    pytest.importorskip("qwix", reason="a base in four bits is packed by qwix")
    adapters = options.Lora(rank=4, alpha=32, dropout=0.05, targets=ALL, base="nf4")
    losses = {}
    for mesh in ((1, 1, 1), (1, 2, 2)):
        plan = options.Schedule(steps=3, save_every=3, log_every=1)
        compute = options.Compute(mesh=mesh, remat=True)
        settings = settings_of(options.SFT, place, lora=adapters, schedule=plan, compute=compute)
        out = tmp_path / str(mesh)
        sft.train(settings, out)
        losses[mesh] = [row["loss"] for row in log.read_metrics(out / "metrics.jsonl") if "loss" in row]
    np.testing.assert_allclose(*losses.values(), rtol=1e-5)


def test_without_qwix_a_base_in_four_bits_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(errors.InputError, match="need qwix; pip install qwix, or take bfloat16"):
        settings = settings_of(
            options.SFT, place, lora=options.Lora(rank=2, base="nf4"), compute=options.Compute(remat=True)
        )
        run.prepare(tmp_path, settings, resume=False)
