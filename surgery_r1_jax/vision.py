"""The vision tower of Qwen2.5-VL: patches in, one vector per merged unit out.

Most layers attend within windows, a few over the whole image. Windows are lanes of the one attention function,
every one padded to the same number of slots; a full layer is the same with a single lane. The buffer is per
frame, so it shards over frames.

Source: transformers:models/qwen2_5_vl/modeling_qwen2_5_vl.py (Qwen2_5_VisionTransformerPretrainedModel).
Departure: the layers are scanned in groups of window layers closed by one full layer, which is how every
released size is built; an irregular list of full layers is refused.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from surgery_r1_jax import attention, errors, layers, options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Architecture of the tower, under the names of the checkpoint's `vision_config`."""

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

    def __post_init__(self):
        period = self.depth // max(1, len(self.fullatt_block_indexes))
        regular = tuple(range(period - 1, self.depth, period)) if period else ()
        if self.fullatt_block_indexes != regular or self.depth % period:
            raise errors.InputError(
                f"vision_config.fullatt_block_indexes {list(self.fullatt_block_indexes)} with depth {self.depth}: "
                f"only equal groups of window layers closed by a full one are supported, such as {list(regular)}"
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


class Block(nnx.Module):
    """One tower layer (or a stack of them): attention and gated MLP, each behind a norm."""

    def __init__(self, config: Config, *, rngs, stack=None):
        E, N = config.hidden_size, config.num_heads
        self.norm1 = layers.RMSNorm(E, rngs=rngs, eps=1e-6, stack=stack)
        self.norm2 = layers.RMSNorm(E, rngs=rngs, eps=1e-6, stack=stack)
        axes = ("vision", "qkv", "vision_heads", "head")
        self.qkv = layers.Linear((E, 3, N, E // N), axes, rngs=rngs, bias=True, stack=stack)
        self.proj = layers.Linear((N, E // N, E), (*axes[2:], "vision"), rngs=rngs, inputs=2, bias=True, stack=stack)
        mlp_axes = ("vision", "vision_mlp")
        self.mlp = layers.GatedMLP(E, config.intermediate_size, mlp_axes, rngs=rngs, bias=True, stack=stack)

    def __call__(self, x_BWSE, angle_BWSh, image_BWS, *, full: bool, chunk: int | None):
        """Run one layer over windows, or over whole images when `full`."""
        qkv = self.qkv(self.norm1(x_BWSE))
        q, k = (layers.rotate(qkv[..., i, :, :], angle_BWSh) for i in (0, 1))
        v = qkv[..., 2, :, :]
        if full:  # one lane a frame; images of a frame are told apart by their number
            flat = lambda a: a.reshape(a.shape[0], 1, -1, *a.shape[3:])  # noqa: E731
            q, k, v, segment = flat(q), flat(k), flat(v), flat(image_BWS)
        else:
            segment, chunk = image_BWS, None
        out = attention.attend(q, attention.Queries(segment), attention.Keys(k, v, segment), chunk=chunk)
        x_BWSE += self.proj(out.reshape(*x_BWSE.shape[:3], *out.shape[3:]))
        return x_BWSE + self.mlp(self.norm2(x_BWSE))


class Merger(nnx.Module):
    """Join the patches of a unit into one vector of the decoder's width."""

    def __init__(self, config: Config, *, rngs):
        self.joined = config.hidden_size * config.spatial_merge_size**2
        self.norm = layers.RMSNorm(config.hidden_size, rngs=rngs, eps=1e-6)
        self.up = layers.Linear((self.joined, self.joined), ("vision", "merged"), rngs=rngs, bias=True)
        self.down = layers.Linear((self.joined, config.out_hidden_size), ("merged", "embed"), rngs=rngs, bias=True)

    def __call__(self, x_BWSE):
        """Return [B, M, D], units in window order."""
        x_BME = self.norm(x_BWSE).reshape(x_BWSE.shape[0], -1, self.joined)
        return self.down(jax.nn.gelu(self.up(x_BME), approximate=False))


class Tower(nnx.Module):
    """Patch embedding, layers and merger."""

    def __init__(self, config: Config, compute: options.Compute, *, rngs):
        self.config, self.compute = config, compute
        C, E = config.values_per_patch, config.hidden_size
        self.patch_embed = layers.Linear((C, E), ("patch", "vision"), rngs=rngs)
        self.blocks = Block(config, rngs=rngs, stack=config.depth)
        self.merger = Merger(config, rngs=rngs)

    def __call__(self, patches_BWSC, hw_BWS2, image_BWS):
        """Encode a buffer of patches; returns [B, M, D], M = W * S / merge^2, in window order."""
        config = self.config
        x = self.patch_embed(patches_BWSC.astype(self.compute.dtype))
        head = config.hidden_size // config.num_heads
        inverse = layers.inverse_frequencies(head // 2, 10_000.0)
        angle = (hw_BWS2[..., None].astype(jnp.float32) * inverse).reshape(*image_BWS.shape, head // 2)

        graph, stacked = nnx.split(self.blocks)
        grouped = jax.tree.map(lambda p: p.reshape(-1, config.period, *p.shape[1:]), stacked)

        def layer(x, params, *, full):
            block = nnx.merge(graph, params)
            return block(x, angle, image_BWS, full=full, chunk=self.compute.query_chunk)

        def group(x, params):
            run = lambda full: lambda x, p: layer(x, p, full=full)  # noqa: E731
            windowed, whole = run(False), run(True)
            if self.compute.tower_remat:
                windowed, whole = jax.checkpoint(windowed), jax.checkpoint(whole)
            first, last = (jax.tree.map(lambda p, s=s: p[s], params) for s in (slice(0, -1), -1))
            if config.period > 1:
                x, _ = jax.lax.scan(lambda x, p: (windowed(x, p), None), x, first)
            return whole(x, last), None

        x, _ = jax.lax.scan(group, x, grouped)
        return self.merger(x)
