"""What comes between the steps of a run: the dev split is asked, a checkpoint saved, a stop signal heeded."""

import itertools
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from surgery_r1_jax import errors, evaluate, hosts, log, model, optim, options, pipeline, places, run, saves, speed


class StopSignal:
    """Remembers SIGTERM, so that a loop can save at a step boundary and leave; a context manager.

    Of several processes all must leave at the same step, whichever got the signal: there JAX's own preemption
    service listens and settles on the question, counted from the first, that all answer with yes. Steps would not do:
    before the first question it takes the count to be 0, and a resumed run never comes to step 1.
    """

    _questions = itertools.count(1)  # of all runs of a process

    def __init__(self):
        self._noted = False
        self._alone = not hosts.joined()

    def __enter__(self):
        if self._alone:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_):
        if self._alone:
            signal.signal(signal.SIGTERM, self._before)

    def now(self) -> bool:
        """Whether to leave. All processes must ask equally often, and none again after a yes."""
        return self._noted if self._alone else multihost_utils.reached_preemption_sync_point(next(self._questions))

    def _note(self, *_):
        self._noted = True


def dev_frames(data: options.Data, settings: options.Evaluation) -> tuple[Sequence, options.Data]:
    """Frames of the evaluation split, and how to batch them."""
    chosen = data.model_copy(
        update=dict(split=settings.split, frames=settings.frames, questions=settings.questions, limit=settings.limit)
    )
    return pipeline.read(chosen), chosen


def evaluated(out: Path, step: int, split: str) -> bool:
    """Whether a run's log has the evaluation after a step. All processes ask, and the first one says."""
    file = places.run_folder(out) / "metrics.jsonl"
    rows = log.read_metrics(file) if jax.process_index() == 0 and file.is_file() else []
    found = any(row["step"] == step and row["split"] == split for row in rows)
    return bool(multihost_utils.broadcast_one_to_all(np.int32(found)))


def owed(out: Path, plan: options.Schedule, step: int, split: str) -> bool:
    """Whether a run that goes on from a step has first to make up for the evaluation after it."""
    return step > 0 and plan.evaluates(step) and not evaluated(out, step, split)


class _Stopped(Exception):
    """An evaluation that is not to be ended."""


class Dev:
    """The dev split of a run: scores what is trained on it, logs the scores, and keeps the best."""

    def __init__(self, out: Path, setup: run.Setup, data: options.Data, settings: options.Evaluation):
        self._runner, self._frozen, self._settings = setup.runner, setup.frozen, settings
        self._frames, self._data = dev_frames(data, settings)
        self._best = saves.Best(out)

    def score(self, step: int, params: dict, journal: log.RunLog, stop: StopSignal) -> dict | None:
        """Greedy answers to all its questions, scored; None where `stop` came before the last of them."""

        def heed(done: int, count: int) -> None:
            if done < count and stop.now():
                raise _Stopped

        whole, most = model.joined(self._frozen, params), self._settings.max_tokens
        try:
            predictions = evaluate.predict(self._runner, whole, self._frames, self._data, most, heed)
        except _Stopped:
            return None
        scores = evaluate.score(predictions, self._runner.encoder.classes)
        if scores["joint_rate"] > self._best.rate:
            self._best.save(step, params, scores["joint_rate"])
        journal.metrics(step, flat(scores), split=self._settings.split)  # last: it says that all of it is done
        return scores

    def close(self) -> None:
        """Wait for the last save."""
        self._best.close()


class Milestones:
    """Evaluates and saves where the schedule says so, and leaves a run that is told to stop.

    The checkpoint comes first: who stops a machine waits for seconds, an evaluation takes minutes. One that was not
    ended is made up for by the run that goes on. `about` is kept beside every checkpoint.
    """

    def __init__(
        self,
        plan: options.Schedule,
        dev: Dev,
        saved: saves.Checkpoints,
        about: dict[str, Any],
        journal: log.RunLog,
        clock: speed.Clock,
        stop: StopSignal,
    ):
        self._plan, self._dev, self._saved, self._about = plan, dev, saved, about
        self._journal, self._clock, self._stop = journal, clock, stop
        self.scores: dict = {}  # of the last evaluation

    def due(self, step: int) -> bool:
        """Whether the schedule has anything to be done after this step."""
        return self._plan.evaluates(step) or self._plan.saves(step)

    def make_up(self, step: int, params: dict) -> None:
        """Do the evaluation that the run before this one did not come to. Raises: Preempted."""
        if not self._evaluate(step, params):
            raise errors.Preempted(f"stopped after step {step} of {self._plan.steps}; go on with --resume")

    def reached(self, step: int, state: optim.TrainState, *, stopping: bool) -> None:
        """Do what is due after a step. Raises: Preempted, when all is saved."""
        if saved := stopping or self._plan.saves(step):
            self._save(step, state)
        if self._plan.evaluates(step) and not stopping:
            stopping = not self._evaluate(step, state.params)
        if stopping:
            if not saved:
                self._save(step, state)
            raise errors.Preempted(f"stopped after step {step} of {self._plan.steps}, saved; go on with --resume")

    def _save(self, step: int, state: optim.TrainState) -> None:
        with self._clock.lap("checkpoint"), self._journal.saving(step):
            self._saved.save(step, state, self._about)

    def _evaluate(self, step: int, params: dict) -> bool:
        """Whether it was done to its end."""
        with self._clock.lap("evaluation"):
            scores = self._dev.score(step, params, self._journal, self._stop)
        self.scores = scores or {}
        return scores is not None


def flat(scores: dict) -> dict:
    """Scores by name, those of a question type as kind/name."""
    plain = {name: value for name, value in scores.items() if name != "by_kind"}
    for kind, values in scores.get("by_kind", {}).items():
        plain |= {f"{kind}/{name}": value for name, value in values.items()}
    return plain
