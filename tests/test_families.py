"""Every family takes the whole road: a folder, SFT, GRPO, export, and back into transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import randomised
import toy
from toy import few_devices, quick_compile  # noqa: F401

from surgery_r1_jax import checkpoint, codec, families, grpo, hf, images, log, model, options, sft, sharding, tiny

PATCH = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16, "qwen3_vl_moe": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy.write_data(tmp_path_factory.mktemp("families") / "data", frames=8)


@pytest.fixture(params=families.FAMILIES)
def start(request, tmp_path):
    """A folder of the family with random weights and the tiny tokenizer."""
    bare = tiny.write_folder(tmp_path / "bare", toy.SIZES)
    ours = json.loads((bare / "config.json").read_text())
    whole = randomised.configuration(request.param, tied=True)
    for name in ("vocab_size", "eos_token_id", "pad_token_id"):
        setattr(whole.text_config, name, ours["text_config"][name])
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(whole, name, ours[name])
    whole.save_pretrained(bare)
    patch = PATCH[request.param]
    images.Preprocessor(patch, 2, 2, 4 * 28 * 28, 12 * 28 * 28, tiny.MEAN, tiny.STD).to_folder(bare)
    settings = hf.read_config(bare)
    assert (settings.family, settings.vision.patch_size) == (request.param, patch)
    return hf.write_folder(tmp_path / "start", toy.params(settings, spread=0.05), settings, bare)


def test_a_family_is_trained_reinforced_exported_and_loaded_again(start, data, tmp_path, uneven_rewards):
    common = dict(
        data=options.Data(root=str(data), frames=2, questions=2),
        optimizer=options.Optimizer(learning_rate=1e-3),
        schedule=options.Schedule(steps=2, log_every=1),
        evaluation=options.Evaluation(frames=2, questions=2, limit=2, max_tokens=4),
    )
    sft.train(options.SFT(model=str(start), **common), tmp_path / "sft")
    reinforce = dict(samples=4, sampler=options.Sampler(max_tokens=4), objective=options.Objective(beta=0.0))
    grpo.train(options.GRPO(model=str(tmp_path / "sft"), **reinforce, **common), tmp_path / "grpo")
    for name in ("sft", "grpo"):
        rows = [row for row in log.read_metrics(tmp_path / name / "metrics.jsonl") if row["split"] == "train"]
        assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)
        assert any(row["grad_norm"] > 0 for row in rows)  # of two samples both may earn the same
        assert rows[-1]["skipped_steps"] == 0

    out = checkpoint.export(tmp_path / "grpo", tmp_path / "hf", which="last")
    settings = hf.read_config(out)
    box_codec = hf.encoder_of(out, settings).codec
    assert box_codec is (codec.RESIZED_PIXELS if settings.family == "qwen2_5_vl" else codec.PER_MILLE)
    pytest.importorskip("torch", reason="transformers loads models with PyTorch")
    import transformers

    _, info = transformers.AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_a_reference_kept_in_bfloat16_scores_as_the_one_it_is_a_copy_of():
    """Of the family that has every kind of parameter: experts, places, norms with and without bias."""
    config = families.FAMILIES["qwen3_vl_moe"].architecture(randomised.configuration("qwen3_vl_moe", tied=False))
    params = toy.params(config)
    copy = grpo.frozen_copy(params, options.Compute(dtype="bfloat16"))
    kept = grpo.frozen_copy(params, options.Compute(dtype="bfloat16", offload=True))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(kept)} == {sharding.HOST}
    for ours, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(copy), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert size(copy) < 0.52 * size(params)
    batch = randomised.batch(config, [randomised.frame(1, grids=((4, 6),), lengths=(5, 5), patch=16)])
    graph, _ = model.build(config, options.Compute(dtype="bfloat16"))

    @jax.jit
    def scored(params):
        net = model.bind(graph, params)
        return net.scored(batch), net.unembed_VD.astype(jnp.bfloat16)

    for ours, theirs in zip(scored(copy), scored(params), strict=True):
        assert jnp.array_equal(ours, theirs)
    coarse = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)  # norms and places too: this is another model
    assert not jnp.array_equal(scored(coarse)[0], scored(params)[0])
