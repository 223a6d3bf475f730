"""Tiny Qwen-VL models with every parameter random, and batches built by hand, for proofs of equality.

A fresh Hugging Face model has all-zero biases and all-one norms that would hide swapped norms and dropped biases.
"""

from typing import NamedTuple

import jax
import numpy as np

from surgery_r1_jax import grid, model, options
from surgery_r1_jax.batch import FrameBatch

IMAGE, VIDEO, VISION_START, VISION_END, PAD, STOP = 1010, 1011, 1012, 1013, 1000, 1001
VOCABULARY = 1024
# Two sizes, neither of which divides by the window of two merged units.
GRIDS = ((10, 14), (6, 8))


# Weights and a frame for which greedy decoding is decided and varied.
SEEDS = {"qwen2_vl": (1, 31), "qwen2_5_vl": (0, 30), "qwen3_vl": (0, 32), "qwen3_vl_moe": (0, 32)}


CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe"}


def configuration(family: str, *, tied: bool):
    """A tiny transformers configuration of the family."""
    import transformers

    text = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=STOP,
        pad_token_id=PAD,
        rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e6),
    )
    # One head more than Qwen's decoders would have, so that heads times their width is not the model's width.
    wide = text | dict(
        head_dim=16,
        num_attention_heads=6,
        num_hidden_layers=4,
        rope_parameters=dict(rope_type="default", mrope_section=[4, 2, 2], mrope_interleaved=True, rope_theta=1e6),
    )
    windows = dict(window_size=56, fullatt_block_indexes=[1, 3])
    deep = dict(num_position_embeddings=49, deepstack_visual_indexes=[0, 2])
    experts = dict(moe_intermediate_size=48, num_experts=5, num_experts_per_tok=2, decoder_sparse_step=1)
    tower = dict(depth=4, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64)
    text, tower = {
        "qwen2_vl": (text, dict(depth=3, embed_dim=32, hidden_size=64, num_heads=2)),
        "qwen2_5_vl": (text, tower | windows),
        "qwen3_vl": (wide, tower | deep),
        "qwen3_vl_moe": (wide | experts, tower | deep),
    }[family]
    return getattr(transformers, f"{CLASSES[family]}Config")(
        text_config=text,
        vision_config=tower,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )


def write(folder, *, family: str = "qwen2_5_vl", tied: bool):
    """Save a randomised torch model; returns (folder, model)."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(SEEDS[family][0])
    whole = getattr(transformers, f"{CLASSES[family]}ForConditionalGeneration")
    oracle = whole._from_config(configuration(family, tied=tied), attn_implementation="eager")
    with torch.no_grad():
        for parameter in oracle.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.15 * noise if parameter.ndim > 1 else 1 + 0.3 * noise)
    oracle.save_pretrained(folder)
    if family == "qwen3_vl_moe":
        swap_experts(folder / "model.safetensors")  # released files hold what transformers saves the other way round
    return folder, oracle.eval()


def swap_experts(path):
    """Transpose the experts' weights in a file."""
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(path)
    swapped = {n: np.ascontiguousarray(t.swapaxes(1, 2)) if ".experts." in n else t for n, t in tensors.items()}
    safetensors.numpy.save_file(swapped, path, metadata={"format": "pt"})


class Frame(NamedTuple):
    """A frame by hand: prefix token ids, its images' patches and grids, and branches of token ids."""

    prefix: np.ndarray
    patches: np.ndarray  # [patches, C], in the preprocessor's order
    grids: tuple
    branches: list  # of int arrays

    def flat(self, branch: int) -> np.ndarray:
        """Prefix and one branch as one row of ids."""
        return np.concatenate([self.prefix, self.branches[branch]])


