"""Token log-probabilities and cross-entropy from hidden states, never holding [tokens, vocabulary] logits.

With 150,000 words the logits would be the largest array of training. Both functions walk along L in chunks,
form the logits of one chunk and keep a few numbers a token; the backward pass forms them again. Token ids are
compared, not looked up, so that a vocabulary split over devices is not gathered either. On a mesh the kernel's
vocabulary is shared out over all axes: only a chunk's hidden states travel inside the loop. Split by D the kernel
would be gathered for every chunk.

The kernel is laid out as the embedding table, [V, D]: tied weights need no transposed copy. The product runs
in the precision of the hidden states; what follows, and the kernel's gradient summed over chunks, is float32
(or wider, if they are).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from surgery_r1_jax import sharding

CHUNK = 128  # tokens of each frame whose logits exist at one time: B x CHUNK x V x 4 bytes
DISALLOWED = -1e9  # logit of an id that is never sampled: finite, so that no difference of two is NaN


class TokenScores(NamedTuple):
    """What the model thinks of each target token; only `logp_BL` carries a gradient."""

    logp_BL: jax.Array  # log-probability of the target, nats
    entropy_BL: jax.Array  # of the whole distribution, nats
    top1_BL: jax.Array  # whether the target is the likeliest id (bool)


class LossSums(NamedTuple):
    """Sums over tokens: the sums of a batch are the sums of its parts. The loss is nll / weight."""

    nll: jax.Array  # weighted negative log-likelihood, nats
    weight: jax.Array
    correct: jax.Array  # tokens of non-zero weight whose target is the likeliest id
    tokens: jax.Array  # tokens of non-zero weight


def score_tokens(
    hidden_BLD: jax.Array,
    unembed_VD: jax.Array,
    target_BL: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    allowed_V: jax.Array | None = None,
    chunk: int = CHUNK,
) -> TokenScores:
    """Score target tokens under softmax(logits / temperature) over the allowed ids.

    That is the sampler's distribution at this temperature (> 0), before top-k and top-p. A target that is not
    allowed scores about -1e9, not -inf. Positions of padding hold finite rubbish.
    """
    score = partial(_score, temperature=temperature, allowed_V=allowed_V)
    return _walk(score, hidden_BLD, unembed_VD, target_BL, chunk)


def cross_entropy(
    hidden_BLD: jax.Array,
    unembed_VD: jax.Array,
    target_BL: jax.Array,
    weight_BL: jax.Array,
    *,
    allowed_V: jax.Array | None = None,
    number_V: jax.Array | None = None,
    smoothing_sigma: float = 0.0,
    chunk: int = CHUNK,
) -> LossSums:
    """Sums of the weighted cross-entropy; weight 0 marks padding, whose hidden states get no gradient.

    With `smoothing_sigma` > 0 a target that is a whole number (`number_V[id]` >= 0; -1 for other ids) also asks
    for its neighbours: the one-hot becomes a Gaussian of that width over the ids of numbers within three sigma,
    so that a box edge one pixel off costs less than one far away. Ids of the same number share its probability.
    The lowest nll is then the Gaussian's entropy, not 0.
    """
    score = partial(_score, allowed_V=allowed_V)
    if number_V is not None and smoothing_sigma > 0:
        if allowed_V is not None:
            number_V = jnp.where(allowed_V, number_V, -1)
        score = partial(score, number_V=number_V, sigma=smoothing_sigma)
    scores = _walk(score, hidden_BLD, unembed_VD, target_BL, chunk)
    weight_BL = weight_BL.astype(jnp.float32)
    counted_BL = weight_BL != 0
    return LossSums(
        nll=-jnp.sum(jnp.where(counted_BL, weight_BL * scores.logp_BL, 0.0)),
        weight=jnp.sum(weight_BL),
        correct=jnp.sum(counted_BL & scores.top1_BL, dtype=jnp.float32),
        tokens=jnp.sum(counted_BL, dtype=jnp.float32),
    )


def _walk(score, hidden_BLD, unembed_VD, target_BL, chunk: int) -> TokenScores:
    """Apply `score` to chunks of L one after the other, recomputing each in the backward pass."""
    length = target_BL.shape[1]
    chunk = max(1, min(chunk, length))
    steps = -(-length // chunk)

    def cut(x_BL):
        spare = steps * chunk - length
        x_BL = jnp.pad(x_BL, [(0, 0), (0, spare)] + [(0, 0)] * (x_BL.ndim - 2))
        return jnp.moveaxis(x_BL.reshape(x_BL.shape[0], steps, chunk, *x_BL.shape[2:]), 1, 0)

    def join(x_SBl):
        return jnp.moveaxis(x_SBl, 0, 1).reshape(x_SBl.shape[1], steps * chunk)[:, :length]

    # Widened outside the loop, so that the kernel's gradient is summed over chunks in float32.
    unembed_VD = sharding.pinned(unembed_VD.astype(_wide(unembed_VD)), sharding.MESH_AXES, None)
    step = jax.checkpoint(lambda piece: score(piece[0], unembed_VD, piece[1]), prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(step, (cut(hidden_BLD), cut(target_BL))))


def _score(
    hidden_BlD, unembed_VD, target_Bl, *, temperature=1.0, allowed_V=None, number_V=None, sigma=None
) -> TokenScores:
    """Scores of one chunk; with numbers, `logp` is the mean under the smoothed target distribution."""
    kernel_VD = unembed_VD.astype(hidden_BlD.dtype)
    hidden_BlD = sharding.pinned(hidden_BlD, None, None, None)  # few next to the kernel, so it is they that travel
    logits_BlV = jnp.einsum("bld,vd->blv", hidden_BlD, kernel_VD, preferred_element_type=_wide(hidden_BlD))
    logits_BlV = sharding.pinned(logits_BlV, None, None, sharding.MESH_AXES)
    logits_BlV = logits_BlV / temperature
    if allowed_V is not None:
        logits_BlV = jnp.where(allowed_V[None, None], logits_BlV, DISALLOWED)
    norm_Bl1 = jax.nn.logsumexp(logits_BlV, axis=-1, keepdims=True)
    logp_BlV = logits_BlV - norm_Bl1

    ids_BlV = jax.lax.broadcasted_iota(target_Bl.dtype, logits_BlV.shape, 2)
    wanted_BlV = (ids_BlV == target_Bl[..., None]).astype(logits_BlV.dtype)
    if number_V is not None:
        wanted_BlV = _smooth(wanted_BlV, number_V, target_Bl, sigma)

    fixed_BlV = jax.lax.stop_gradient(logp_BlV)
    return TokenScores(
        logp_BL=jnp.sum(jnp.where(wanted_BlV > 0, wanted_BlV * logp_BlV, 0.0), axis=-1),
        entropy_BL=-jnp.sum(jnp.exp(fixed_BlV) * fixed_BlV, axis=-1),
        top1_BL=jnp.argmax(fixed_BlV, axis=-1).astype(target_Bl.dtype) == target_Bl,
    )


def _smooth(one_hot_BlV, number_V, target_Bl, sigma: float):
    """Spread the one-hot of a number over its neighbours; the rows of other words stay as they are."""
    number_11V = number_V[None, None]
    target_number_Bl1 = number_V[target_Bl][..., None]
    gap_BlV = (number_11V - target_number_Bl1).astype(one_hot_BlV.dtype) / sigma
    near_BlV = (number_11V >= 0) & (target_number_Bl1 >= 0) & (jnp.abs(gap_BlV) <= 3.0)
    weight_BlV = jnp.where(near_BlV, jnp.exp(-0.5 * gap_BlV**2), one_hot_BlV)
    return weight_BlV / jnp.sum(weight_BlV, axis=-1, keepdims=True)


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)
