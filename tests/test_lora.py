"""Adapters: the same as peft's, nought at the start, alone trained, and the base beside them held once."""

import gc
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import randomised
import toy
from flax import nnx
from flax.traverse_util import flatten_dict
from toy import few_devices, quick_compile  # noqa: F401

from surgery_r1_jax import (
    checkpoint,
    doctor,
    errors,
    grpo,
    hf,
    log,
    lora,
    model,
    options,
    peft,
    run,
    sft,
    sharding,
    tiny,
)

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
ALL = ("tower", "merger", "decoder")


def drawn(config, settings, seed=0):
    """Adapters none of whose numbers is nought."""
    _, abstract = lora.build(config, options.Compute(), settings)
    rng = np.random.default_rng(seed)
    adapters, _ = lora.split(nnx.to_pure_dict(abstract))
    return jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32)), adapters)


NONE = options.Lora()


def logits(config, params, batch, settings=NONE):
    """Branch logits of a model with adapters, or of one without."""
    graph, _ = lora.build(config, options.Compute(), settings)

    def forward(params, batch):
        net = model.bind(graph, params)
        return net.hidden(batch) @ net.unembed_VD.T

    return np.asarray(jax.jit(forward)(params, batch))


# Which layers


def test_parts_and_patterns_choose_layers(config):
    decoder = lora.chosen(config, ("decoder",))
    assert [path.removeprefix("decoder.blocks.") for path in decoder] == [
        *("q", "k", "v", "o", "mlp.gate", "mlp.up", "mlp.down")
    ]
    assert lora.chosen(config, ("q_proj", "v_proj")) == ["decoder.blocks.q", "decoder.blocks.v"]
    assert lora.chosen(config, ("merger",)) == ["tower.merger.up", "tower.merger.down"]
    assert lora.chosen(config, ("model.visual.blocks.*.attn.*",)) == ["tower.blocks.qkv", "tower.blocks.proj"]
    assert lora.chosen(config, ("gate_proj",)) == ["decoder.blocks.mlp.gate", "tower.blocks.mlp.gate"]
    everything = lora.chosen(config, ALL)
    assert len(everything) == 14 and "tower.patch_embed" not in everything


@pytest.mark.parametrize("target", ["patch_embed.proj", "lm_head", "embed_tokens", "layers.0.*", "k_norm", "nonsense"])
def test_what_is_no_linear_layer_is_refused_with_those_there_are(config, target):
    with pytest.raises(errors.InputError, match=r"names no linear layer; take tower, merger, decoder, or .* q_proj"):
        lora.chosen(config, (target,))


def test_fused_experts_are_refused_by_name(oracle):
    folder, _ = oracle(family="qwen3_vl_moe")
    config = hf.read_config(folder)
    assert lora.chosen(config, ("decoder",)) == [f"decoder.blocks.{name}" for name in "qkvo"]
    for target in ("experts.*", "mlp.experts.down_proj"):
        with pytest.raises(errors.InputError, match="names experts, which are fused: they cannot be adapted"):
            lora.chosen(config, (target,))
    with pytest.raises(errors.InputError, match="names no linear layer"):
        lora.chosen(config, ("mlp.gate",))  # the router


# What they compute


def test_fresh_adapters_change_nothing_and_the_merged_model_computes_the_same(config, params):
    settings = options.Lora(rank=4, alpha=8, targets=ALL)
    frames = [randomised.frame(1), randomised.frame(2, grids=((4, 6),))]
    batch = randomised.batch(config, frames)
    base = logits(config, params, batch)
    _, abstract = lora.build(config, options.Compute(), settings)
    shardings, _ = lora.split(sharding.of_params(abstract, sharding.make_mesh()))
    fresh = lora.init(config, settings, 0, shardings)
    np.testing.assert_array_equal(logits(config, model.joined(params, fresh), batch, settings), base)
    for path, leaf in flatten_dict(fresh).items():
        fan_in = np.prod(leaf.shape[int(model.is_stacked(path)) : -1])
        assert (np.abs(leaf).max() == 0) if path[-1] == "b" else (0.8 < np.abs(leaf).max() * fan_in**0.5 <= 1)

    adapters = drawn(config, settings)
    adapted = logits(config, model.joined(params, adapters), batch, settings)
    assert np.abs(adapted - base).max() > 0.1
    merged = lora.merged(jax.tree.map(jnp.copy, params), adapters, settings)
    np.testing.assert_allclose(logits(config, merged, batch), adapted, atol=2e-5)
    rs = settings.model_copy(update=dict(rslora=True))
    assert rs.scale == 2 * settings.scale == 4
    assert np.abs(logits(config, model.joined(params, adapters), batch, rs) - adapted).max() > 0.1


