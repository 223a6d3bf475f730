"""A run tells how fast it is, where its time goes and what it compiled, and asks nothing more of the device for it."""

import math

import jax
import numpy as np
import pytest
import randomised
import toy
from toy import few_devices, quick_compile  # noqa: F401

from surgery_r1_jax import errors, flops, grpo, log, milestones, options, run, sft, speed

STEPS = 6
SHARES = ("data_wait", "update", "evaluation", "checkpoint", "compile", "other")
DONE = speed.Done(
    frames=2, completions=4, prefix_tokens=90, prefix_slots=100, branch_tokens=60, branch_slots=80, flops=3e12
)


class Device:
    """A device that is not there."""

    def __init__(self, device_kind):
        self.device_kind = device_kind


@pytest.fixture
def time_is(monkeypatch):
    """A function that sets the time."""
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, float(seconds))


def clock_of(kind="TPU v4", devices=2):
    return speed.Clock(np.array([Device(kind)] * devices))


def test_rates_are_those_of_training_and_the_shares_those_of_the_wall(time_is):
    clock = clock_of()
    with clock.lap("data_wait"):
        time_is(1)
    with clock.lap("update"):
        time_is(7)
    with clock.lap("evaluation"):
        time_is(9)
    clock.did(DONE)
    clock.did(DONE)
    time_is(10)
    line = clock.line()
    assert line["speed/tokens_per_s"] == pytest.approx(2 * 150 / 8)
    assert line["speed/frames_per_s"] == pytest.approx(2 * 2 / 8)
    assert line["speed/completions_per_s"] == pytest.approx(2 * 4 / 8)
    assert line["speed/step_s"] == pytest.approx(8 / 2)
    assert line["speed/tflops"] == pytest.approx(2 * 3 / 8 / 2)
    assert line["speed/mfu"] == pytest.approx(2 * 3 / 8 / 2 / 275)
    assert (line["padding/prefix"], line["padding/branch"]) == pytest.approx((0.1, 0.25))
    shares = {name: share for name, share in line.items() if name.startswith("time/")}
    assert shares == pytest.approx(
        {"time/data_wait": 0.1, "time/update": 0.6, "time/evaluation": 0.2, "time/other": 0.1}
    )


def test_a_line_tells_what_was_since_the_line_before_even_amid_a_phase(time_is):
    clock = clock_of()
    with clock.lap("update"):
        time_is(3)
        clock.did(DONE)
        assert clock.line()["time/update"] == 1
        time_is(4)
    with clock.lap("checkpoint"):
        time_is(8)
    clock.did(DONE)
    line = clock.line()
    assert line["speed/step_s"] == pytest.approx(1)
    assert (line["time/update"], line["time/checkpoint"]) == pytest.approx((0.2, 0.8))
    assert clock.line()["time/update"] == 0  # a phase stays in the log, so that its curve does not jump


def test_a_lap_within_a_lap_takes_its_time_from_it(time_is):
    clock = clock_of()
    with clock.lap("update"):
        time_is(1)
        with clock.lap("reward"):
            time_is(4)
        time_is(5)
    assert (line := clock.line())["time/update"] == pytest.approx(0.4) and line["time/reward"] == pytest.approx(0.6)


def test_an_unknown_device_has_no_mfu(time_is):
    clock = clock_of("cpu")
    clock.did(DONE)
    time_is(1)
    assert "speed/mfu" not in (line := clock.line()) and line["speed/tflops"] == pytest.approx(1.5)


def test_compiling_is_counted_in_its_phase_and_timed_as_its_own():
    @jax.jit
    def program(x):
        return jax.numpy.sin(x) * 3.25 + x

    with clock_of() as clock, clock.lap("update"):
        program(np.ones(3)).block_until_ready()
        first = clock.line()
        program(np.ones(3)).block_until_ready()
        again = clock.line()
        program(np.ones(4)).block_until_ready()
        other_shape = clock.line()
    program(np.ones(5)).block_until_ready()
    assert first["compile/programs"] == first["compile/programs/update"] == other_shape["compile/programs"] == 1
    assert again["compile/programs"] == 0 and "compile/programs/update" not in again
    assert first["time/compile"] > 0.5 and first["time/compile"] + first["time/update"] == pytest.approx(1, abs=0.01)
    assert clock.line()["compile/programs"] == 0  # it listens no more


