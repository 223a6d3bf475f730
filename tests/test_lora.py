"""Adapters: which layers have them, what they compute, and that it is the same in peft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import randomised
from flax import nnx
from flax.traverse_util import flatten_dict
from toy import few_devices, quick_compile  # noqa: F401

from surgery_r1_jax import checkpoint, errors, hf, lora, model, options, peft, sharding

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
ALL = ("tower", "merger", "decoder")
NONE = options.Lora()


def drawn(config, settings, seed=0):
    """Adapters none of whose numbers is nought."""
    _, abstract = lora.build(config, options.Compute(), settings)
    rng = np.random.default_rng(seed)
    adapters, _ = lora.split(nnx.to_pure_dict(abstract))
    return jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32)), adapters)


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
    yield folder, reference, hf.read_config(folder)
    reference.requires_grad_(True)  # peft froze it, and other tests want its gradients


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
        network.peft_config["default"].base_model_name_or_path = str(folder)
        network.save_pretrained(tmp_path / "adapter")
        frame = frame_of(config)
        theirs = torch_logits(network, config, frame)
    finally:
        network.unload()
    loaded = checkpoint.load_model(tmp_path / "adapter")
    assert loaded.folder == folder
    merged = logits(config, loaded.params, randomised.batch(config, [frame]))[0, 0]
    np.testing.assert_allclose(merged, theirs, atol=1e-4)
    settings, adapters = peft.read(tmp_path / "adapter", config)
    assert (settings.rank, settings.alpha, settings.rslora) == (3, 5, True)
    params = hf.read_params(folder, config)
    apart = logits(config, model.joined(params, adapters), randomised.batch(config, [frame]), settings)[0, 0]
    np.testing.assert_allclose(apart, theirs, atol=1e-4)