def test_dropout_is_drawn_anew_for_every_step_and_layer_and_keeps_the_mean(config, params):
    settings = options.Lora(rank=4, alpha=8, dropout=0.5, targets=("q_proj", "merger"))
    still = settings.model_copy(update=dict(dropout=0.0))
    batch = randomised.batch(config, [randomised.frame(1, grids=((4, 6),), lengths=(5,))])
    adapters = jax.tree.map(lambda leaf: 0.05 * leaf, drawn(config, settings))  # small: nearly linear
    graph, _ = lora.build(config, options.Compute(), settings)
    assert lora.noise(adapters, still, jax.random.key(0)) == {}

    @jax.jit
    @jax.vmap
    def noisy(key):
        net = model.bind(graph, model.joined(params, adapters, lora.noise(adapters, settings, key)))
        return net.hidden(batch)

    found = np.asarray(noisy(jax.random.split(jax.random.key(1), 256)))
    again = np.asarray(noisy(jax.random.split(jax.random.key(1), 256)))
    np.testing.assert_array_equal(found, again)
    spread = found.std(0).max()
    assert spread > 1e-4
    graph, _ = lora.build(config, options.Compute(), still)
    mean = np.asarray(model.bind(graph, model.joined(params, adapters)).hidden(batch))
    assert np.abs(found.mean(0) - mean).max() < 5 * spread / 256**0.5
    keys = flatten_dict(lora.noise(adapters, settings, jax.random.key(0)))
    assert len(np.unique(np.concatenate([jax.random.key_data(k).reshape(-1, 2) for k in keys.values()]), axis=0)) == 4


# Against peft


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, oracle):
    """A base folder, its torch model, and the architecture."""
    pytest.importorskip("peft", reason="adapters are compared with peft's, which needs PyTorch")
    folder, reference = oracle(family=request.param)
    return folder, reference, hf.read_config(folder)


def torch_logits(network, config, frame):
    """Logits of a frame's first branch by the torch model."""
    import torch

    ids = torch.from_numpy(frame.flat(0)[None].astype(np.int64))
    with torch.no_grad():
        out = network(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == randomised.IMAGE).int(),
            pixel_values=torch.from_numpy(frame.patches),
            image_grid_thw=torch.tensor([(1, *grid) for grid in frame.grids]),
        )
    return out.logits[0, len(frame.prefix) :].numpy()


def frame_of(config):
    return randomised.frame(3, grids=((4, 6), (6, 8)), lengths=(7,), patch=config.vision.patch_size)


def test_peft_reads_our_adapters_and_computes_the_same(family, tmp_path):
    from peft import PeftModel

    folder, reference, config = family
    rslora = config.family in ("qwen2_vl", "qwen3_vl")  # the others by alpha / rank
    settings = options.Lora(rank=4, alpha=6, dropout=0.1, rslora=rslora, targets=ALL)
    adapters = drawn(config, settings)
    peft.write(tmp_path / "adapter", adapters, settings, config, base=str(folder), digest="0" * 64)
    frame, params = frame_of(config), hf.read_params(folder, config)
    still = settings.model_copy(update=dict(dropout=0.0))
    ours = logits(config, model.joined(params, adapters), randomised.batch(config, [frame]), still)[0, 0]
    before = torch_logits(reference, config, frame)
    network = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    try:
        theirs = torch_logits(network, config, frame)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        assert np.abs(theirs - before).max() > 0.1, "the adapter does something"
        adapted = sum("lora_A" in name for name, _ in network.named_parameters())
        layers = sum(
            path[-1] == "a" and (leaf.shape[0] if model.is_stacked(path) else 1)
            for path, leaf in flatten_dict(adapters).items()
        )
        assert adapted == layers
    finally:
        network.unload()


def test_we_read_pefts_adapters_and_compute_the_same(family, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    folder, reference, config = family
    experts = "moe" in config.family
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "qkv"] + ["gate_proj", "up_proj", "down_proj"] * (not experts)
    names = [name for name in names if name in {module.rsplit(".", 1)[-1] for module in lora.linears(config).values()}]
    network = get_peft_model(reference, LoraConfig(r=3, lora_alpha=5, target_modules=names, use_rslora=True)).eval()
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        network.save_pretrained(tmp_path / "adapter")
        frame = frame_of(config)
        theirs = torch_logits(network, config, frame)
    finally:
        network.unload()
    rewrite(tmp_path / "adapter", base_model_name_or_path=str(folder))
    loaded = checkpoint.load_model(tmp_path / "adapter")
    assert loaded.folder == folder
    merged = logits(config, loaded.params, randomised.batch(config, [frame]))[0, 0]
    np.testing.assert_allclose(merged, theirs, atol=1e-4)
    settings, adapters = peft.read(tmp_path / "adapter", config)
    assert (settings.rank, settings.alpha, settings.rslora) == (3, 5, True)
    params = hf.read_params(folder, config)
    apart = logits(config, model.joined(params, adapters), randomised.batch(config, [frame]), settings)[0, 0]
    np.testing.assert_allclose(apart, theirs, atol=1e-4)


def rewrite(folder, **changes):
    """Change keys of an adapter's configuration; None removes one."""
    path = folder / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Runs


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
    run.prepare(tmp_path, settings_of(options.SFT, place, lora=NONE), resume=False)
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