def test_memory_is_told_of_the_fullest_device_that_tells(monkeypatch, time_is):
    class Full(Device):
        def __init__(self, stats):
            super().__init__("NVIDIA H100")
            self.memory_stats = lambda: stats

    devices = [Full({"bytes_in_use": n * 2**30, "peak_bytes_in_use": 2 * n * 2**30}) for n in (1, 3)] + [Full(None)]
    monkeypatch.setattr(speed.jax, "local_devices", lambda: devices)
    line = clock_of().line()
    assert (line["memory/used_gib"], line["memory/peak_gib"]) == (3, 6)
    monkeypatch.setattr(speed.jax, "local_devices", lambda: devices[2:])
    assert not [name for name in clock_of().line() if name.startswith("memory/")]


def test_what_a_step_did_is_counted_on_the_batch(config):
    frames = [randomised.frame(n, grids=((4, 6),), lengths=lengths) for n, lengths in enumerate([(7, 5), (6,)])]
    batch, cost = randomised.batch(config, frames, P=20, T=9), flops.of_model(config)
    done = speed.supervised(batch, cost)
    assert done[:-1] == (2, 0, 28, 40, 18, 36) and done.flops == flops.count(cost.training, flops.of_batch(batch))
    length_BJ = np.array([[3, 4, 1, 2], [2, 4, 0, 0]])
    drawing, scoring = flops.of_rollout(batch, length_BJ)
    drawn, trained = flops.count(cost.forward, drawing), flops.count(cost.training, scoring)
    done = speed.reinforced(batch, length_BJ, cost, most=5, updates=2, reference=False)
    assert done[:-1] == (2, 6, 28, 40, 16 + 2 * (7 + 5 + 6), 8 * (9 + 5)) and done.flops == drawn + 2 * trained
    held = speed.reinforced(batch, length_BJ, cost, most=5, updates=2, reference=True)
    assert held.flops == pytest.approx(done.flops + flops.count(cost.forward, scoring))


# Whole runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return toy.write_start(tmp_path_factory.mktemp("speed"), frames=8)


def settings_of(program, place, **schedule):
    common = dict(
        model=str(place / "start"),
        data=options.Data(root=str(place / "data"), frames=2, questions=2),
        schedule=options.Schedule(**(dict(steps=STEPS, eval_every=1, save_every=1, log_every=2) | schedule)),
        evaluation=options.Evaluation(frames=2, questions=3, limit=1, max_tokens=2),
    )
    if program is options.GRPO:
        objective = options.Objective(beta=0.1)
        return program(samples=2, sampler=options.Sampler(max_tokens=3), objective=objective, **common)
    return program(**common)


@pytest.fixture(scope="module")
def ran(place):
    """A profiled run of each program: its folder, and how many programs it compiled in all, by the log's line."""

    def train(module, program):
        jax.clear_caches()  # what other tests compiled
        out, counted = place / module.__name__, []
        count = lambda event, *_, **__: event == speed.COMPILED and counted.append(1)  # noqa: E731
        jax.monitoring.register_event_duration_secs_listener(count)
        module.train(settings_of(program, place), out, profile=(3, 4))
        jax.monitoring.unregister_event_duration_listener(count)
        return out, len(counted)

    return {"sft": train(sft, options.SFT), "grpo": train(grpo, options.GRPO)}


def lines(out):
    return [row for row in log.read_metrics(out / "metrics.jsonl") if row["split"] == "train"]


@pytest.mark.parametrize("program", ["sft", "grpo"])
def test_every_line_of_a_run_tells_its_speed(ran, program):
    rows = lines(ran[program][0])
    assert [row["step"] for row in rows] == [2, 4, 6]
    more = {"sft": (), "grpo": ("rollout", "reward")}[program]
    for row in rows:
        shares = {name: share for name, share in row.items() if name.startswith("time/")}
        assert set(shares) >= {f"time/{phase}" for phase in (*SHARES[:3], *more)} and min(shares.values()) >= 0
        assert sum(shares.values()) == pytest.approx(1, abs=0.01)
        rates = ("tokens_per_s", "frames_per_s", "step_s", "tflops") + ("completions_per_s",) * bool(more)
        assert all(row[f"speed/{name}"] > 0 for name in rates) and "speed/mfu" not in row
        assert row["speed/frames_per_s"] * row["speed/step_s"] == pytest.approx(2)  # frames a step
        assert all(0 <= row[f"padding/{part}"] < 1 for part in ("prefix", "branch"))
        assert all(value is None or math.isfinite(value) for value in row.values() if not isinstance(value, str))
    assert ("speed/completions_per_s" in rows[0]) == bool(more)


