"""Rollout and greedy decoding: one jitted program from a frame's pixels to the completions of all its lanes.

The prefix is run once a frame, every question once, and only then are lanes split into samples; decoding keeps
one cache for the prefix and one for the lanes and ends when every lane has stopped. Random numbers belong to
(step, frame, question, sample, token), so a completion does not depend on what else is in the batch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from surgery_r1_jax import attention, options, sharding
from surgery_r1_jax.batch import FrameBatch
from surgery_r1_jax.decoder import Cache
from surgery_r1_jax.model import QwenVL


class Vocabulary(NamedTuple):
    """What the sampler must know of the tokenizer."""

    allowed_V: jax.Array  # bool: False for vision, control and padding ids, which are never drawn
    stop_id: int
    pad_id: int


class Rollout(NamedTuple):
    """Completions of J = Q * G lanes; sample g of question q is lane q * G + g."""

    tokens_BJT: jax.Array  # int32, stop token included, padding behind it
    logp_BJT: jax.Array  # float32, at the sampling temperature, before truncation to top-k and top-p
    mask_BJT: jax.Array  # bool, drawn tokens
    stopped_BJ: jax.Array  # bool, False where the length ran out


def rollout(
    model: QwenVL,
    prompts: FrameBatch,
    key: jax.Array,
    frame_B: jax.Array,
    vocabulary: Vocabulary,
    sampling: options.Sampler,
    samples: int = 1,
    question_BQ: jax.Array | None = None,
) -> Rollout:
    """Draw `samples` completions for every question.

    `prompts` holds one question a lane, right-aligned, so that all lanes go on at the same slot. `frame_B` numbers
    the frames in the data set and `question_BQ` the questions of each (default: by lane): their share of the random
    key. Padding lanes come back empty.
    """
    B, Q, Tq = prompts.branch_ids_BJT.shape
    J, Tc = Q * samples, sampling.max_tokens
    spread = lambda x, axis=1: jnp.repeat(x, samples, axis=axis)  # noqa: E731

    prefix = model.prefill(prompts)
    segment_BQT = prompts.branch_segment_BJT
    hidden, cache = model.extend(
        prompts.branch_ids_BJT,
        prompts.branch_pos_BJT,
        attention.Queries(segment_BQT, jnp.arange(Tq)[None, None]),
        prefix,
        prompts.prefix_mask_BP,
        model.empty_cache(B, Q, Tq),
        segment_BQT,
        0,
    )
    # From here on a lane is a sample of a question: split the caches and make room for the completion.
    room = [(0, 0), (0, 0), (0, 0), (0, Tc), (0, 0), (0, 0)]
    cache = Cache(*(jnp.pad(spread(a, 2), room) for a in cache))
    valid_BJ = spread(segment_BQT[..., -1] > 0)
    completion = jnp.broadcast_to(valid_BJ[..., None], (B, J, Tc)).astype(jnp.int32)
    segment_BJU = jnp.concatenate([spread(segment_BQT), completion], axis=-1)
    next_pos_BJ = spread(prompts.branch_pos_BJT[..., -1]) + 1
    kernel_VD = sharding.pinned(model.unembed_VD.astype(hidden.dtype), sharding.MESH_AXES, None)

    def logits(hidden_BJD):
        wide = jnp.promote_types(hidden_BJD.dtype, jnp.float32)
        hidden_BJD = sharding.pinned(hidden_BJD, None, None, None)  # the kernel is shared out by vocabulary
        out = jnp.einsum("bjd,vd->bjv", hidden_BJD, kernel_VD, preferred_element_type=wide)
        return sharding.by_frames(jnp.where(vocabulary.allowed_V, out, attention.MASKED))

    if question_BQ is None:
        question_BQ = jnp.broadcast_to(jnp.arange(Q), (B, Q))
    keys_BJ = _lane_keys(key, frame_B, question_BQ, samples)

    def step(state):
        t, logits_BJV, cache, tokens, logps, mask, done_BJ = state
        token, logp = draw(
            jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys_BJ, t), logits_BJV, sampling
        )
        alive = ~done_BJ
        token = jnp.where(alive, token, vocabulary.pad_id)
        tokens = tokens.at[..., t].set(token)
        logps = logps.at[..., t].set(jnp.where(alive, logp, 0.0))
        mask = mask.at[..., t].set(alive)
        hidden, cache = model.extend(
            token[..., None],
            (next_pos_BJ + t)[..., None],
            attention.Queries(jnp.ones((B, J, 1), jnp.int32), jnp.full((1, 1, 1), Tq + t)),
            prefix,
            prompts.prefix_mask_BP,
            cache,
            segment_BJU,
            Tq + t,
        )
        return (
            t + 1,
            logits(hidden[..., 0, :]),
            cache,
            tokens,
            logps,
            mask,
            done_BJ | (token == vocabulary.stop_id),
        )

    state = (
        jnp.int32(0),
        spread(logits(hidden[..., -1, :])),
        cache,
        jnp.full((B, J, Tc), vocabulary.pad_id, jnp.int32),
        jnp.zeros((B, J, Tc), jnp.float32),
        jnp.zeros((B, J, Tc), bool),
        ~valid_BJ,
    )
    state = jax.lax.while_loop(lambda s: (s[0] < Tc) & ~jnp.all(s[-1]), step, state)
    _, _, _, tokens, logps, mask, done_BJ = state
    return Rollout(tokens, logps, mask, done_BJ & valid_BJ)


def draw(keys_BJ: jax.Array, logits_BJV: jax.Array, sampling: options.Sampler) -> tuple[jax.Array, jax.Array]:
    """A token for every lane and its log-probability at the sampling temperature, before any truncation."""
    if sampling.temperature == 0:
        token = jnp.argmax(logits_BJV, axis=-1)
        return token, _pick(jax.nn.log_softmax(logits_BJV), token)
    scaled = logits_BJV / sampling.temperature
    logp = jax.nn.log_softmax(scaled)
    kept = scaled
    if sampling.top_k or sampling.top_p < 1:
        ranked = jnp.sort(logp, axis=-1, descending=True)
        before = jnp.cumsum(jnp.exp(ranked), axis=-1) - jnp.exp(ranked)
        inside = before < sampling.top_p  # the likeliest token always is
        if sampling.top_k:
            inside &= jnp.arange(inside.shape[-1]) < sampling.top_k
        floor = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
        kept = jnp.where(logp >= floor, scaled, attention.MASKED)
    token = jax.vmap(jax.vmap(jax.random.categorical))(keys_BJ, kept)
    return token, _pick(logp, token)


def branches(prompts: FrameBatch, completions: Rollout, samples: int) -> FrameBatch:
    """The batch that scores a rollout: every lane its question and its completion, every drawn token a target."""
    B, Q, Tq = prompts.branch_ids_BJT.shape
    J, Tc = completions.tokens_BJT.shape[1:]
    spread = lambda x: jnp.repeat(x, samples, axis=1)  # noqa: E731
    join = lambda question, rest: jnp.concatenate([spread(question), rest], axis=-1)  # noqa: E731
    after = spread(prompts.branch_pos_BJT[..., -1:]) + 1 + jnp.arange(Tc)
    slot = jnp.arange(J)[:, None] * (Tq + Tc) + (Tq - 1) + jnp.arange(Tc)
    return prompts._replace(
        branch_ids_BJT=join(prompts.branch_ids_BJT, completions.tokens_BJT),
        branch_pos_BJT=join(prompts.branch_pos_BJT, after),
        branch_segment_BJT=join(prompts.branch_segment_BJT, completions.mask_BJT.astype(jnp.int32)),
        score_slot_BL=jnp.broadcast_to(slot.reshape(1, -1), (B, J * Tc)),
        score_target_BL=completions.tokens_BJT.reshape(B, -1),
        score_weight_BL=completions.mask_BJT.reshape(B, -1).astype(jnp.float32),
    )


def _lane_keys(key, frame_B, question_BQ, samples: int):
    numbers = jnp.broadcast_arrays(frame_B[:, None, None], question_BQ[..., None], jnp.arange(samples))
    of_lane = lambda *numbers: functools.reduce(jax.random.fold_in, numbers, key)  # noqa: E731
    return jax.vmap(jax.vmap(of_lane))(*(n.reshape(n.shape[0], -1) for n in numbers))


def _pick(logp_BJV, token_BJ):
    return jnp.take_along_axis(logp_BJV, token_BJ[..., None], axis=-1)[..., 0]
