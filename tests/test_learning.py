"""Training learns: SFT takes in a handful of frames, GRPO moves probability towards what is rewarded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import randomised
import toy
from toy import few_devices, quick_compile  # noqa: F401

from surgery_r1_jax import (
    advantages,
    grpo,
    log,
    model,
    objectives,
    optim,
    options,
    sampling,
    sft,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return toy.write_start(tmp_path_factory.mktemp("learning"), frames=8)


def test_sft_takes_in_a_handful_of_frames(place):
    settings = options.SFT(
        model=str(place / "start"),
        data=options.Data(root=str(place / "data"), frames=4, questions=3),
        targets=options.Targets(reasoning=0.0),
        optimizer=options.Optimizer(kind="muon", learning_rate=0.02, warmup=0.0, schedule="constant"),
        schedule=options.Schedule(steps=60, save_every=1000, log_every=1),
        evaluation=options.Evaluation(split="train", frames=4, questions=3, max_tokens=24),
    )
    scores = sft.train(settings, place / "sft")
    rows = [row for row in log.read_metrics(place / "sft" / "metrics.jsonl") if "loss" in row]
    first, last = rows[0], rows[-1]
    assert first["loss"] > 5 and last["loss"] < 0.2
    assert first["mean_token_accuracy"] < 0.1 and last["mean_token_accuracy"] > 0.95
    # The same question is asked of every frame, and boxes differ: right answers come from the pictures.
    assert scores["n"] == 12 and scores["accuracy"] > 0.9 and scores["miou"] > 0.8


SAMPLES, REWARDED = 16, 33
ALLOWED = jnp.asarray(np.isin(np.arange(randomised.VOCABULARY), [*range(30, 42), randomised.STOP]))
WORDS = sampling.Vocabulary(ALLOWED, randomised.STOP, randomised.PAD)


class Bandit:
    """Two frames with three questions in all, and a reward that is a function of the drawn tokens."""

    def __init__(self, beta):
        config = randomised.config()
        self.graph, _ = model.build(config)
        self.params = toy.params(config)
        self.settings = options.GRPO(
            model="-",
            samples=SAMPLES,
            sampler=options.Sampler(max_tokens=3),
            objective=options.Objective(beta=beta),
            data=options.Data(root="-", frames=2),
        )
        self.tx = optim.transformation(
            options.Optimizer(learning_rate=3e-3, schedule="constant", warmup=0.0), 20, self.params
        )
        small = ((4, 6),)
        frames = [
            randomised.frame(1, grids=small, lengths=(6, 6)),
            randomised.frame(2, grids=small, lengths=(6,)),
        ]
        self.prompts = randomised.batch(config, frames)
        numbers = jnp.arange(2), jnp.tile(jnp.arange(2), (2, 1))
        self.roll_out = lambda params, key: grpo.roll_out(
            self.graph, self.settings, params, self.prompts, key, numbers, WORDS
        )

        self.step = jax.jit(functools.partial(grpo.update_step, self.graph, self.tx, self.settings), donate_argnums=0)

    def start(self):
        return optim.start(jax.tree.map(jnp.copy, self.params), self.tx)

    def update(self, state, key, reward, reference=None):
        """Draw, reward, compare and take one step; returns the state, mean reward and statistics."""
        drawn = self.roll_out(state.params, key)
        reward_BJ = reward(drawn.tokens_BJT)
        valid_BJ = jnp.any(drawn.mask_BJT, axis=-1)
        group_BJ = jnp.broadcast_to(jnp.arange(2 * SAMPLES) // SAMPLES, valid_BJ.shape)
        compared = advantages.from_rewards(reward_BJ, group_BJ, valid_BJ, num_groups=2)
        batch = grpo.lay_out(self.prompts, drawn, SAMPLES)
        ref_logp = jnp.zeros_like(drawn.logp_BJT)
        if reference is not None:
            ref_logp = grpo.reference_logp(self.graph, self.settings, reference, batch, ALLOWED)
        mask_BJT = objectives.loss_mask(
            drawn.mask_BJT, compared.scorable_BJ, valid_BJ & ~drawn.stopped_BJ, self.settings.objective
        )
        experience = grpo.Experience(batch, mask_BJT, drawn.logp_BJT, ref_logp, compared.value_BJ)
        state, stats = self.step(state, {}, experience, ALLOWED, np.int32(0))
        return state, float(compared.stats["reward"]), stats


def test_grpo_makes_the_rewarded_token_likely():
    bandit = Bandit(beta=0.0)

    def reward(tokens_BJT):
        # One completion cannot be scored; it must not get in the way.
        return (tokens_BJT[..., 0] == REWARDED).astype(jnp.float32).at[0, 0].set(jnp.nan)

    state, rewards = bandit.start(), []
    for step in range(20):
        state, mean, stats = bandit.update(state, jax.random.key(step), reward)
        rewards.append(mean)
        assert np.isfinite(float(stats["loss"]))
        # Sampler and trainer agree: before its first update a policy is its own old one.
        assert abs(float(stats["sampling/importance_sampling_ratio/max"]) - 1) < 1e-3
    assert np.mean(rewards[:3]) < 0.25 and np.mean(rewards[-3:]) > 0.9
    assert int(state.skipped) == 0


def test_equal_rewards_change_nothing_without_a_reference_and_only_the_kl_with_one():
    equal = lambda tokens_BJT: jnp.full(tokens_BJT.shape[:2], 0.7)  # noqa: E731
    bandit = Bandit(beta=0.0)
    state, _, stats = bandit.update(bandit.start(), jax.random.key(0), equal)
    assert float(stats["grad_norm"]) == 0 and float(stats["entropy"]) > 0.5
    for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(bandit.params), strict=True):
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()

    bandit = Bandit(beta=0.5)
    reference = toy.params(randomised.config(), seed=1)
    state, kls = bandit.start(), []
    for step in range(20):
        state, _, stats = bandit.update(state, jax.random.key(step), equal, reference)
        kls.append(float(stats["kl"]))
        assert abs(float(stats["policy_loss"])) < 1e-6
        assert abs(float(stats["loss"]) / 0.5 / kls[-1] - 1) < 0.2  # the loss is the KL term, summed by sequence
    assert np.mean(kls[-3:]) < 0.5 * np.mean(kls[:3])
