"""Sampling: what is drawn, how likely it is said to be, when it ends, and that lanes do not see each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import randomised
import scipy.stats
from randomised import IMAGE, PAD, STOP, VISION_END, VISION_START
from toy import quick_compile  # noqa: F401

from surgery_r1_jax import grpo, model, objectives, options, sampling
from surgery_r1_jax.batch import padding_like

TOKENS, SAMPLES = 10, 4
WORDS = np.arange(30, 42)  # the few ids that may be drawn, so that lanes stop at different times
FRAMES = jnp.asarray([11, 5])  # numbers in the data set
QUESTIONS = jnp.asarray([[0, 3, -1], [4, 0, 2]])


@pytest.fixture(scope="module")
def prompts(config):
    """Two frames with two and three questions, each right-aligned in its lane."""
    small = ((4, 6),)
    frames = [
        randomised.frame(1, grids=small, lengths=(9, 6)),
        randomised.frame(2, grids=small, lengths=(7, 9, 4)),
    ]
    return right_aligned(randomised.batch(config, frames))


def right_aligned(batch):
    order = np.argsort(batch.branch_segment_BJT > 0, axis=-1, kind="stable")
    names = ("branch_ids_BJT", "branch_pos_BJT", "branch_segment_BJT")
    return batch._replace(**{name: np.take_along_axis(getattr(batch, name), order, axis=-1) for name in names})


def allowed(ids=WORDS):
    mask = np.zeros(randomised.VOCABULARY, bool)
    mask[[*ids, STOP]] = True
    return jnp.asarray(mask)


@functools.lru_cache
def program(config, settings, samples):
    graph, _ = model.build(config)

    def draw(params, prompts, key, frames, questions, allowed_V):
        words = sampling.Vocabulary(allowed_V, STOP, PAD)
        net = model.bind(graph, params)
        return sampling.rollout(net, prompts, key, frames, words, settings, samples, question_BQ=questions)

    return jax.jit(draw)


def roll_out(
    config, params, prompts, settings, samples=SAMPLES, *, seed=0, frames=FRAMES, questions=QUESTIONS, ids=None
):
    ids = allowed() if ids is None else ids
    drawn = program(config, settings, samples)(params, prompts, jax.random.key(seed), frames, questions, ids)
    return jax.tree.map(np.asarray, drawn)


PLAIN = options.Sampler(max_tokens=TOKENS, top_k=8)
GREEDY = options.Sampler(max_tokens=TOKENS, temperature=0.0)


@functools.lru_cache
def scorer(config, settings):
    """The trainer's scores of drawn tokens, from one full forward pass."""
    run = options.GRPO(model="-", samples=SAMPLES, sampler=settings, data=options.Data(root="-"))
    return jax.jit(functools.partial(grpo.token_scores, model.build(config)[0], run))


@pytest.mark.parametrize("chosen", [{"top_p": 0.9, "temperature": 0.7}, {"top_k": 8}], ids=str)
def test_sampled_log_probabilities_are_the_trainers_and_the_first_ratio_is_one(config, params, prompts, chosen):
    settings = options.Sampler(max_tokens=TOKENS, **chosen)
    drawn = roll_out(config, params, prompts, settings)
    scores = scorer(config, settings)(params, sampling.branches(prompts, drawn, SAMPLES), allowed())
    gap = np.abs(scores.logp_BL - drawn.logp_BJT)[drawn.mask_BJT]
    assert gap.size > 20 and gap.max() < 1e-4

    mask = jnp.asarray(drawn.mask_BJT)
    whole = objectives.totals(mask, max_completion=TOKENS)
    plain = options.Objective(preset="dapo")
    _, stats = objectives.policy_loss(scores.logp_BL, drawn.logp_BJT, jnp.ones(mask.shape[:2]), mask, whole, plain)
    for name in ("min", "mean", "max"):
        assert abs(float(stats[f"sampling/importance_sampling_ratio/{name}"]) - 1) < 1e-4


