"""The text decoder of the Qwen-VL models, run over a frame's prefix and its branches.

In training, prefix and branches go through the layers side by side: each layer's branches read the prefix keys
that the same layer has just made, so nothing is kept for later. In rollout the prefix is run once (`prefill`)
and its keys kept; lanes are then extended by questions or single tokens against that cache.

Source: transformers:models/qwen2_5_vl/modeling_qwen2_5_vl.py (Qwen2_5_VLTextModel) and
qwen3_vl/modeling_qwen3_vl.py (Qwen3VLTextModel). Departures: rotary angles are picked per frequency from the three
positions instead of being assembled from whole sections; DeepStack's vectors come as an array that is nought at text.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surgery_r1_jax import attention, layers, options
from surgery_r1_jax.attention import Keys, Queries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Architecture of the decoder, under the names of the checkpoint's config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_axes: tuple[int, ...]  # [H / 2], what turns each frequency: 0 time, 1 row, 2 column
    qkv_bias: bool = True
    qk_norm: bool = False
    mlp: Callable = layers.GatedMLP


class Stream(NamedTuple):
    """Token vectors and what attention must know of them; J is 1 for a prefix."""

    x: jax.Array  # [B, J, T, D]
    position: jax.Array  # int32 [3, B, J, T]
    queries: Queries
    deep: jax.Array | None = None  # [X, B, J, T, D], joins the output of each of the first X layers


class Cache(NamedTuple):
    """Keys and values of all layers for a prefix [layers, B, P, K, H] or for lanes [layers, B, J, U, K, H]."""

    key: jax.Array
    value: jax.Array


def angles(position_3BJT: jax.Array, config: Config) -> jax.Array:
    """Rotary angles [B, J, T, H/2] in float32: each frequency turns with time, row or column."""
    axis = np.array(config.rope_axes)
    inverse = layers.inverse_frequencies(config.head_dim, config.rope_theta)
    return jnp.moveaxis(position_3BJT[axis], 0, -1).astype(jnp.float32) * inverse


class Block(nnx.Module):
    """One decoder layer (or a stack of them)."""

    def __init__(self, config: Config, *, rngs, stack=None):
        D, N, K, H = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        make = dict(rngs=rngs, stack=stack)
        self.norm1 = layers.RMSNorm(D, eps=config.rms_norm_eps, **make)
        self.norm2 = layers.RMSNorm(D, eps=config.rms_norm_eps, **make)
        bias = config.qkv_bias
        self.q = layers.Linear((D, N, H), ("embed", "heads", "head"), bias=bias, **make)
        self.k = layers.Linear((D, K, H), ("embed", "kv_heads", "head"), bias=bias, **make)
        self.v = layers.Linear((D, K, H), ("embed", "kv_heads", "head"), bias=bias, **make)
        norm = lambda: layers.RMSNorm(H, eps=config.rms_norm_eps, **make) if config.qk_norm else None  # noqa: E731
        self.q_norm, self.k_norm = norm(), norm()
        self.o = layers.Linear((N, H, D), ("heads", "head", "embed"), inputs=2, **make)
        self.mlp = config.mlp(D, config.intermediate_size, ("embed", "mlp"), **make)

    def __call__(self, x, angle, queries: Queries, remember, prefix: Keys | None = None, attend=attention.attend):
        """Run one layer; `remember(key, value)` gives the lane's own keys, new ones included.

        Returns the new x and those keys.
        """
        h = self.norm1(x)
        q, k = self.q(h), self.k(h)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = layers.rotate(q, angle), layers.rotate(k, angle)
        own = remember(k, self.v(h))
        x += self.o(attend(q, queries, own, prefix))
        return x + self.mlp(self.norm2(x)), own


class Decoder(nnx.Module):
    """The stack of layers and the final norm."""

    def __init__(self, config: Config, compute: options.Compute, attend: Callable, *, rngs):
        self.config, self.compute, self.attend = config, compute, attend
        self.blocks = Block(config, rngs=rngs, stack=config.num_hidden_layers)
        self.norm = layers.RMSNorm(config.hidden_size, rngs=rngs, eps=config.rms_norm_eps)

    def __call__(self, prefix: Stream, branches: Stream):
        """Run a prefix and its branches; returns the branches' final vectors [B, J, T, D]."""
        graph, stacked = nnx.split(self.blocks)
        prefix_angle, branch_angle = (angles(s.position, self.config) for s in (prefix, branches))

        def layer(carry, xs):
            (p, b), (params, index) = carry, xs
            block = nnx.merge(graph, layers.gathered(params, self.compute.dtype))
            p, made = block(p, prefix_angle, prefix.queries, _fresh(prefix.queries), attend=self.attend)
            b, _ = block(b, branch_angle, branches.queries, _fresh(branches.queries), _shared(made), self.attend)
            return (_deepened(p, prefix.deep, index), b), None

        layer = layers.recomputed(layer, self.compute.remat)
        (_, x), _ = jax.lax.scan(layer, (prefix.x, branches.x), (stacked, self._indices))
        return self.norm(x)

    def prefill(self, prefix: Stream) -> Cache:
        """Run a prefix alone and keep the keys of every layer."""
        graph, stacked = nnx.split(self.blocks)
        angle = angles(prefix.position, self.config)

        def layer(x, xs):
            params, index = xs
            block = nnx.merge(graph, layers.gathered(params, self.compute.dtype))
            x, own = block(x, angle, prefix.queries, _fresh(prefix.queries), attend=self.attend)
            return _deepened(x, prefix.deep, index), Cache(own.key[:, 0], own.value[:, 0])

        _, cache = jax.lax.scan(layer, prefix.x, (stacked, self._indices))
        return cache

    def extend(self, lanes: Stream, prefix: Cache, prefix_segment_BP, cache: Cache, segment_BJU, slot):
        """Run new lane tokens against the caches, writing their keys at `slot` onwards.

        `segment_BJU` says which lane slots may be seen, the new ones included; time within a lane is its slot. Few
        queries have few scores: attention is XLA's here whatever computes it elsewhere.
        Returns final vectors [B, J, T, D] and the lanes' cache.
        """
        graph, stacked = nnx.split(self.blocks)
        angle = angles(lanes.position, self.config)
        order = jnp.arange(segment_BJU.shape[-1])

        def layer(carry, xs):
            x, cache = carry
            params, past, index = xs
            written = cache

            def remember(key, value):
                nonlocal written
                at = (index, 0, 0, slot, 0, 0)
                written = Cache(
                    *(
                        jax.lax.dynamic_update_slice(all_layers, new[None].astype(all_layers.dtype), at)
                        for all_layers, new in zip(cache, (key, value), strict=True)
                    )
                )
                mine = (jax.lax.dynamic_index_in_dim(a, index, keepdims=False) for a in written)
                return Keys(*mine, segment_BJU, order)

            block = nnx.merge(graph, layers.gathered(params, self.compute.dtype))
            x, _ = block(x, angle, lanes.queries, remember, Keys(*past, prefix_segment_BP))
            return (x, written), None

        (x, cache), _ = jax.lax.scan(layer, (lanes.x, cache), (stacked, prefix, self._indices))
        return self.norm(x), cache

    @property
    def _indices(self) -> jax.Array:
        return jnp.arange(self.config.num_hidden_layers)


def _deepened(x, deep, index):
    """A layer's output with what DeepStack adds behind it; nothing behind the later layers."""
    if deep is None:
        return x
    added = jax.lax.dynamic_index_in_dim(deep, jnp.minimum(index, deep.shape[0] - 1), keepdims=False)
    return x + jnp.where(index < deep.shape[0], added, 0)


def _fresh(queries: Queries):
    """Keys that are just those of the tokens being run."""
    return lambda key, value: Keys(key, value, queries.segment, queries.order)


def _shared(keys: Keys) -> Keys:
    """A prefix's keys as its branches see them: one lane a frame, no order."""
    return Keys(keys.key[:, 0], keys.value[:, 0], keys.segment[:, 0])
