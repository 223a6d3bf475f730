"""Group relative policy optimisation of a vision-language model on frames with questions.

    prompts -> rollout -> grade -> rewards -> advantages -> update
     Grain     jitted     host     jitted      jitted       jitted

Read `train` from top to bottom: it is the run. Rollout and update share one set of weights and one scoring
function, so there is no gap between sampler and trainer to correct; what rounding leaves is logged.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from surgery_r1_jax import (
    advantages,
    backends,
    errors,
    evaluate,
    flops,
    grade,
    lora,
    milestones,
    model,
    objectives,
    optim,
    options,
    pipeline,
    places,
    rewards,
    run,
    sampling,
    scoring,
    sharding,
    speed,
)
from surgery_r1_jax.batch import FrameBatch


class Experience(NamedTuple):
    """A graded rollout: all that an update reads. Leading axis frames."""

    batch: FrameBatch  # every lane a question and its completion
    mask_BJT: jax.Array  # bool, tokens in the loss
    old_logp_BJT: jax.Array
    ref_logp_BJT: jax.Array  # zeros without a KL term
    advantage_BJ: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def roll_out(
    graph, settings: options.GRPO, params, prompts, key, numbers, words: sampling.Vocabulary
) -> sampling.Rollout:
    """Draw the completions of all lanes; `numbers` are those of frames [B] and questions [B, Q] in the data set."""
    net, (frame_B, question_BQ) = model.bind(graph, params), numbers
    return sampling.rollout(
        net, prompts, key, frame_B, words, settings.sampler, settings.samples, question_BQ=question_BQ
    )


@functools.partial(jax.jit, static_argnums=0)
def judge(settings: options.GRPO, judged: rewards.Judged, drawn: sampling.Rollout):
    """Rewards, advantages by question, the tokens in the loss, and statistics under TRL's names."""
    earned = rewards.score(judged, settings.reward)
    B, J = earned.total.shape
    truncated_BJ = judged.valid & ~drawn.stopped_BJ
    compared = advantages.from_rewards(
        earned.total,
        jnp.broadcast_to(jnp.arange(J) // settings.samples, (B, J)),
        judged.valid,
        num_groups=J // settings.samples,
        scale=settings.objective.scale,
        baseline_BJ=None if settings.objective.truncated_in_baseline else ~truncated_BJ,
    )
    kept_BJ = compared.scorable_BJ
    if settings.mask_flat:
        kept_BJ &= ~jnp.repeat(compared.flat_BQ, settings.samples, axis=1)
    mask_BJT = objectives.loss_mask(drawn.mask_BJT, kept_BJ, truncated_BJ, settings.objective)

    count = jnp.maximum(jnp.sum(judged.valid), 1)
    mean = lambda x_BJ: jnp.sum(jnp.where(judged.valid, x_BJ, 0.0)) / count  # noqa: E731
    length_BJ = jnp.sum(drawn.mask_BJT, axis=-1).astype(jnp.float32)
    right_BJ = earned.accuracy > 0.5
    stats = compared.stats | {
        "completions/mean_length": mean(length_BJ),
        "completions/min_length": jnp.min(length_BJ, where=judged.valid, initial=settings.sampler.max_tokens),
        "completions/max_length": jnp.max(length_BJ),
        "completions/clipped_ratio": mean(truncated_BJ),
        "parse_failure_rate": mean((judged.answer < 0) | ~judged.box_ok),
        "illusion_rate": mean(right_BJ & (rewards.iou(judged) < 0.5)) / jnp.maximum(mean(right_BJ), 1e-9),
        "num_tokens": jnp.sum(drawn.mask_BJT),
    }
    for name in ("format", "accuracy", "iou", "coherence"):
        term_BJ = getattr(earned, name)
        stats[f"rewards/{name}/mean"] = mean(term_BJ)
        stats[f"rewards/{name}/std"] = jnp.sqrt(mean((term_BJ - mean(term_BJ)) ** 2))
    return earned, compared, mask_BJT, stats


def token_scores(graph, settings: options.GRPO, params, batch: FrameBatch, allowed_V) -> scoring.TokenScores:
    """How likely the drawn tokens are under the distribution that the sampler draws from; fields [B, J, T]."""
    net = model.bind(graph, params)
    scores = scoring.score_tokens(
        net.scored(batch),
        net.unembed_VD,
        batch.score_target_BL,
        temperature=settings.sampler.temperature,
        allowed_V=allowed_V,
    )
    lanes = (*batch.branch_ids_BJT.shape[:2], settings.sampler.max_tokens)
    return jax.tree.map(lambda x_BL: x_BL.reshape(lanes), scores)


@functools.partial(jax.jit, static_argnums=(0, 1))
def reference_logp(graph, settings: options.GRPO, params, batch, allowed_V):
    """Log-probabilities of the drawn tokens under the frozen reference [B, J, T]."""
    here = jax.device_put(params, jax.memory.Space.Device)
    return token_scores(graph, settings, here, batch, allowed_V).logp_BL


def frozen_copy(params: dict, compute: options.Compute) -> dict:
    """A copy to hold the policy against: it computes what `params` would, and is half as large where that is bfloat16.

    Matrices, which are only ever used in the precision of compute, are kept in it. With `compute.offload` the copy is
    in the hosts' memory.
    """

    def copied(path, p):
        names = tuple(key.key for key in path)
        made = jnp.array(p, compute.dtype if model.is_matrix(names) else p.dtype, copy=True)
        return jax.device_put(made, jax.memory.Space.Host) if compute.offload else made

    return jax.tree_util.tree_map_with_path(copied, params)


lay_out = jax.jit(sampling.branches, static_argnums=2)


def update(graph, tx, settings: options.GRPO, state: optim.TrainState, frozen, experience: Experience, allowed_V):
    """One optimiser step on graded frames; `frozen` is what else the graph wants, which stays as it is."""
    key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
    # With dropout the policy that is updated is not quite the one that drew. Where each rollout serves one update,
    # it is compared with itself, as TRL does.
    own = bool(settings.lora.dropout) and settings.updates * settings.minibatches == 1
    whole = objectives.totals(
        experience.mask_BJT, max_completion=settings.sampler.max_tokens, parts=settings.accumulate
    )

    def part_loss(params, part: Experience, number):
        noise = lora.noise(params, settings.lora, jax.random.fold_in(key, number))
        whole_params = model.joined(frozen, noise, optim.freeze(params, settings.optimizer))
        scores = token_scores(graph, settings, whole_params, part.batch, allowed_V)
        return objectives.policy_loss(
            scores.logp_BL,
            jax.lax.stop_gradient(scores.logp_BL) if own else part.old_logp_BJT,
            part.advantage_BJ,
            part.mask_BJT,
            whole,
            settings.objective,
            ref_logp_BJT=part.ref_logp_BJT if settings.objective.beta > 0 else None,
            entropy_BJT=scores.entropy_BL,
        )

    def join(a, b):
        ((loss, stats), gradients), ((more, more_stats), more_gradients) = a, b
        return (loss + more, objectives.merge(stats, more_stats)), jax.tree.map(jnp.add, gradients, more_gradients)

    grad = jax.value_and_grad(part_loss, has_aux=True)
    (loss, stats), gradients = run.sum_over_parts(
        lambda part, number: grad(state.params, part, number), experience, settings.accumulate, join
    )
    state, more = optim.update(state, loss, gradients, tx)
    return state, stats | more | {"loss": loss}


def update_step(graph, tx, settings: options.GRPO, state, frozen, experience: Experience, allowed_V, part):
    """One optimiser step on minibatch number `part` of a rollout."""

    def cut(x):
        return jax.lax.dynamic_index_in_dim(x.reshape(-1, settings.minibatches, *x.shape[1:]), part, 1, keepdims=False)

    return update(graph, tx, settings, state, frozen, jax.tree.map(cut, experience), allowed_V)


@jax.jit
def _over_updates(stats: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    how = {"min": jnp.min, "max": jnp.max, "skipped_steps": jnp.max, "skipped_in_a_row": jnp.max}
    return {
        name: how.get(name.rpartition("/")[2], jnp.mean)(jnp.stack([told[name] for told in stats])) for name in stats[0]
    }


def over_updates(stats: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """The statistics of all updates on one rollout: means, extremes, and the most that were left out in a row."""
    return _over_updates(stats) if len(stats) > 1 else stats[0]


def sample(runner: evaluate.Runner, settings: options.GRPO, params, prompts, gold, key, clock: speed.Clock):
    """Draw, grade and judge the completions of a batch; flat groups are drawn anew as often as configured.

    Returns the rollout, the lengths of its completions on the host, its grading, rewards, advantages, loss mask and
    statistics.
    """
    numbers = sharding.put_batch((gold.frame_B, gold.record_BQ), runner.mesh)
    draw = lambda key: roll_out(runner.graph, settings, params, prompts, key, numbers, runner.vocabulary)  # noqa: E731
    with clock.lap("rollout"):
        drawn = draw(key)
    for attempt in range(settings.resample_flat + 1):
        with clock.lap("rollout"):
            tokens, mask, stopped = sharding.local_rows((drawn.tokens_BJT, drawn.mask_BJT, drawn.stopped_BJ))
        with clock.lap("reward"):
            graded = grade.grade(tokens, stopped, gold, runner.encoder, settings.samples)
            judged = judge(settings, sharding.put_batch(graded.judged, runner.mesh), drawn)
            if attempt == settings.resample_flat or not float(judged[3]["flat_groups"]):
                return drawn, mask.sum(-1), graded, *judged
        with clock.lap("rollout"):
            again = draw(jax.random.fold_in(key, attempt + 1))
            drawn = _replace_flat(drawn, again, judged[1].flat_BQ, settings.samples)


@functools.partial(jax.jit, static_argnums=3)
def _replace_flat(drawn, again, flat_BQ, samples: int):
    flat_BJ = jnp.repeat(flat_BQ, samples, axis=1)
    choose = lambda old, new: jnp.where(flat_BJ.reshape(*flat_BJ.shape, *[1] * (old.ndim - 2)), new, old)  # noqa: E731
    return jax.tree.map(choose, drawn, again)


def train(
    settings: options.GRPO, out: str | Path, *, resume: bool = False, profile: tuple[int, int] | None = None
) -> dict:
    """Train, evaluate on dev, keep the best and the last; returns the last evaluation's metrics.

    `profile` names the first and the last step to trace.
    """
    out, frames = places.run_folder(out), pipeline.read(settings.data)
    settings = run.scheduled(settings, frames)
    plan = settings.schedule
    rewards.require_places(settings.reward, frames[0].classes)
    held_against = settings.objective.beta > 0
    setup = run.prepare(out, settings, resume=resume, classes=frames[0].classes, reference=held_against)
    runner, allowed_V = setup.runner, setup.runner.vocabulary.allowed_V

    stream = pipeline.rollouts(frames, runner.encoder, settings.data, seed=settings.seed, shard=runner.shard)
    data_hash = run.fingerprint(frames, runner.shard, settings.seed, stream.plan, settings.data.augment)
    dev = milestones.Dev(out, setup, settings.data, settings.evaluation)

    # The reference is the start, frozen; without a KL term there is none. Adapters leave it where it was.
    reference = (setup.frozen or frozen_copy(setup.params, settings.compute)) if held_against else None
    reference_hash = setup.start if reference is not None else None
    attend = backends.choose(settings.compute, runner.mesh)
    reference_graph, _ = model.build(setup.model, settings.compute, attend)
    steps = plan.steps * settings.updates * settings.minibatches
    tx = optim.transformation(settings.optimizer, steps, setup.params, offload=settings.compute.offload)
    saved, (state, reached, meta) = run.begin(out, setup, tx, data_hash, resume=resume)
    if resume and meta["reference"] != reference_hash:
        raise errors.InputError(f"{settings.model}: not the reference model that {out} was started with")
    take_step = run.keep_layout(functools.partial(update_step, setup.graph, tx, settings), state)

    owed = milestones.owed(out, plan, reached, settings.evaluation.split)
    run.check_profile(profile, reached + 1, plan)
    names = lambda step: run.frame_names(frames, stream.rows(step - 1))  # noqa: E731
    key = jax.random.key(settings.seed)
    cost = flops.of_model(setup.model, settings.lora, settings.optimizer.rates)
    counted = dict(most=settings.sampler.max_tokens, updates=settings.updates, reference=held_against)
    with (
        milestones.StopSignal() as stop,
        run.open_log(out, "grpo", plan, reached if resume else None) as journal,
        stream.starting(reached, lambda pair: (sharding.put_batch(pair[0], runner.mesh), *pair)) as data,
        speed.Clock(runner.mesh.devices) as clock,
        run.Steps(out, reached + 1, plan, journal, clock, names, profile) as steps,
    ):
        for line in stream.plan.lines():
            journal.say(line)
        about = {"data": data_hash, "reference": reference_hash}
        marks = milestones.Milestones(plan, dev, saved, about, journal, clock, stop)
        if owed:
            marks.make_up(reached, state.params)
        for step in steps:
            with clock.lap("data_wait"):
                prompts, host_prompts, gold = next(data)
            policy = model.joined(setup.frozen, state.params)
            drawn, length_BJ, graded, earned, compared, mask_BJT, stats = sample(
                runner, settings, policy, prompts, gold, jax.random.fold_in(key, step), clock
            )
            with clock.lap("update"):
                batch = lay_out(prompts, drawn, settings.samples)
                ref_logp = jnp.zeros_like(drawn.logp_BJT)
                if reference is not None:
                    ref_logp = reference_logp(reference_graph, settings, reference, batch, allowed_V)
                experience = Experience(batch, mask_BJT, drawn.logp_BJT, ref_logp, compared.value_BJ)
                updates = []
                for part in list(range(settings.minibatches)) * settings.updates:
                    state, told = take_step(state, setup.frozen, experience, allowed_V, np.int32(part))
                    updates.append(told)
                steps.dispatched(
                    step, stats | over_updates(updates), speed.reinforced(host_prompts, length_BJ, cost, **counted)
                )
                steps.settle()  # the next rollout needs this update anyway
            if plan.evaluates(step):
                journal.table(step, completions(graded, earned, frames, gold, settings))
            marks.reached(step, state, stopping=stop.now())
    saved.close()
    dev.close()
    return marks.scores


def completions(graded: grade.Graded, earned: rewards.Rewards, frames, gold, settings: options.GRPO) -> list[dict]:
    """Sampled completions of the first frames with their rewards, for the log's table."""
    terms = sharding.local_rows(earned)
    rows = []
    for b, number in enumerate(gold.frame_B):
        for q in np.flatnonzero(gold.valid_BQ[b]):
            record, j = frames[number].records[gold.record_BQ[b, q]], q * settings.samples
            answer = frames[number].classes[gold.answer_BQ[b, q]]  # the record's, unless the frame was mirrored
            row = dict(frame=frames[number].id, question=record.question, answer=answer)
            row |= dict(completion=graded.texts[b][j], reason=graded.parsed[b][j].reason.name)
            rows.append(row | {name: float(term[b, j]) for name, term in terms._asdict().items()})
    return rows[: settings.table_rows]