def test_greedy_cached_decoding_takes_the_argmax_of_the_full_forward_pass(config, params, prompts):
    drawn = roll_out(config, params, prompts, GREEDY)
    scores = scorer(config, PLAIN)(params, sampling.branches(prompts, drawn, SAMPLES), allowed())
    mask = drawn.mask_BJT
    assert scores.top1_BL[mask].all()
    np.testing.assert_allclose(drawn.logp_BJT[mask], scores.logp_BL[mask], atol=1e-4)
    assert len(np.unique(drawn.tokens_BJT[mask])) > 3


def test_a_lane_ends_at_its_stop_token_and_padding_lanes_are_empty(config, params, prompts):
    drawn = roll_out(config, params, prompts, PLAIN)
    padding = np.repeat(np.asarray(QUESTIONS) < 0, SAMPLES, axis=1)
    assert padding.any() and not drawn.mask_BJT[padding].any() and not drawn.stopped_BJ[padding].any()
    assert drawn.stopped_BJ[~padding].any() and not drawn.stopped_BJ[~padding].all(), "both endings must occur"
    for tokens, mask, stopped, logp in zip(*(a[~padding] for a in drawn_lanes(drawn)), strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and not mask[length:].any()
        assert (tokens[: length - 1] != STOP).all() and stopped == (tokens[length - 1] == STOP)
        assert stopped or length == TOKENS
        assert (tokens[length:] == PAD).all() and (logp[length:] == 0).all() and (logp[:length] < 0).all()


def drawn_lanes(drawn):
    return drawn.tokens_BJT, drawn.mask_BJT, drawn.stopped_BJ, drawn.logp_BJT


def test_a_completion_does_not_depend_on_what_else_is_in_the_batch(config, params, prompts):
    whole = roll_out(config, params, prompts, PLAIN)

    def lanes(drawn, b, q):
        return drawn.tokens_BJT[b, q * SAMPLES : (q + 1) * SAMPLES]

    # Frames change places, and so do the second frame's questions.
    order = [2, 0, 1]
    moved = type(prompts)(*(field[::-1] for field in prompts))
    questions = QUESTIONS[::-1]
    for name in ("branch_ids_BJT", "branch_pos_BJT", "branch_segment_BJT"):
        field = getattr(moved, name).copy()
        field[0] = field[0][order]
        moved = moved._replace(**{name: field})
    questions = questions.at[0].set(questions[0][jnp.asarray(order)])
    shuffled = roll_out(config, params, moved, PLAIN, frames=FRAMES[::-1], questions=questions)
    for new, old in enumerate(order):
        assert np.array_equal(lanes(shuffled, 0, new), lanes(whole, 1, old))
    for q in range(2):
        assert np.array_equal(lanes(shuffled, 1, q), lanes(whole, 0, q))

    # The first frame is padding, and of the second one question is.
    empty = padding_like(prompts)
    rest = type(prompts)(*(np.stack([nothing[0], field[1]]) for nothing, field in zip(empty, prompts, strict=True)))
    rest.branch_segment_BJT[1, 1] = 0
    dropped = roll_out(config, params, rest, PLAIN)
    assert not dropped.mask_BJT[0].any() and not dropped.mask_BJT[1, SAMPLES : 2 * SAMPLES].any()
    for q in (0, 2):
        assert np.array_equal(lanes(dropped, 1, q), lanes(whole, 1, q))

    # The second frame is alone in a smaller batch.
    alone = type(prompts)(*(field[1:] for field in prompts))
    alone = roll_out(config, params, alone, PLAIN, frames=FRAMES[1:], questions=QUESTIONS[1:])
    assert np.array_equal(alone.tokens_BJT[0], whole.tokens_BJT[1])


def test_samples_of_a_question_differ_and_so_do_frames_and_steps(config, params, prompts):
    drawn = roll_out(config, params, prompts, PLAIN)
    for b, q in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
        lanes = drawn.tokens_BJT[b, q * SAMPLES : (q + 1) * SAMPLES]
        assert len({tuple(lane) for lane in lanes}) > SAMPLES / 2
    again = roll_out(config, params, prompts, PLAIN)
    later = roll_out(config, params, prompts, PLAIN, seed=1)
    assert np.array_equal(again.tokens_BJT, drawn.tokens_BJT)
    assert not np.array_equal(later.tokens_BJT, drawn.tokens_BJT)
    # The same picture and question under other numbers gets other random numbers.
    renamed = roll_out(config, params, prompts, PLAIN, frames=FRAMES + 1)
    asked = roll_out(config, params, prompts, PLAIN, questions=QUESTIONS + 1)
    for other in (renamed, asked):
        assert (other.tokens_BJT != drawn.tokens_BJT).any(axis=-1)[drawn.mask_BJT.any(axis=-1)].mean() > 0.9


def test_decoding_ends_when_every_lane_has_stopped(config, params, prompts, monkeypatch):
    steps, draw = [], sampling.draw

    def counted(*arguments):
        jax.debug.callback(lambda: steps.append(1))
        return draw(*arguments)

    monkeypatch.setattr(sampling, "draw", counted)
    settings = options.Sampler(max_tokens=200, temperature=1.5)
    drawn = roll_out(config, params, prompts, settings, ids=allowed(WORDS[:2]))
    jax.effects_barrier()
    assert 1 < len(steps) == drawn.mask_BJT.sum(-1).max() < 200
    steps.clear()
    nothing = roll_out(config, params, padding_like(prompts), settings, ids=allowed(WORDS[:2]))
    jax.effects_barrier()
    assert not steps and not nothing.mask_BJT.any()


def test_forbidden_ids_are_never_drawn_however_likely(config, params, prompts):
    forbidden = np.asarray([IMAGE, VISION_START, VISION_END, PAD, *range(1014, 1024)])
    # Rows so large that some forbidden id has the largest logit nearly everywhere.
    loud = params | {"head": params["head"].at[forbidden].multiply(50.0)}
    everything = jnp.ones(randomised.VOCABULARY, bool)
    without = everything.at[forbidden].set(False)
    for settings in (PLAIN, GREEDY):
        control = roll_out(config, loud, prompts, settings, ids=everything)
        assert np.isin(control.tokens_BJT[control.mask_BJT], forbidden).all()
        drawn = roll_out(config, loud, prompts, settings, ids=without)
        assert drawn.mask_BJT.any() and not np.isin(drawn.tokens_BJT[drawn.mask_BJT], forbidden).any()


LOGITS = np.asarray([2.0, -1.0, 0.5, 1.9, 0.0, -3.0, 1.0, -0.5, 0.7, -2.0])


def kept_by_numpy(logits, temperature, top_k, top_p):
    """Token -> probability after truncation, by walking down the ranks."""
    p = np.exp(logits / temperature - np.max(logits / temperature))
    p /= p.sum()
    kept, held = {}, 0.0
    for token in np.argsort(-p):
        if held >= top_p or (top_k and len(kept) == top_k):
            break
        kept[int(token)] = p[token]
        held += p[token]
    return {token: share / held for token, share in kept.items()}, np.log(p)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 0.9), (2.0, 4, 0.6), (0.3, 3, 1.0), (1.0, 0, 1e-6)],
)
def test_tokens_are_drawn_as_often_as_a_numpy_truncation_says(temperature, top_k, top_p):
    kept, logp = kept_by_numpy(LOGITS, temperature, top_k, top_p)
    draws = 5_000
    keys = jax.random.split(jax.random.key(5), (1, draws))
    settings = options.Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
    draw = jax.jit(
        lambda keys, logits: sampling.draw(keys, jnp.broadcast_to(logits, (1, draws, logits.size)), settings)
    )
    token, said = (np.asarray(a[0]) for a in draw(keys, jnp.asarray(LOGITS, jnp.float32)))
    np.testing.assert_allclose(said, logp[token], atol=1e-5)  # before truncation
    counts = np.bincount(token, minlength=LOGITS.size)
    assert set(np.flatnonzero(counts)) == set(kept)
    if len(kept) > 1:
        order = sorted(kept)
        expected = [kept[t] * draws for t in order]
        assert scipy.stats.chisquare(counts[order], expected).pvalue > 1e-3


def test_temperature_zero_takes_the_first_of_the_likeliest():
    logits = jnp.asarray(LOGITS, jnp.float32)[None, None]
    token, logp = sampling.draw(jax.random.split(jax.random.key(0), (1, 1)), logits, options.Sampler(temperature=0.0))
    assert token.item() == 0 and abs(logp.item() - jax.nn.log_softmax(logits)[0, 0, 0]) < 1e-6
