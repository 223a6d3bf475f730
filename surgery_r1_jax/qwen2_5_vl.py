"""Qwen2.5-VL: a tower with windows, a decoder with biased queries, keys and values, boxes in pixels.

Source: transformers:models/qwen2_5_vl.
"""

from surgery_r1_jax import codec, decoder, vision, weights
from surgery_r1_jax.family import TOWER, Family, same, sections, supported, text_sizes

NAMES: weights.Names = {
    **weights.attention("model", bias=True),
    **weights.gated_mlp("decoder.blocks.mlp", "model.layers.{i}.mlp"),
    **weights.tower("visual", norm_bias=False),
    **weights.gated_mlp("tower.blocks.mlp", "visual.blocks.{i}.mlp", bias=True),
    **weights.norm("tower.merger.norm", "visual.merger.ln_q"),
    **weights.dense("tower.merger.up", "visual.merger.mlp.0", bias=True),
    **weights.dense("tower.merger.down", "visual.merger.mlp.2", bias=True),
}


def text_config(text) -> decoder.Config:
    """The decoder, which Qwen2-VL has too."""
    supported("use_sliding_window", bool(text.use_sliding_window), False)
    supported("hidden_act", text.hidden_act, "silu")
    return decoder.Config(
        **text_sizes(text),
        rope_axes=tuple(axis for axis, count in enumerate(sections(text)) for _ in range(count)),
    )


def tower_config(tower) -> vision.Config:
    """The tower."""
    supported("vision_config.hidden_act", tower.hidden_act, "silu")
    return vision.Config(
        **same(tower, (*TOWER, "hidden_size", "intermediate_size", "out_hidden_size", "window_size")),
        fullatt_block_indexes=tuple(tower.fullatt_block_indexes),
    )


FAMILY = Family("qwen2_5_vl", "Qwen2.5-VL", NAMES, codec.RESIZED_PIXELS, text_config, tower_config)