def frame(seed: int, grids=GRIDS, lengths=(9, 13, 5), patch: int = 14) -> Frame:
    """A frame with noise images between text tokens, and branches of these lengths."""
    rng = np.random.default_rng(seed)
    prefix = [rng.integers(20, 900, 4)]
    for height, width in grids:
        prefix += [[VISION_START], [IMAGE] * (height * width // 4), [VISION_END], rng.integers(20, 900, 2)]
    patches = rng.normal(size=(sum(h * w for h, w in grids), 3 * 2 * patch**2)).astype(np.float32)
    return Frame(np.concatenate(prefix), patches, tuple(grids), [rng.integers(20, 900, n) for n in lengths])


def batch(
    config: model.Config,
    frames,
    *,
    lanes=None,
    P=None,
    T=None,
    left=False,
    next_pos_from_length=False,
    windows=None,
) -> FrameBatch:
    """A FrameBatch of hand-made frames. `lanes` lists per frame the branches in every lane (default one a lane)."""
    merge, side = config.vision.spatial_merge_size, config.vision.window_side
    P = P or max(f.prefix.size for f in frames)
    windows = windows or max(grid.count_windows(f.grids, side, merge) for f in frames)
    lanes = lanes or [[[i] for i in range(len(f.branches))] for f in frames]
    J = max(len(per_frame) for per_frame in lanes)
    T = T or max(sum(len(f.branches[i]) for i in lane) for f, per in zip(frames, lanes, strict=True) for lane in per)
    examples = []
    for f, per_frame in zip(frames, lanes, strict=True):
        layout = grid.arrange(f.grids, side=side, merge=merge, windows=windows)
        source = layout.source_WS
        patches = np.where(source[..., None] >= 0, f.patches[np.maximum(source, 0)], 0).astype(np.float32)
        positions, next_pos = grid.rope_positions(f.prefix, IMAGE, f.grids, merge)
        if next_pos_from_length:
            next_pos = P
        unit = np.full(f.prefix.size, -1, np.int32)
        unit[f.prefix == IMAGE] = layout.unit_of_token
        pad = (P - f.prefix.size, 0) if left else (0, P - f.prefix.size)
        ids, pos, segment = (
            np.full((J, T), PAD, np.int32),
            np.zeros((J, T), np.int32),
            np.zeros((J, T), np.int32),
        )
        slots, targets = [], []
        for j, lane in enumerate(per_frame):
            at = 0
            for number, i in enumerate(lane, start=1):
                branch = f.branches[i]
                here = slice(at, at + branch.size)
                ids[j, here], pos[j, here], segment[j, here] = (
                    branch,
                    next_pos + np.arange(branch.size),
                    number,
                )
                slots += list(j * T + at + np.arange(branch.size - 1))
                targets += list(branch[1:])
                at += branch.size
        examples.append(
            FrameBatch(
                patches,
                layout.hw_WS2,
                layout.image_WS,
                np.pad(f.prefix.astype(np.int32), pad, constant_values=PAD),
                np.pad(unit, pad, constant_values=-1),
                np.pad(positions, ((0, 0), pad)),
                np.pad(np.ones(f.prefix.size, bool), pad),
                ids,
                pos,
                segment,
                np.asarray(slots, np.int32),
                np.asarray(targets, np.int32),
                np.ones(len(slots), np.float32),
            )
        )
    L = max(e.score_slot_BL.size for e in examples)
    grow = lambda a: np.pad(a, (0, L - a.size))  # noqa: E731
    examples = [
        e._replace(
            score_slot_BL=grow(e.score_slot_BL),
            score_target_BL=grow(e.score_target_BL),
            score_weight_BL=grow(e.score_weight_BL),
        )
        for e in examples
    ]
    return FrameBatch(*(np.stack(field) for field in zip(*examples, strict=True)))


def random_params(config: model.Config, seed: int = 0) -> dict:
    """Parameters with nothing at its neutral value, without torch."""
    params = model.init(config, seed)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [
        leaf + (0.1 if leaf.ndim > 2 else 0.3) * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


def config() -> model.Config:
    """The architecture that `write` saves, for tests that need no torch."""
    from surgery_r1_jax import decoder, vision

    return model.Config(
        image_token_id=IMAGE,
        tie_word_embeddings=False,
        family="qwen2_5_vl",
        text=decoder.Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            rope_axes=(0, 0, 1, 1, 1, 2, 2, 2),
        ),
        vision=vision.Config(
            depth=4,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            out_hidden_size=64,
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=56,
            fullatt_block_indexes=(1, 3),
        ),
    )


def logits(config: model.Config, params: dict, batch: FrameBatch, compute=options.Compute()):
    """Branch logits [B, J, T, V]."""
    graph, _ = model.build(config, compute)

    def forward(params, batch):
        net = model.bind(graph, params)
        hidden = net.hidden(batch)
        return hidden @ net.unembed_VD.T.astype(hidden.dtype)

    return jax.jit(forward)(params, batch)
