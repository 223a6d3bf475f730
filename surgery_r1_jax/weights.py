"""Which tensor of a Qwen2.5-VL checkpoint is which of our parameters, and how their shapes relate.

The one table for both directions. Source of the names: files written by transformers'
Qwen2_5_VLForConditionalGeneration.save_pretrained.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from surgery_r1_jax import vision


class Form(NamedTuple):
    """How a parameter's array relates to the file's: both directions, file shape worked out from ours."""

    to_file: Callable[[np.ndarray, vision.Config], np.ndarray]
    from_file: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def _linear(inputs: int) -> Form:
    """Torch stores [out, in]; ours is [in..., out...]."""
    return Form(
        lambda ours, _: ours.reshape(int(np.prod(ours.shape[:inputs])), -1).T,
        lambda file, shape: file.T.reshape(shape),
    )


_SAME = Form(lambda ours, _: ours, lambda file, shape: file)
_FLAT = Form(lambda ours, _: ours.reshape(-1), lambda file, shape: file.reshape(shape))
_PATCH = Form(  # a 3-D convolution whose kernel covers exactly one patch
    lambda ours, v: ours.T.reshape(-1, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size),
    lambda file, shape: file.reshape(file.shape[0], -1).T,
)

# Our path -> the file's name ({i}: layer of a stack) and form.
NAMES: dict[str, tuple[str, Form]] = {
    "embed": ("model.embed_tokens.weight", _SAME),
    "head": ("lm_head.weight", _SAME),
    "decoder.norm.scale": ("model.norm.weight", _SAME),
    "decoder.blocks.norm1.scale": ("model.layers.{i}.input_layernorm.weight", _SAME),
    "decoder.blocks.norm2.scale": ("model.layers.{i}.post_attention_layernorm.weight", _SAME),
    "decoder.blocks.q.kernel": ("model.layers.{i}.self_attn.q_proj.weight", _linear(1)),
    "decoder.blocks.q.bias": ("model.layers.{i}.self_attn.q_proj.bias", _FLAT),
    "decoder.blocks.k.kernel": ("model.layers.{i}.self_attn.k_proj.weight", _linear(1)),
    "decoder.blocks.k.bias": ("model.layers.{i}.self_attn.k_proj.bias", _FLAT),
    "decoder.blocks.v.kernel": ("model.layers.{i}.self_attn.v_proj.weight", _linear(1)),
    "decoder.blocks.v.bias": ("model.layers.{i}.self_attn.v_proj.bias", _FLAT),
    "decoder.blocks.o.kernel": ("model.layers.{i}.self_attn.o_proj.weight", _linear(2)),
    "decoder.blocks.mlp.gate.kernel": ("model.layers.{i}.mlp.gate_proj.weight", _linear(1)),
    "decoder.blocks.mlp.up.kernel": ("model.layers.{i}.mlp.up_proj.weight", _linear(1)),
    "decoder.blocks.mlp.down.kernel": ("model.layers.{i}.mlp.down_proj.weight", _linear(1)),
    "tower.patch_embed.kernel": ("visual.patch_embed.proj.weight", _PATCH),
    "tower.blocks.norm1.scale": ("visual.blocks.{i}.norm1.weight", _SAME),
    "tower.blocks.norm2.scale": ("visual.blocks.{i}.norm2.weight", _SAME),
    "tower.blocks.qkv.kernel": ("visual.blocks.{i}.attn.qkv.weight", _linear(1)),
    "tower.blocks.qkv.bias": ("visual.blocks.{i}.attn.qkv.bias", _FLAT),
    "tower.blocks.proj.kernel": ("visual.blocks.{i}.attn.proj.weight", _linear(2)),
    "tower.blocks.proj.bias": ("visual.blocks.{i}.attn.proj.bias", _FLAT),
    "tower.blocks.mlp.gate.kernel": ("visual.blocks.{i}.mlp.gate_proj.weight", _linear(1)),
    "tower.blocks.mlp.gate.bias": ("visual.blocks.{i}.mlp.gate_proj.bias", _FLAT),
    "tower.blocks.mlp.up.kernel": ("visual.blocks.{i}.mlp.up_proj.weight", _linear(1)),
    "tower.blocks.mlp.up.bias": ("visual.blocks.{i}.mlp.up_proj.bias", _FLAT),
    "tower.blocks.mlp.down.kernel": ("visual.blocks.{i}.mlp.down_proj.weight", _linear(1)),
    "tower.blocks.mlp.down.bias": ("visual.blocks.{i}.mlp.down_proj.bias", _FLAT),
    "tower.merger.norm.scale": ("visual.merger.ln_q.weight", _SAME),
    "tower.merger.up.kernel": ("visual.merger.mlp.0.weight", _linear(1)),
    "tower.merger.up.bias": ("visual.merger.mlp.0.bias", _FLAT),
    "tower.merger.down.kernel": ("visual.merger.mlp.2.weight", _linear(1)),
    "tower.merger.down.bias": ("visual.merger.mlp.2.bias", _FLAT),
}
