"""Qwen3-VL with experts: Qwen3-VL but for a mixture of experts in every decoder layer.

Source: transformers:models/qwen3_vl_moe. Released files hold the experts' weights as [expert, in, out], files that
transformers 5 saves as [expert, out, in]: both are read, the released form is written.
"""

import dataclasses

from surgery_r1_jax import codec, decoder, qwen3_vl, weights
from surgery_r1_jax.experts import Mixture
from surgery_r1_jax.family import Family, same, size, supported
from surgery_r1_jax.qwen3_vl import LAYER

FUSED = weights.Form(  # gate and up side by side in the last axis
    lambda ours, _: ours.reshape(*ours.shape[:2], -1),
    lambda file, shape: file.reshape(shape),
    or_swapped=True,
)

NAMES: weights.Names = {
    **{ours: row for ours, row in qwen3_vl.NAMES.items() if not ours.startswith("decoder.blocks.mlp.")},
    **weights.dense("decoder.blocks.mlp.router", f"{LAYER}.mlp.gate"),
    "decoder.blocks.mlp.gate_up": (f"{LAYER}.mlp.experts.gate_up_proj", FUSED),
    "decoder.blocks.mlp.down": (f"{LAYER}.mlp.experts.down_proj", weights.SAME._replace(or_swapped=True)),
}


def text_config(text) -> decoder.Config:
    """The decoder: every layer has experts."""
    supported("decoder_sparse_step", text.decoder_sparse_step, 1)
    supported("mlp_only_layers", list(text.mlp_only_layers or ()), [])
    mixture = Mixture(*same(text, ("num_experts", "num_experts_per_tok")).values())
    if mixture.used > mixture.experts:
        what = f"num_experts_per_tok {mixture.used} is above num_experts {mixture.experts}"
        raise ValueError(f"{what}; copy the file from the checkpoint")
    width = size("moe_intermediate_size", text.moe_intermediate_size)
    return dataclasses.replace(qwen3_vl.text_config(text), intermediate_size=width, mlp=mixture)


FAMILY = Family("qwen3_vl_moe", "Qwen3-VL-MoE", NAMES, codec.PER_MILLE, text_config, qwen3_vl.tower_config)
