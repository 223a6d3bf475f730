"""A mixture of experts in place of an MLP: each token goes through the few experts that its router prefers.

Tokens are sorted by expert, so that the experts' matrices meet only their own tokens (`jax.lax.ragged_dot`): the
work grows with the experts a token uses, not with those there are.

Source: transformers:models/qwen3_vl_moe/modeling_qwen3_vl_moe.py (Qwen3VLMoeTextSparseMoeBlock).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from surgery_r1_jax import layers


@dataclasses.dataclass(frozen=True)
class Mixture:
    """How many experts there are and how many a token uses; makes the module as `layers.GatedMLP` is made."""

    experts: int
    used: int

    def __call__(self, width, hidden, axes, *, rngs, stack=None) -> "Experts":
        """The module."""
        return Experts(self, width, hidden, axes, rngs=rngs, stack=stack)


class Experts(nnx.Module):
    """A router and its gated MLPs."""

    def __init__(self, mixture: Mixture, width, hidden, axes, *, rngs, stack=None):
        self.mixture, (outer, inner) = mixture, axes
        X = mixture.experts
        self.router = layers.Linear((width, X), (outer, "router"), rngs=rngs, stack=stack)
        small, smaller = (nnx.initializers.normal(size**-0.5) for size in (width, hidden))
        self.gate_up = layers.param(rngs, (X, width, 2, hidden), ("experts", outer, "gate_up", inner), small, stack)
        self.down = layers.param(rngs, (X, hidden, width), ("experts", inner, outer), smaller, stack)

    def __call__(self, x):
        """Map [..., width] to [..., width]."""
        rows_ND, used = x.reshape(-1, x.shape[-1]), self.mixture.used
        share_NK, expert_NK = self.chosen(rows_ND)
        order = jnp.argsort(expert_NK.ravel(), stable=True)  # every token `used` times, by expert
        counts = jnp.bincount(expert_NK.ravel(), length=self.mixture.experts)
        gate_up = self.gate_up[...].astype(x.dtype)
        gate, up = jnp.split(
            jax.lax.ragged_dot(rows_ND[order // used], gate_up.reshape(*gate_up.shape[:2], -1), counts), 2, axis=-1
        )
        out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, self.down[...].astype(x.dtype), counts)
        out *= share_NK.ravel()[order, None].astype(x.dtype)
        return jnp.zeros_like(rows_ND).at[order // used].add(out).reshape(x.shape)

    def chosen(self, rows_ND):
        """Shares [N, used] of each token's experts, which sum to one, and their numbers."""
        odds_NX = jax.nn.softmax(self.router(rows_ND).astype(jnp.promote_types(rows_ND.dtype, jnp.float32)), axis=-1)
        share_NK, expert_NK = jax.lax.top_k(odds_NX, self.mixture.used)
        return share_NK / jnp.sum(share_NK, axis=-1, keepdims=True), expert_NK
