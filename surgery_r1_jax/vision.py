"""The vision tower of Qwen2-VL and Qwen2.5-VL: patches in, one vector per merged unit out.

Most layers attend within windows, a few over the whole image. Windows are lanes of the one attention function,
every one padded to the same number of slots; a full layer is the same with a single lane. The buffer is per
frame, so it shards over frames.

Where every layer sees the whole image, a window is a single unit: nothing is padded then.

Source: transformers:models/qwen2_5_vl/modeling_qwen2_5_vl.py (Qwen2_5_VisionTransformerPretrainedModel) and
qwen2_vl/modeling_qwen2_vl.py (Qwen2VisionTransformerPretrainedModel). Departure: the layers are scanned in groups of
window layers closed by one full layer, which is how every released size is built; an irregular list of full layers
is refused.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from surgery_r1_jax import attention, errors, layers, options

EPSILON = 1e-6  # of all norms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Architecture of the tower, under the names of Qwen2.5-VL's `vision_config`."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int  # pixels
    fullatt_block_indexes: tuple[int, ...]
    in_channels: int = 3
    norm: Callable = layers.RMSNorm
    mlp: Callable = layers.GatedMLP

    def __post_init__(self):
        period = self.depth // max(1, len(self.fullatt_block_indexes))
        regular = tuple(range(period - 1, self.depth, period)) if period else ()
        if self.fullatt_block_indexes != regular or self.depth % period:
            raise errors.InputError(
                f"vision_config.fullatt_block_indexes {list(self.fullatt_block_indexes)} with depth {self.depth}: "
                "only equal groups of window layers closed by a full one are supported; take a released model"
            )

    @property
    def period(self) -> int:
        """Layers in a group: window layers and the full one that closes it."""
        return self.depth // len(self.fullatt_block_indexes)

    @property
    def values_per_patch(self) -> int:
        """Length of a flattened patch (C)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def slots(self) -> int:
        """Patches in a full window (S)."""
        return (self.window_size // self.patch_size // self.spatial_merge_size * self.spatial_merge_size) ** 2

    @property
    def window_side(self) -> int:
        """Merged units along one side of a window."""
        return self.window_size // self.patch_size // self.spatial_merge_size

    @property
    def joined(self) -> int:
        """Width of the patches of a unit, one after the other."""
        return self.hidden_size * self.spatial_merge_size**2

    def tower(self, compute: options.Compute, attend: Callable, rngs: nnx.Rngs) -> nnx.Module:
        """The module that this is the architecture of."""
        return Tower(self, compute, attend, rngs=rngs)


class Seen(NamedTuple):
    """What the decoder is shown of a frame's images, units in window order."""

    units_BMD: jax.Array
    deep_XBMD: jax.Array | None = None  # joins the image places behind each of the first X decoder layers


def angles(hw_BWS2: jax.Array, config: Config) -> jax.Array:
    """Rotary angles [B, W, S, head / 2] in float32: half of them turn with the patch's row, half with its column."""
    quarter = config.hidden_size // config.num_heads // 2
    inverse = layers.inverse_frequencies(quarter, 10_000.0)
    return (hw_BWS2[..., None].astype(jnp.float32) * inverse).reshape(*hw_BWS2.shape[:-1], quarter)


class Block(nnx.Module):
    """One tower layer (or a stack of them): attention and MLP, each behind a norm."""

    def __init__(self, config: Config, *, rngs, stack=None):
        E, N = config.hidden_size, config.num_heads
        self.norm1 = config.norm(E, rngs=rngs, eps=EPSILON, stack=stack)
        self.norm2 = config.norm(E, rngs=rngs, eps=EPSILON, stack=stack)
        axes = ("vision", "qkv", "vision_heads", "head")
        self.qkv = layers.Linear((E, 3, N, E // N), axes, rngs=rngs, bias=True, stack=stack)
        self.proj = layers.Linear((N, E // N, E), (*axes[2:], "vision"), rngs=rngs, inputs=2, bias=True, stack=stack)
        mlp_axes = ("vision", "vision_mlp")
        self.mlp = config.mlp(E, config.intermediate_size, mlp_axes, rngs=rngs, bias=True, stack=stack)

    def __call__(self, x_BWSE, angle_BWSh, image_BWS, *, full: bool, attend: Callable):
        """Run one layer over windows, or over whole images when `full`; `attend` is for the latter."""
        qkv = self.qkv(self.norm1(x_BWSE))
        q, k = (layers.rotate(qkv[..., i, :, :], angle_BWSh) for i in (0, 1))
        v = qkv[..., 2, :, :]
        if full:  # one lane a frame; images of a frame are told apart by their number
            flat = lambda a: a.reshape(a.shape[0], 1, -1, *a.shape[3:])  # noqa: E731
            q, k, v, segment = flat(q), flat(k), flat(v), flat(image_BWS)
        else:  # windows have few scores: XLA computes all of them at once
            segment, attend = image_BWS, attention.attend
        out = attend(q, attention.Queries(segment), attention.Keys(k, v, segment))
        x_BWSE += self.proj(out.reshape(*x_BWSE.shape[:3], *out.shape[3:]))
        return x_BWSE + self.mlp(self.norm2(x_BWSE))


class Merger(nnx.Module):
    """Join the patches of a unit into one vector of the decoder's width (or a stack of such joiners).

    The norm is over `normed` values: a patch's, or all of a unit's.
    """

    def __init__(self, config: Config, *, rngs, normed: int | None = None, stack=None):
        self.joined, self.normed = config.joined, normed or config.hidden_size
        make = dict(rngs=rngs, bias=True, stack=stack)
        self.norm = config.norm(self.normed, rngs=rngs, eps=EPSILON, stack=stack)
        self.up = layers.Linear((self.joined, self.joined), ("vision", "merged"), **make)
        self.down = layers.Linear((self.joined, config.out_hidden_size), ("merged", "embed"), **make)

    def __call__(self, x_BWSE):
        """Return [B, M, D], units in window order."""
        B = x_BWSE.shape[0]
        x_BME = self.norm(x_BWSE.reshape(B, -1, self.normed)).reshape(B, -1, self.joined)
        return self.down(jax.nn.gelu(self.up(x_BME), approximate=False))


class Tower(nnx.Module):
    """Patch embedding, layers and merger."""

    def __init__(self, config: Config, compute: options.Compute, attend: Callable, *, rngs):
        self.config, self.compute, self.attend = config, compute, attend
        C, E = config.values_per_patch, config.hidden_size
        self.patch_embed = layers.Linear((C, E), ("patch", "vision"), rngs=rngs)
        self.blocks = Block(config, rngs=rngs, stack=config.depth)
        self.merger = Merger(config, rngs=rngs)

    def __call__(self, patches_BWSC, hw_BWS2, image_BWS) -> Seen:
        """Encode a buffer of patches; M = W * S / merge^2."""
        config = self.config
        x = self.patch_embed(patches_BWSC.astype(self.compute.dtype))
        angle = angles(hw_BWS2, config)
        graph, stacked = nnx.split(self.blocks)
        grouped = jax.tree.map(lambda p: p.reshape(-1, config.period, *p.shape[1:]), stacked)

        def layer(x, params, *, full):
            block = nnx.merge(graph, layers.gathered(params, self.compute.dtype))
            return block(x, angle, image_BWS, full=full, attend=self.attend)

        def group(x, params):
            run = lambda full: layers.recomputed(functools.partial(layer, full=full), self.compute.tower_remat)  # noqa: E731
            windowed, whole = run(False), run(True)
            first, last = (jax.tree.map(lambda p, s=s: p[s], params) for s in (slice(0, -1), -1))
            if config.period > 1:
                x, _ = jax.lax.scan(lambda x, p: (windowed(x, p), None), x, first)
            return whole(x, last), None

        x, _ = jax.lax.scan(group, x, grouped)
        return Seen(self.merger(x))
