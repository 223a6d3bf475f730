"""Which tensor of a checkpoint is which of our parameters, and how their shapes relate.

A family's table is made of the rows here, which are the families' common ones, and of its own. It serves both
directions. Source of all names: files written by `save_pretrained` of transformers' models.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from surgery_r1_jax import vision


class Form(NamedTuple):
    """How a parameter's array relates to the file's: both directions, file shape worked out from ours."""

    to_file: Callable[[np.ndarray, vision.Config], np.ndarray]
    from_file: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    or_swapped: bool = False  # some writers swap the last two axes; read then, never written


def linear(inputs: int) -> Form:
    """Torch stores [out, in]; ours is [in..., out...]."""
    return Form(
        lambda ours, _: ours.reshape(int(np.prod(ours.shape[:inputs])), -1).T,
        lambda file, shape: file.T.reshape(shape),
    )


def plain(name: str) -> str:
    """A tensor's name without the parts that come and go with transformers' versions."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def spelled(name: str) -> str:
    """A tensor's name as transformers has it since 4.52, whichever way it is written."""
    name = plain(name)
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


SAME = Form(lambda ours, _: ours, lambda file, shape: file)
FLAT = Form(lambda ours, _: ours.reshape(-1), lambda file, shape: file.reshape(shape))
PATCH = Form(  # a 3-D convolution whose kernel covers exactly one patch
    lambda ours, v: ours.T.reshape(-1, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size),
    lambda file, shape: file.reshape(file.shape[0], -1).T,
)

# Our path -> the file's name ({i}: layer of a stack) and form.
Names = dict[str, tuple[str, Form]]


def norm(ours: str, file: str, *, bias: bool = False) -> Names:
    """Rows of a norm."""
    rows = {f"{ours}.scale": (f"{file}.weight", SAME)}
    return rows | {f"{ours}.bias": (f"{file}.bias", SAME)} if bias else rows


def dense(ours: str, file: str, *, inputs: int = 1, bias: bool = False) -> Names:
    """Rows of a linear map."""
    rows = {f"{ours}.kernel": (f"{file}.weight", linear(inputs))}
    return rows | {f"{ours}.bias": (f"{file}.bias", FLAT)} if bias else rows


def gated_mlp(ours: str, file: str, *, bias: bool = False) -> Names:
    """Rows of a gated MLP."""
    return {
        **dense(f"{ours}.gate", f"{file}.gate_proj", bias=bias),
        **dense(f"{ours}.up", f"{file}.up_proj", bias=bias),
        **dense(f"{ours}.down", f"{file}.down_proj", bias=bias),
    }


def attention(root: str, *, bias: bool) -> Names:
    """Rows of all of a decoder but its MLPs; `root` is where the language model stands in the file."""
    layer = f"{root}.layers.{{i}}"
    return {
        "embed": (f"{root}.embed_tokens.weight", SAME),
        "head": ("lm_head.weight", SAME),
        **norm("decoder.norm", f"{root}.norm"),
        **norm("decoder.blocks.norm1", f"{layer}.input_layernorm"),
        **norm("decoder.blocks.norm2", f"{layer}.post_attention_layernorm"),
        **dense("decoder.blocks.q", f"{layer}.self_attn.q_proj", bias=bias),
        **dense("decoder.blocks.k", f"{layer}.self_attn.k_proj", bias=bias),
        **dense("decoder.blocks.v", f"{layer}.self_attn.v_proj", bias=bias),
        **dense("decoder.blocks.o", f"{layer}.self_attn.o_proj", inputs=2),
    }


def tower(root: str, *, norm_bias: bool) -> Names:
    """Rows of a tower but for MLPs and mergers; `root` is where it stands in the file."""
    block = f"{root}.blocks.{{i}}"
    return {
        "tower.patch_embed.kernel": (f"{root}.patch_embed.proj.weight", PATCH),
        **norm("tower.blocks.norm1", f"{block}.norm1", bias=norm_bias),
        **norm("tower.blocks.norm2", f"{block}.norm2", bias=norm_bias),
        **dense("tower.blocks.qkv", f"{block}.attn.qkv", bias=True),
        **dense("tower.blocks.proj", f"{block}.attn.proj", inputs=2, bias=True),
    }
