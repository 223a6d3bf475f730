"""Floating-point operations (FLOPs) that a model needs for a batch: what MFU, the share of a device's peak, is told by.

The count is linear in what goes through the model (`Work`): rows of its matrices, and pairs of a query and a key.
So it has two parts, what there was to do and what one of each costs, and is their sum of products.

Conventions, those of PaLM's appendix B (arXiv 2204.02311) and Megatron-LM (arXiv 2104.04473), with vision added:

- A multiply-add is two. Only matrix products count: no norm, softmax, rotary angle, embedding lookup or optimiser.
- Attention is not halved for being causal: every token of a sequence is paired with all of it.
- Padding is no work, and neither is what is computed again in the backward pass (remat).
- What is shared is counted once: a frame's prefix, its tower included, for all its branches. The head runs on scored
  tokens alone, and of a mixture only the experts that a token goes through.
- The backward pass takes as much again for the inputs of a matrix, where anything before it learns, and for the matrix
  itself, where it learns: with adapters the frozen matrices cost twice their forward pass, not three times.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from flax import nnx

from surgery_r1_jax import experts, lora, model, options
from surgery_r1_jax.batch import FrameBatch

# Peak FLOP/s of a device in bfloat16 without sparsity, by the beginning of jax's `device_kind`; the first that fits.
# A JAX device is a whole chip on all of these TPUs. Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e), NVIDIA's
# data sheets of A100, H100 and H200, and for B200 that of the HGX and DGX B200.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e, Trillium
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,  # SXM
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


class Work(NamedTuple):
    """What goes through a model, or what one of each costs."""

    patches: float  # rows of the tower
    window_pairs: float  # of patches in a window
    image_pairs: float  # of patches in an image
    units: float  # rows of the mergers
    tokens: float  # rows of the decoder
    pairs: float  # of a token and one that it could look at
    scored: float  # rows of the head


class Cost(NamedTuple):
    """FLOPs of one of each kind of work."""

    forward: Work
    training: Work  # forward and backward


def count(cost: Work, work: Work) -> float:
    """FLOPs of some work."""
    return float(sum(each * number for each, number in zip(cost, work, strict=True)))


def peak(device_kind: str) -> float | None:
    """FLOP/s of such a device at most, in bfloat16; None where we do not know."""
    return next((flops for name, flops in PEAKS.items() if device_kind.startswith(name)), None)


def of_model(
    config: model.Config, adapted: options.Lora = options.Lora(), rates: options.Rates = options.Rates()
) -> Cost:
    """What a model costs; `adapted` and `rates` say which of its parameters learn."""
    matrices = [
        (path, math.prod(variable.get_value().shape) * _active(path, config))
        for path, variable in nnx.to_flat_state(lora.build(config, options.Compute(), adapted)[1])
        if model.is_matrix(path)
    ]
    learning = {path for path, _ in matrices if (not adapted.rank or "lora" in path) and _rate(path, rates) > 0}
    # The backward pass goes through every layer of a part that learns, and of all parts behind it.
    first = min((model.PARTS.index(model.part_of(path)) for path in learning), default=len(model.PARTS))

    def back_through(part: str) -> bool:
        return model.PARTS.index(part) >= first

    text, tower = config.text, config.vision
    full, wide = len(tower.fullatt_block_indexes), text.num_attention_heads * text.head_dim

    def cost(passes: Callable, pair_passes: Callable) -> Work:
        rows = dict.fromkeys(("patches", "units", "tokens", "scored"), 0.0)
        for path, size in matrices:
            if kind := _rows(path, config):
                rows[kind] += 2 * size * passes(path)
        seeing = 4 * tower.hidden_size * pair_passes("tower")  # scores, and the sum of values that they weigh
        return Work(
            window_pairs=(tower.depth - full) * seeing,
            image_pairs=full * seeing,
            pairs=text.num_hidden_layers * 4 * wide * pair_passes("decoder"),
            **rows,
        )

    def passes(path: tuple) -> int:
        inputs = path[:2] != ("tower", "patch_embed")  # pixels want no gradient
        return 1 + (inputs and back_through(model.part_of(path))) + (path in learning)

    return Cost(
        forward=cost(lambda path: 1, lambda part: 1),
        training=cost(passes, lambda part: 3 if back_through(part) else 1),
    )


def of_batch(batch: FrameBatch) -> Work:
    """The work that there is in a batch of NumPy arrays, padding left out."""
    return _with_branches(batch, _lengths(batch), scored=np.count_nonzero(batch.score_weight_BL))


def of_rollout(prompts: FrameBatch, length_BJ: np.ndarray) -> tuple[Work, Work]:
    """The work of drawing completions of these lengths, and that of scoring them; J is questions x samples.

    When they are drawn a question is run once, when they are scored once with each of its completions.
    """
    question_BQ = _lengths(prompts).sum(0)
    question_BJ = np.repeat(question_BQ, length_BJ.shape[1] // question_BQ.shape[1], axis=1)
    drawn = length_BJ > 0
    scoring = _with_branches(prompts, ((question_BJ + length_BJ) * drawn)[None], scored=length_BJ.sum())
    asking = _with_branches(prompts, question_BQ[None], scored=0)
    prefix_B1 = prompts.prefix_mask_BP.sum(-1, keepdims=True)
    pairs = (length_BJ * (prefix_B1 + question_BJ + length_BJ)).sum()
    drawing = asking._replace(
        tokens=asking.tokens + length_BJ.sum(), pairs=asking.pairs + pairs, scored=length_BJ.sum()
    )
    return drawing, scoring


def _with_branches(batch: FrameBatch, length_XBJ: np.ndarray, scored: int) -> Work:
    """The prefixes of a batch with branches of these lengths."""
    images = range(1, int(batch.patch_image_BWS.max(initial=0)) + 1)
    of_image = [np.sum(batch.patch_image_BWS == number, axis=(1, 2)) for number in images]
    patches = np.count_nonzero(batch.patch_image_BWS)
    prefix_B = batch.prefix_mask_BP.sum(-1)
    return Work(
        patches=patches,
        window_pairs=np.sum(np.count_nonzero(batch.patch_image_BWS, axis=-1) ** 2),
        image_pairs=sum(np.sum(n_B**2) for n_B in of_image),
        units=np.count_nonzero(batch.prefix_unit_BP >= 0),
        tokens=prefix_B.sum() + length_XBJ.sum(),
        pairs=np.sum(prefix_B**2) + np.sum(length_XBJ * (prefix_B[:, None] + length_XBJ)),
        scored=scored,
    )


def _lengths(batch: FrameBatch) -> np.ndarray:
    """Tokens of every branch of every lane [X, B, J]: a lane may hold several."""
    branches = range(1, int(batch.branch_segment_BJT.max(initial=1)) + 1)
    return np.stack([np.sum(batch.branch_segment_BJT == number, axis=-1) for number in branches])


def _rows(path: tuple, config: model.Config) -> str | None:
    """Which rows go through a matrix; None for a table that is only looked up."""
    if path == ("embed",):
        return "scored" if config.tie_word_embeddings else None
    if path == ("head",):
        return "scored"
    return {"tower": "patches", "merger": "units", "decoder": "tokens"}[model.part_of(path)]


def _active(path: tuple, config: model.Config) -> float:
    """The share of a matrix that a row goes through."""
    mixture = config.text.mlp
    if isinstance(mixture, experts.Mixture) and path[-2:] in (("mlp", "gate_up"), ("mlp", "down")):
        return mixture.used / mixture.experts
    return 1.0


def _rate(path: tuple, rates: options.Rates) -> float:
    return getattr(rates, model.part_of(path))
