"""Qwen2.5-VL: a tower with windows, a decoder with biased queries, keys and values, boxes in pixels.

Source: transformers:models/qwen2_5_vl.
"""

from surgery_r1_jax import codec, decoder, model, vision, weights
from surgery_r1_jax.family import Family, sections, supported

NAMES: weights.Names = {
    **weights.attention("model", bias=True),
    **weights.gated_mlp("decoder.blocks.mlp", "model.layers.{i}.mlp"),
    **weights.tower("visual", norm_bias=False),
    **weights.gated_mlp("tower.blocks.mlp", "visual.blocks.{i}.mlp", bias=True),
    **weights.norm("tower.merger.norm", "visual.merger.ln_q"),
    **weights.dense("tower.merger.up", "visual.merger.mlp.0", bias=True),
    **weights.dense("tower.merger.down", "visual.merger.mlp.2", bias=True),
}


def read_config(whole) -> model.Config:
    """Our architecture of a transformers configuration. Raises ValueError for a variant that is not supported."""
    tower = whole.vision_config
    supported("vision_config.hidden_act", tower.hidden_act, "silu")
    return model.Config(
        family=FAMILY.model_type,
        image_token_id=whole.image_token_id,
        tie_word_embeddings=bool(whole.tie_word_embeddings),
        text=read_text(whole),
        vision=vision.Config(
            depth=tower.depth,
            hidden_size=tower.hidden_size,
            intermediate_size=tower.intermediate_size,
            num_heads=tower.num_heads,
            out_hidden_size=tower.out_hidden_size,
            patch_size=tower.patch_size,
            temporal_patch_size=tower.temporal_patch_size,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            fullatt_block_indexes=tuple(tower.fullatt_block_indexes),
            in_channels=tower.in_channels,
        ),
    )


def read_text(whole) -> decoder.Config:
    """The decoder, which Qwen2-VL shares."""
    text, rope = whole.text_config, whole.text_config.rope_parameters
    supported("use_sliding_window", bool(text.use_sliding_window), False)
    supported("hidden_act", text.hidden_act, "silu")
    return decoder.Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        rope_axes=tuple(axis for axis, count in enumerate(sections(rope)) for _ in range(count)),
    )


FAMILY = Family("qwen2_5_vl", "Qwen2.5-VL", NAMES, codec.RESIZED_PIXELS, read_config)
