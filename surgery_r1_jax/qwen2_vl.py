"""Qwen2-VL: a tower without windows, with LayerNorm and QuickGELU; the decoder of Qwen2.5-VL; boxes in thousandths.

Source: transformers:models/qwen2_vl.
"""

import functools

from surgery_r1_jax import codec, layers, model, vision, weights
from surgery_r1_jax.family import Family, supported
from surgery_r1_jax.qwen2_5_vl import read_text

QUICK_MLP = functools.partial(layers.MLP, activation=layers.quick_gelu)

NAMES: weights.Names = {
    **weights.attention("model", bias=True),
    **weights.gated_mlp("decoder.blocks.mlp", "model.layers.{i}.mlp"),
    **weights.tower("visual", norm_bias=True),
    **weights.dense("tower.blocks.mlp.up", "visual.blocks.{i}.mlp.fc1", bias=True),
    **weights.dense("tower.blocks.mlp.down", "visual.blocks.{i}.mlp.fc2", bias=True),
    **weights.norm("tower.merger.norm", "visual.merger.ln_q", bias=True),
    **weights.dense("tower.merger.up", "visual.merger.mlp.0", bias=True),
    **weights.dense("tower.merger.down", "visual.merger.mlp.2", bias=True),
}


def read_config(whole) -> model.Config:
    """Our architecture of a transformers configuration. Raises ValueError for a variant that is not supported."""
    tower = whole.vision_config
    supported("vision_config.hidden_act", tower.hidden_act, "quick_gelu")
    return model.Config(
        family=FAMILY.model_type,
        image_token_id=whole.image_token_id,
        tie_word_embeddings=bool(whole.tie_word_embeddings),
        text=read_text(whole),
        vision=vision.Config(
            depth=tower.depth,
            hidden_size=tower.embed_dim,  # what the others call hidden_size is the decoder's width here
            intermediate_size=int(tower.embed_dim * tower.mlp_ratio),
            num_heads=tower.num_heads,
            out_hidden_size=tower.hidden_size,
            patch_size=tower.patch_size,
            temporal_patch_size=tower.temporal_patch_size,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.patch_size * tower.spatial_merge_size,
            fullatt_block_indexes=tuple(range(tower.depth)),
            in_channels=tower.in_channels,
            norm=layers.LayerNorm,
            mlp=QUICK_MLP,
        ),
    )


FAMILY = Family("qwen2_vl", "Qwen2-VL", NAMES, codec.PER_MILLE, read_config)
