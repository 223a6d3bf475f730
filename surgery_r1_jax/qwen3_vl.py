"""Qwen3-VL: a tower with learned places and DeepStack, a decoder with normed queries and keys, boxes in thousandths.

Source: transformers:models/qwen3_vl.
"""

import functools

import jax

from surgery_r1_jax import codec, decoder, layers, model, vision_qwen3, weights
from surgery_r1_jax.family import Family, sections, supported

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


def read_config(whole) -> model.Config:
    """Our architecture of a transformers configuration. Raises ValueError for a variant that is not supported."""
    tower = whole.vision_config
    supported("vision_config.hidden_act", tower.hidden_act, "gelu_pytorch_tanh")
    side = int(tower.num_position_embeddings**0.5)
    supported("vision_config.num_position_embeddings", tower.num_position_embeddings, side**2)
    return model.Config(
        family=FAMILY.model_type,
        image_token_id=whole.image_token_id,
        tie_word_embeddings=bool(whole.tie_word_embeddings),
        text=read_text(whole),
        vision=vision_qwen3.Config(
            depth=tower.depth,
            hidden_size=tower.hidden_size,
            intermediate_size=tower.intermediate_size,
            num_heads=tower.num_heads,
            out_hidden_size=tower.out_hidden_size,
            patch_size=tower.patch_size,
            temporal_patch_size=tower.temporal_patch_size,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.patch_size * tower.spatial_merge_size,
            fullatt_block_indexes=tuple(range(tower.depth)),
            in_channels=tower.in_channels,
            norm=layers.LayerNorm,
            mlp=GELU_MLP,
            places=side,
            deep_layers=tuple(tower.deepstack_visual_indexes),
        ),
    )


def read_text(whole) -> decoder.Config:
    """The decoder."""
    text, rope = whole.text_config, whole.text_config.rope_parameters
    supported("attention_bias", bool(text.attention_bias), False)
    supported("hidden_act", text.hidden_act, "silu")
    time, row, column = sections(rope)
    axes = [0] * (time + row + column)  # interleaved: row and column take every third frequency from the first ones
    axes[1 : 3 * row : 3] = [1] * row
    axes[2 : 3 * column : 3] = [2] * column
    return decoder.Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.head_dim or text.hidden_size // text.num_attention_heads,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        rope_axes=tuple(axes),
        qkv_bias=False,
        qk_norm=True,
    )


FAMILY = Family("qwen3_vl", "Qwen3-VL", NAMES, codec.PER_MILLE, read_config)
