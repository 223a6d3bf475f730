"""Qwen3-VL: a tower with learned places and DeepStack, a decoder with normed queries and keys, boxes in thousandths.

Source: transformers:models/qwen3_vl.
"""

import functools
import math

import jax

from surgery_r1_jax import codec, decoder, layers, vision_qwen3, weights
from surgery_r1_jax.family import TOWER, Family, same, sections, size, supported, text_sizes, whole_image

GELU_MLP = functools.partial(layers.MLP, activation=jax.nn.gelu)  # the tanh approximation, as jax has it by default
LAYER = "model.language_model.layers.{i}"

NAMES: weights.Names = {
    **weights.attention("model.language_model", bias=False),
    **weights.norm("decoder.blocks.q_norm", f"{LAYER}.self_attn.q_norm"),
    **weights.norm("decoder.blocks.k_norm", f"{LAYER}.self_attn.k_norm"),
    **weights.gated_mlp("decoder.blocks.mlp", f"{LAYER}.mlp"),
    **weights.tower("model.visual", norm_bias=True),
    "tower.patch_embed.bias": ("model.visual.patch_embed.proj.bias", weights.SAME),
    "tower.places": ("model.visual.pos_embed.weight", weights.SAME),
    **weights.dense("tower.blocks.mlp.up", "model.visual.blocks.{i}.mlp.linear_fc1", bias=True),
    **weights.dense("tower.blocks.mlp.down", "model.visual.blocks.{i}.mlp.linear_fc2", bias=True),
    **weights.norm("tower.merger.norm", "model.visual.merger.norm", bias=True),
    **weights.dense("tower.merger.up", "model.visual.merger.linear_fc1", bias=True),
    **weights.dense("tower.merger.down", "model.visual.merger.linear_fc2", bias=True),
    **weights.norm("tower.deep.norm", "model.visual.deepstack_merger_list.{i}.norm", bias=True),
    **weights.dense("tower.deep.up", "model.visual.deepstack_merger_list.{i}.linear_fc1", bias=True),
    **weights.dense("tower.deep.down", "model.visual.deepstack_merger_list.{i}.linear_fc2", bias=True),
}


def text_config(text) -> decoder.Config:
    """The decoder."""
    supported("attention_bias", bool(text.attention_bias), False)
    supported("hidden_act", text.hidden_act, "silu")
    time, row, column = sections(text)
    axes = [0] * (time + row + column)  # interleaved: row and column take every third frequency from the first ones
    if (len(axes[1 : 3 * row : 3]), len(axes[2 : 3 * column : 3])) != (row, column):
        raise ValueError(
            f"mrope_section {[time, row, column]} cannot be interleaved; copy the file from the checkpoint"
        )
    axes[1 : 3 * row : 3] = [1] * row
    axes[2 : 3 * column : 3] = [2] * column
    return decoder.Config(
        **text_sizes(text),
        rope_axes=tuple(axes),
        qkv_bias=False,
        qk_norm=True,
    )


def tower_config(tower) -> vision_qwen3.Config:
    """The tower."""
    supported("vision_config.hidden_act", tower.hidden_act, "gelu_pytorch_tanh")
    places = size("vision_config.num_position_embeddings", tower.num_position_embeddings)
    supported("vision_config.num_position_embeddings", places, math.isqrt(places) ** 2)
    deep = tower.deepstack_visual_indexes
    if not isinstance(deep, list | tuple) or not set(deep) <= set(range(tower.depth)) or len(set(deep)) < len(deep):
        what = f"vision_config.deepstack_visual_indexes {deep} must be layers below depth {tower.depth}"
        raise ValueError(f"{what}; copy the file from the checkpoint")
    return vision_qwen3.Config(
        **same(tower, (*TOWER, "hidden_size", "intermediate_size", "out_hidden_size")),
        **whole_image(tower),
        norm=layers.LayerNorm,
        mlp=GELU_MLP,
        places=math.isqrt(places),
        deep_layers=tuple(deep),
    )


FAMILY = Family("qwen3_vl", "Qwen3-VL", NAMES, codec.PER_MILLE, text_config, tower_config)
