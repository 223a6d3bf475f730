"""The vision tower of Qwen3-VL: places from a learned table, and DeepStack.

The table is a square of vectors stretched over every image, bilinearly. What some inner layers see is merged too
and joins the image places behind the decoder's first layers.

Source: transformers:models/qwen3_vl/modeling_qwen3_vl.py (Qwen3VLVisionModel) and vision_utils.py
(get_vision_interpolation_indices_and_weights).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surgery_r1_jax import layers, options, vision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(vision.Config):
    """Architecture of the tower; every layer sees the whole image."""

    places: int  # along one side of the table
    deep_layers: tuple[int, ...]  # whose outputs DeepStack takes

    def tower(self, compute: options.Compute, attend: Callable, rngs: nnx.Rngs) -> nnx.Module:
        """The module that this is the architecture of."""
        return Tower(self, compute, attend, rngs=rngs)


class Tower(nnx.Module):
    """Patch embedding with places, layers, and a merger for the last and for each of the deep layers."""

    def __init__(self, config: Config, compute: options.Compute, attend: Callable, *, rngs):
        self.config, self.compute, self.attend = config, compute, attend
        C, E = config.values_per_patch, config.hidden_size
        self.patch_embed = layers.Linear((C, E), ("patch", "vision"), rngs=rngs, bias=True)
        table = (config.places**2, E)
        self.places = layers.param(rngs, table, ("place", "vision"), nnx.initializers.normal(0.02), None)
        self.blocks = vision.Block(config, rngs=rngs, stack=config.depth)
        self.merger = vision.Merger(config, rngs=rngs)
        self.deep = vision.Merger(config, rngs=rngs, normed=config.joined, stack=len(config.deep_layers))

    def __call__(self, patches_BWSC, hw_BWS2, image_BWS) -> vision.Seen:
        """Encode a buffer of patches; M = W * S / merge^2."""
        x = self.patch_embed(patches_BWSC.astype(self.compute.dtype))
        x += stretched(self.places[...], hw_BWS2, image_sizes(hw_BWS2, image_BWS)).astype(x.dtype)
        angle = vision.angles(hw_BWS2, self.config)
        graph, stacked = nnx.split(self.blocks)

        def run(x, params):
            block = nnx.merge(graph, layers.gathered(params, self.compute.dtype))
            return block(x, angle, image_BWS, full=True, attend=self.attend)

        run = layers.recomputed(run, self.compute.tower_remat)
        deep_layers = self.config.deep_layers
        place = np.full(self.config.depth, len(deep_layers), np.int32)  # beyond the last: not kept
        place[list(deep_layers)] = np.arange(len(deep_layers))

        def layer(carry, xs):
            (x, kept), (params, place) = carry, xs
            x = run(x, params)
            return (x, kept.at[place].set(x, mode="drop")), None

        kept = jnp.zeros((len(deep_layers), *x.shape), x.dtype)
        (x, kept), _ = jax.lax.scan(layer, (x, kept), (stacked, place))
        merger, mergers = nnx.split(self.deep)

        def merge(params, x):
            return nnx.merge(merger, layers.gathered(params, self.compute.dtype))(x)

        merge = layers.recomputed(merge, self.compute.tower_remat)
        deep_XBMD = jax.lax.map(lambda each: merge(*each), (mergers, kept))
        return vision.Seen(self.merger(x), deep_XBMD)


def image_sizes(hw_BWS2: jax.Array, image_BWS: jax.Array) -> jax.Array:
    """Patch rows and columns [B, W, S, 2] of the image that each slot belongs to."""

    def of_frame(hw, image):
        most = jax.ops.segment_max(hw.reshape(-1, 2), image.ravel(), num_segments=len(image) + 1)
        return most[image] + 1

    return jax.vmap(of_frame)(hw_BWS2, image_BWS)


def stretched(table_XE: jax.Array, hw_BWS2: jax.Array, size_BWS2: jax.Array) -> jax.Array:
    """The square table stretched over images corner to corner, read at each slot [B, W, S, E]."""
    side = int(len(table_XE) ** 0.5)
    at = hw_BWS2.astype(jnp.float32) * (side - 1) / jnp.maximum(size_BWS2 - 1, 1)
    low = jnp.minimum(at.astype(jnp.int32), side - 1)
    ends, share = (low, jnp.minimum(low + 1, side - 1)), at - low
    total = 0.0
    for i in (0, 1):
        for j in (0, 1):
            weight = jnp.abs(1 - i - share[..., 0]) * jnp.abs(1 - j - share[..., 1])
            total += weight[..., None] * table_XE[ends[i][..., 0] * side + ends[j][..., 1]]
    return total
