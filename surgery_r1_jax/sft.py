"""Supervised fine-tuning: frames with their questions and answers, loss on the answers.

Read `train` from top to bottom: it is the run.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from surgery_r1_jax import (
    flops,
    lora,
    milestones,
    model,
    optim,
    options,
    pipeline,
    places,
    run,
    scoring,
    sharding,
    speed,
)


def loss_and_gradients(graph, params, frozen, batch, number_V, key, settings: options.SFT):
    """Mean loss over the answer tokens of a batch, its gradients and token accuracy, part by part.

    `frozen` is what else the graph wants; it gets no gradients. `key` draws what adapters drop. Every part's sums are
    divided by the whole batch's weight, so that without dropout the split changes nothing but rounding.
    """
    weight = jnp.maximum(batch.score_weight_BL.sum(), 1.0)

    def part_loss(params, part, number):
        noise = lora.noise(params, settings.lora, jax.random.fold_in(key, number))
        net = model.bind(graph, model.joined(frozen, noise, optim.freeze(params, settings.optimizer)))
        sums = scoring.cross_entropy(
            net.scored(part),
            net.unembed_VD,
            part.score_target_BL,
            part.score_weight_BL,
            number_V=number_V,
            smoothing_sigma=settings.smoothing_sigma,
        )
        return sums.nll / weight, sums.correct

    grad = jax.value_and_grad(part_loss, has_aux=True)
    (loss, correct), gradients = run.sum_over_parts(
        lambda part, number: grad(params, part, number), batch, settings.accumulate
    )
    tokens = jnp.maximum(jnp.sum(batch.score_weight_BL > 0), 1)
    return loss, gradients, {"loss": loss, "mean_token_accuracy": correct / tokens, "num_tokens": tokens}


def train_step(graph, tx, state, frozen, batch, number_V, settings: options.SFT):
    """One update."""
    key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
    loss, gradients, stats = loss_and_gradients(graph, state.params, frozen, batch, number_V, key, settings)
    state, more = optim.update(state, loss, gradients, tx)
    return state, stats | more


def train(
    settings: options.SFT, out: str | Path, *, resume: bool = False, profile: tuple[int, int] | None = None
) -> dict:
    """Train, evaluate on dev, keep the best and the last; returns the last evaluation's metrics.

    `profile` names the first and the last step to trace.
    """
    out, frames = places.run_folder(out), pipeline.read(settings.data)
    settings = run.scheduled(settings, frames)
    plan = settings.schedule
    setup = run.prepare(out, settings, resume=resume, classes=frames[0].classes)
    runner = setup.runner

    stream = pipeline.training(
        frames, runner.encoder, settings.data, settings.targets, seed=settings.seed, shard=runner.shard
    )
    rest = settings.seed, stream.plan, settings.targets, settings.data.augment
    data_hash = run.fingerprint(frames, runner.shard, *rest)
    dev = milestones.Dev(out, setup, settings.data, settings.evaluation)
    number_V = jax.device_put(
        runner.encoder.chat.number_values(setup.model.text.vocab_size), sharding.replicated(runner.mesh)
    )

    tx = optim.transformation(settings.optimizer, plan.steps, setup.params, offload=settings.compute.offload)
    saved, (state, reached, _) = run.begin(out, setup, tx, data_hash, resume=resume)
    take_step = run.keep_layout(functools.partial(train_step, setup.graph, tx, settings=settings), state)
    owed = milestones.owed(out, plan, reached, settings.evaluation.split)
    run.check_profile(profile, reached + 1, plan)
    names = lambda step: run.frame_names(frames, stream.rows(step - 1))  # noqa: E731
    cost = flops.of_model(setup.model, settings.lora, settings.optimizer.rates)
    put = lambda host: (sharding.put_batch(host, runner.mesh), speed.supervised(host, cost))  # noqa: E731
    with (
        milestones.StopSignal() as stop,
        run.open_log(out, "sft", plan, reached if resume else None) as journal,
        stream.starting(reached, put) as data,
        speed.Clock(runner.mesh.devices) as clock,
        run.Steps(out, reached + 1, plan, journal, clock, names, profile) as steps,
    ):
        for line in stream.plan.lines():
            journal.say(line)
        marks = milestones.Milestones(plan, dev, saved, {"data": data_hash}, journal, clock, stop)
        if owed:
            marks.make_up(reached, state.params)
        for step in steps:
            with clock.lap("data_wait"):
                batch, done = next(data)
            with clock.lap("update"):
                state, stats = take_step(state, setup.frozen, batch, number_V)
                steps.dispatched(step, stats, done)
                if (stopping := stop.now()) or marks.due(step):
                    steps.settle()
            marks.reached(step, state, stopping=stopping)
    saved.close()
    dev.close()
    return marks.scores