# All programs of a run; most of them are small ones of setting up. What the loop compiles, by phase, is exact; two of
# evaluation and one of checkpoint are the sums that are kept beside parameters.
MOST = {"sft": 30, "grpo": 50}
LOOP = {
    "sft": dict(update=1, evaluation=3, checkpoint=1),
    "grpo": dict(rollout=1, reward=1, update=5, evaluation=2, checkpoint=1, other=2),
}


@pytest.mark.parametrize("program", ["sft", "grpo"])
def test_a_run_compiles_a_bounded_number_of_programs_and_none_after_its_first_line(ran, program):
    out, number = ran[program]
    first, *rest = lines(out)
    assert 0 < number <= MOST[program]
    for phase, programs in LOOP[program].items():
        assert first[f"compile/programs/{phase}"] == programs
    assert first["compile/programs"] == sum(LOOP[program].values())
    assert [row["compile/programs"] for row in rest] == [0, 0]


@pytest.mark.parametrize("program", ["sft", "grpo"])
def test_a_profile_holds_the_chosen_steps_and_their_phases(ran, program):
    (trace,) = (ran[program][0] / "profile").rglob("*.xplane.pb")
    found, steps = set(), set()
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                found.add(event.name)
                if event.name == "train":
                    steps.add(dict(event.stats)["step_num"])
    assert steps == {3, 4}
    phases = {"sft": set(), "grpo": {"rollout", "reward"}}[program]
    assert found >= phases | {"data_wait", "update", "evaluation", "checkpoint"}


@pytest.mark.parametrize("profile", [(7, 9), (1, 2)])
def test_a_profile_of_steps_that_will_not_be_is_refused(profile):
    plan = options.Schedule(steps=STEPS)
    with pytest.raises(errors.InputError, match=r"--profile .*: this run goes from step 3 to 6; name steps of it"):
        run.check_profile(profile, 3, plan)
    run.check_profile((1, 9), 3, plan)
    run.check_profile(None, 3, plan)


class Late:
    """A statistic that notes when it is read."""

    def __init__(self, value, step, name, events):
        self.value, self.note = value, lambda: events.append(("read", step, name))

    def __int__(self):
        self.note()
        return int(self.value)

    def __array__(self, *_, **__):
        self.note()
        return np.asarray(self.value)


def test_statistics_are_read_when_the_next_step_is_under_way_and_nothing_else_is(place, tmp_path, monkeypatch):
    events, keep_layout = [], run.keep_layout

    def watched(*arguments):
        take_step, count = keep_layout(*arguments), iter(range(1, STEPS + 1))

        def take(*given):
            events.append(("dispatched", step := next(count), None))
            state, stats = take_step(*given)
            return state, {name: Late(value, step, name, events) for name, value in stats.items()}

        return take

    monkeypatch.setattr(run, "keep_layout", watched)
    monkeypatch.setattr(milestones.Dev, "score", lambda *_: {})
    blocked = []
    monkeypatch.setattr(jax, "block_until_ready", lambda *_: blocked.append(1))
    sft.train(settings_of(options.SFT, place, eval_every=0, save_every=100, log_every=4), tmp_path)
    reads = [(step, name) for kind, step, name in events if kind == "read"]
    soundness = [step for step, name in reads if name == "skipped_in_a_row"]
    assert sorted(soundness) == [1, 2, 3, 4, 4, 5, 6, 6]  # once a step, and in the lines of steps 4 and 6
    assert {step for step, name in reads if name != "skipped_in_a_row"} == {4, 6}
    for step in range(1, STEPS):
        later = events.index(("dispatched", step + 1, None))
        assert all(at > later for at, event in enumerate(events) if event[:2] == ("read", step))
    assert not blocked
