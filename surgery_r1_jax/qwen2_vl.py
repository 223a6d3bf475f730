"""Qwen2-VL: a tower without windows, with LayerNorm and QuickGELU; the decoder of Qwen2.5-VL; boxes in thousandths.

Source: transformers:models/qwen2_vl.
"""

import functools

from surgery_r1_jax import codec, layers, qwen2_5_vl, vision, weights
from surgery_r1_jax.family import TOWER, Family, same, size, supported, whole_image

QUICK_MLP = functools.partial(layers.MLP, activation=layers.quick_gelu)

NAMES: weights.Names = {
    **{ours: row for ours, row in qwen2_5_vl.NAMES.items() if not ours.startswith("tower.")},
    **weights.tower("visual", norm_bias=True),
    **weights.dense("tower.blocks.mlp.up", "visual.blocks.{i}.mlp.fc1", bias=True),
    **weights.dense("tower.blocks.mlp.down", "visual.blocks.{i}.mlp.fc2", bias=True),
    **weights.norm("tower.merger.norm", "visual.merger.ln_q", bias=True),
    **weights.dense("tower.merger.up", "visual.merger.mlp.0", bias=True),
    **weights.dense("tower.merger.down", "visual.merger.mlp.2", bias=True),
}


def tower_config(tower) -> vision.Config:
    """The tower. What the other families call hidden_size is embed_dim here, and hidden_size is the decoder's width."""
    supported("vision_config.hidden_act", tower.hidden_act, "quick_gelu")
    return vision.Config(
        **same(tower, TOWER),
        **whole_image(tower),
        hidden_size=size("vision_config.embed_dim", tower.embed_dim),
        intermediate_size=size("vision_config: embed_dim x mlp_ratio", int(tower.embed_dim * tower.mlp_ratio)),
        out_hidden_size=tower.hidden_size,
        norm=layers.LayerNorm,
        mlp=QUICK_MLP,
    )


FAMILY = Family("qwen2_vl", "Qwen2-VL", NAMES, codec.PER_MILLE, qwen2_5_vl.text_config, tower_config)
