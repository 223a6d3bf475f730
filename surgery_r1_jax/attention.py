"""The one attention function: lanes of queries over their own keys and, where there is one, a shared prefix.

    prefix tokens    one lane a frame, causal                         attend(q, own)
    branch tokens    J lanes a frame, causal within a branch,
                     all of them reading their frame's prefix         attend(q, own, prefix)
    cached decoding  the same with one query a lane                   attend(q, cache, prefix)
    vision windows   W lanes an image, both directions                attend(q, own)

The prefix keys are never repeated for the lanes: only the scores have both a prefix and a lane axis. Scores over
prefix and own keys meet in one float32 softmax. Idea of sharing the prefix: Prefix Grouper (arXiv:2506.05433).

This is attention as XLA computes it on any device, and what every other way of computing it is held against; the
others, which never hold all scores at once, are in `backends.py`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a row with nothing to see averages over everything instead of giving NaN; such rows are padding.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


class Keys(NamedTuple):
    """Keys and values of one layer, and who may see them. J is absent for a prefix that all lanes share."""

    key: jax.Array  # [B, J, U, K, H]; prefix [B, P, K, H]
    value: jax.Array
    segment: jax.Array  # int32 [B, J, U]; prefix [B, P]: 0 = empty slot
    order: jax.Array | None = None  # int32, broadcastable to segment: place in time; None = seen from everywhere


class Queries(NamedTuple):
    """Which keys of its own lane a query may see: those of its segment, at or before its place in time."""

    segment: jax.Array  # int32 [B, J, T], 0 = padding
    order: jax.Array | None = None  # int32, broadcastable to segment


@dataclasses.dataclass(frozen=True)
class XLA:
    """`attend` as a value that layers are given: `chunk` queries of a frame at a time, those of all its branches."""

    chunk: int | None = None

    def __call__(self, q_BJTNH: jax.Array, queries: Queries, own: Keys, prefix: Keys | None = None) -> jax.Array:
        """See `attend`."""
        return attend(q_BJTNH, queries, own, prefix, self.chunk if prefix is None else self._of_lane(q_BJTNH))

    def _of_lane(self, q_BJTNH):
        """Queries of each lane at a time: its tokens in equal parts, to the next eight."""
        J, T = q_BJTNH.shape[1:3]
        return self.chunk and -(-T // -(-J * T // self.chunk) // 8) * 8


def attend(q_BJTNH: jax.Array, queries: Queries, own: Keys, prefix: Keys | None = None, chunk: int | None = None):
    """Grouped-query attention of every lane over its own keys and its frame's prefix; returns [B, J, T, N, H].

    A query sees its own lane's keys of the same segment up to its order, and every filled prefix slot.
    `chunk` bounds the memory of the scores: so many queries at a time, recomputed in the backward pass.
    """
    T = q_BJTNH.shape[2]
    if chunk is None or chunk >= T:
        return _attend(q_BJTNH, queries, own, prefix)
    pad = -T % chunk

    def split(x, axis=2):
        x = jnp.pad(x, [(0, pad if a == axis else 0) for a in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :]), axis, 0)

    order = None if queries.order is None else split(jnp.broadcast_to(queries.order, queries.segment.shape))
    step = jax.checkpoint(lambda part: _attend(part[0], Queries(part[1], part[2]), own, prefix))
    parts = jax.lax.map(step, (split(q_BJTNH), split(queries.segment), order))
    out = jnp.moveaxis(parts, 0, 2)
    return out.reshape(*out.shape[:2], -1, *out.shape[4:])[:, :, :T]


def _attend(q_BJTNH, queries, own, prefix):
    B, J, T, N, H = q_BJTNH.shape
    K = own.key.shape[-2]
    wide = jnp.promote_types(q_BJTNH.dtype, jnp.float32)
    q = q_BJTNH.reshape(B, J, T, K, N // K, H) * jnp.asarray(H**-0.5, q_BJTNH.dtype)

    seen = (queries.segment[..., :, None] == own.segment[..., None, :]) & (own.segment[..., None, :] > 0)
    if own.order is not None:
        seen &= own.order[..., None, :] <= queries.order[..., :, None]
    scores = jnp.einsum("bjtkgh,bjukh->bjkgtu", q, own.key, preferred_element_type=wide)
    scores = jnp.where(seen[:, :, None, None], scores, MASKED)
    if prefix is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        out = jnp.einsum("bjkgtu,bjukh->bjtkgh", weights, own.value)
        return out.reshape(B, J, T, N, H)

    P = prefix.key.shape[1]
    shared = jnp.einsum("bjtkgh,bpkh->bjkgtp", q, prefix.key, preferred_element_type=wide)
    shared = jnp.where((prefix.segment > 0)[:, None, None, None, None, :], shared, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([shared, scores], axis=-1), axis=-1).astype(q.dtype)
    out = jnp.einsum("bjkgtp,bpkh->bjtkgh", weights[..., :P], prefix.value)
    out += jnp.einsum("bjkgtu,bjukh->bjtkgh", weights[..., P:], own.value)
    return out.reshape(B, J, T, N, H)
