"""Where the time of a run goes, and how much is done in it: the numbers of a log line that are about speed.

A `Clock` is always in one phase (`with clock.lap("update"): ...`), adds up what the steps did (`Done`), and tells both
by the second. It asks nothing of the device: work is counted on host batches, and a step counts once its statistics
were read, which is when it is over. The names in the log:

    speed/step_s, tokens_per_s, frames_per_s, completions_per_s    of the run, over all devices, without padding
    speed/tflops, mfu            FLOPs (flops.py) by the second and device, in 1e12; their share of its peak, if known
    padding/prefix, branch       share of the batches' slots that hold no token, in the part of process 0
    time/PHASE                   share of the time on the wall since the last line; together they are 1
    compile/programs, seconds    programs built or taken from the cache since the last line; programs/PHASE: where
    memory/used_gib, peak_gib    of the fullest local device, where it tells

Rates leave out the time of `AROUND`: what is no training, and what is done once. A phase is also a name in a profile.
"""

import contextlib
import operator
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from surgery_r1_jax import flops
from surgery_r1_jax.batch import FrameBatch

OTHER, COMPILE = "other", "compile"
AROUND = ("evaluation", "checkpoint", COMPILE)

COMPILED = "/jax/core/compile/backend_compile_duration"  # also where the program came from the cache
COMPILING = (COMPILED, "/jax/core/compile/jaxpr_to_mlir_module_duration")


class Done(NamedTuple):
    """What a step did to this process's part of a batch."""

    frames: int
    completions: int
    prefix_tokens: int
    prefix_slots: int  # with padding
    branch_tokens: int
    branch_slots: int
    flops: float


NOTHING = Done(0, 0, 0, 0, 0, 0, 0.0)


def supervised(batch: FrameBatch, cost: flops.Cost) -> Done:
    """An SFT step on a host batch."""
    work = flops.count(cost.training, flops.of_batch(batch))
    return _done(batch, 0, np.count_nonzero(batch.branch_segment_BJT), batch.branch_segment_BJT.size, work)


def reinforced(
    prompts: FrameBatch, length_BJ: np.ndarray, cost: flops.Cost, *, most: int, updates: int, reference: bool
) -> Done:
    """A GRPO step: completions of these lengths are drawn, scored by the reference if there is one, and trained on.

    `most` tokens are the longest that a completion could have become.
    """
    drawing, scoring = flops.of_rollout(prompts, length_BJ)
    work = flops.count(cost.forward, drawing) + flops.count(cost.training, scoring) * updates
    work += flops.count(cost.forward, scoring) * reference
    tokens = int(scoring.tokens) - np.count_nonzero(prompts.prefix_mask_BP)
    slots = length_BJ.size * (prompts.branch_ids_BJT.shape[-1] + most)
    return _done(prompts, np.count_nonzero(length_BJ), tokens, slots, work)


def _done(batch: FrameBatch, completions: int, tokens: int, slots: int, work: float) -> Done:
    mask_BP = batch.prefix_mask_BP
    frames = np.count_nonzero(mask_BP.any(-1))
    return Done(frames, completions, np.count_nonzero(mask_BP), mask_BP.size, tokens, slots, work)


class Clock:
    """Tells the time of one run on these devices; a context manager, within which programs that compile are counted."""

    def __init__(self, devices: np.ndarray):
        self._count, self._peak = devices.size, flops.peak(devices.flat[0].device_kind)
        self._phase, self._seconds, self._programs = OTHER, Counter(), Counter()
        self._steps, self._done, self._mark = 0, NOTHING, time.perf_counter()

    def __enter__(self) -> "Clock":
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        self._mark = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._compiled)

    @contextlib.contextmanager
    def lap(self, phase: str) -> Iterator[None]:
        """Count the time within as that of a phase."""
        before = self._switch(phase)
        try:
            with jax.profiler.TraceAnnotation(phase):
                yield
        finally:
            self._switch(before)

    def did(self, done: Done) -> None:
        """A step is over, and this is what it did."""
        self._steps += 1
        self._done = Done(*map(operator.add, self._done, done))

    def line(self) -> dict[str, float]:
        """What there is to tell since the last line, by the names in the log."""
        self._switch(self._phase)
        wall, seconds, programs = sum(self._seconds.values()), dict(self._seconds), dict(self._programs)
        training = max(wall - sum(seconds.get(phase, 0.0) for phase in AROUND), 1e-9)
        steps, done = self._steps, self._done
        self._seconds = Counter(dict.fromkeys(seconds, 0.0))  # a phase that was met once is told of ever after
        self._programs, self._steps, self._done = Counter(), 0, NOTHING

        by_second = jax.process_count() / training  # every process has as many frames
        rates = {
            "tokens_per_s": (done.prefix_tokens + done.branch_tokens) * by_second,
            "frames_per_s": done.frames * by_second,
            "completions_per_s": done.completions * by_second,
            "step_s": training / max(steps, 1),
            "tflops": done.flops * by_second / self._count / 1e12,
        }
        if self._peak:
            rates["mfu"] = rates["tflops"] * 1e12 / self._peak
        return (
            {f"speed/{name}": rate for name, rate in rates.items() if rate}
            | {
                "padding/prefix": 1 - done.prefix_tokens / max(done.prefix_slots, 1),
                "padding/branch": 1 - done.branch_tokens / max(done.branch_slots, 1),
            }
            | {f"time/{phase}": max(spent, 0.0) / max(wall, 1e-9) for phase, spent in seconds.items()}
            | {"compile/programs": sum(programs.values()), "compile/seconds": seconds.get(COMPILE, 0.0)}
            | {f"compile/programs/{phase}": number for phase, number in programs.items()}
            | _memory()
        )

    def _switch(self, phase: str) -> str:
        """Enter a phase; the one before, which got its time."""
        now, before = time.perf_counter(), self._phase
        self._seconds[before] += now - self._mark
        self._mark, self._phase = now, phase
        return before

    def _compiled(self, event: str, seconds: float, **_: object) -> None:
        """Move the time of a compilation out of the phase that it fell into."""
        if event in COMPILING:
            self._seconds[self._phase] -= seconds
            self._seconds[COMPILE] += seconds
            if event == COMPILED:
                self._programs[self._phase] += 1


def _memory() -> dict[str, float]:
    """Bytes in use on the fullest of this process's devices, now and at most, if devices tell; CPUs do not."""
    told = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"memory/used_gib": "bytes_in_use", "memory/peak_gib": "peak_bytes_in_use"}
    return {ours: max(stats.get(name, 0) for stats in told) / 2**30 for ours, name in names.items() if told}
