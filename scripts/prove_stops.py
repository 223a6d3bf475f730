#!/usr/bin/env python
"""A run is told to stop wherever it may be, runs for long, and is killed again and again.

    stops   one process trains a tiny model by the command line and gets SIGTERM at a named place, every third time
            twice; it has to leave with status 75 and one line within half a minute, or be done with its last step, and
            with --resume auto arrive, bit for bit, where a run arrives that was never disturbed
    soak    one process trains for so many minutes, saving and evaluating all the time; its memory and that of its
            worker may grow by a megabyte in a thousand steps, its threads, open files, blocks of shared memory and
            temporary files not: the least held at the end is at most a tenth more than in the middle
    lost    one run is killed so many times, the first time before its first checkpoint, and started anew with
            --resume auto after pauses; what its files tell of the time at work, lost, down and in saves is held against
            another clock, which sees the processes from outside: within 5 %, or within a second where that is more

Each prints what was tried and what of it failed; the exit status is 1 if anything did. Needs Linux.

.venv/bin/python scripts/prove_stops.py --work /tmp/stops --stops 84 --soak 120 --lost 3
"""

import argparse
import contextlib
import functools
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import numpy as np

HOME = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOME), str(HOME / "tests")]
LIMIT_S, STEPS = 30, 6
STEP_S, SAVE_S, SAVE_EVERY, PAUSE_S = 0.5, 2.0, 100, 8.0  # of the run that is killed; it sleeps so long more
HELD = ("threads", "open files", "blocks of shared memory", "temporary files")  # that a soak counts
SHARED = ("start", "ready", "data", "step", "save", "evaluation")
WHERE = {"sft": SHARED, "grpo": (*SHARED, "rollout", "reward")}
CALLS = {"start": (1,), "ready": (1,), "save": (1, 2), "evaluation": (1, 2)}  # of other places any step's
CONFIG = """model: {folder}/start
data: {{root: {folder}/data, frames: 4, questions: 2, workers: {workers}}}
schedule: {{steps: {steps}, eval_every: {eval_every}, save_every: {save_every}, log_every: {log_every}}}
evaluation: {{frames: 4, questions: 2, limit: 3, max_tokens: 4}}
"""


def victim(place: str, call: int, words: list[str]) -> int:
    """The command line, with SIGTERM to itself at call number `call` of a place; below 0 twice."""
    from surgery_r1_jax import cli, handlers

    handlers.start_devices()
    import faults

    def strike() -> None:
        print(f"signal {time.monotonic()}", flush=True)
        for _ in range(1 + (call < 0)):
            os.kill(os.getpid(), signal.SIGTERM)

    faults.arm(place, abs(call), strike)
    return cli.main(words)


def command(folder: Path, words: list[str], **where: IO) -> subprocess.Popen:
    """Start a program of ours."""
    import toy

    where = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | where
    return subprocess.Popen([sys.executable, *words], env=toy.environ(folder), text=True, **where)


def prepare(folder: Path, **schedule: int) -> None:
    """Data, a model and the configurations of a run of each kind."""
    import toy

    toy.write_start(folder, frames=12)
    plain = CONFIG.format(folder=folder, **schedule)
    (folder / "sft.yaml").write_text(plain)
    (folder / "grpo.yaml").write_text(plain + "samples: 2\nsampler: {max_tokens: 4}\n")


def told_step(line: str) -> int | None:
    """The step after which a run says it stopped, if any."""
    found = re.search(r"stopped after step (\d+)", line)
    return int(found[1]) if found else None


def prove_stops(folder: Path, count: int) -> int:
    """Stop runs; how often it did not end as it should."""
    import toy

    from surgery_r1_jax import saves

    prepare(folder, workers=0, steps=STEPS, eval_every=3, save_every=2, log_every=1)
    words = lambda kind, out: [kind, "--config", f"{folder}/{kind}.yaml", "--out", str(out), "--resume", "auto"]  # noqa: E731
    wanted = {}
    for kind in WHERE:
        plain = command(folder, ["-m", "surgery_r1_jax.cli", *words(kind, folder / kind)])
        said = plain.communicate()[1]
        assert plain.returncode == 0, said[-2000:]
        wanted[kind] = toy.result(folder / kind, STEPS)
    places = [(kind, place) for kind, known in WHERE.items() for place in known]
    failed, seconds = 0, []
    for n in range(count):
        (kind, place), turn = places[n % len(places)], n // len(places)
        calls = CALLS.get(place, range(1, STEPS + 1))
        call = calls[turn % len(calls)] * (-1 if n % 3 == 2 else 1)
        out = folder / f"{kind}{n}"
        process = command(folder, [__file__, "victim", place, str(call), *words(kind, out)])
        printed, told = process.communicate()
        (struck,) = (float(line.split()[1]) for line in printed.splitlines() if line.startswith("signal "))
        took = time.monotonic() - struck
        lines = [line for line in told.splitlines() if line.startswith("stopped: ")]
        nothing_left = process.returncode == 0 and not lines
        done = nothing_left and toy.result(out, STEPS) == wanted[kind]
        saved = saves.last_step(out)
        again = command(folder, ["-m", "surgery_r1_jax.cli", *words(kind, out)])
        after = again.communicate()[1]
        good = done or (process.returncode == 75 and len(lines) == 1 and saved == told_step(lines[0]))
        good = good and "Traceback" not in told and took <= LIMIT_S
        good = good and again.returncode == 0 and toy.result(out, STEPS) == wanted[kind]
        failed += not good
        seconds.append(took)
        verdict = "ok" if good else f"FAILED: {process.returncode} {again.returncode} {told[-500:]} {after[-500:]}"
        print(f"  {n + 1:3} {kind:<4} at {place:<11} {call:3}  left after {took:4.1f} s, {verdict}", flush=True)
    print(
        f"stops: {count} at {len(places)} places, {failed} failed; left after {statistics.median(seconds):.1f} s "
        f"(median), {max(seconds):.1f} s (longest)"
    )
    return failed


def held(pid: int, temporary: Path) -> tuple[float, float, int, int, int, int]:
    """Megabytes of a run, those of its workers, and how many it holds of each of `HELD`."""
    workers, threads = 0.0, 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it, or a worker, has just ended
            # TensorStore's end when there was nothing to save for 20 seconds.
            threads += (thread / "comm").read_text() != "ts_pool_worker\n"
            workers += sum(megabytes(int(child)) for child in (thread / "children").read_text().split())
    files = len(os.listdir(f"/proc/{pid}/fd"))
    shared = sum(not name.startswith("sem.") for name in os.listdir("/dev/shm"))
    return megabytes(pid), workers, threads, files, shared, sum(1 for _ in temporary.rglob("*"))


def megabytes(pid: int) -> float:
    """What a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def prove_soak(folder: Path, minutes: float, kind: str) -> int:
    """Train for long; whether anything grew."""
    from surgery_r1_jax import log

    prepare(folder, workers=1, steps=10_000_000, eval_every=500, save_every=250, log_every=10)
    out, temporary = folder / "run", folder / "temporary"
    temporary.mkdir()
    os.environ["TMPDIR"] = str(temporary)
    words = [kind, "--config", f"{folder}/{kind}.yaml", "--out", str(out)]
    rows, began = [], time.monotonic()
    with open(folder / "told", "w+") as file:  # a pipe that nobody reads would stop the run once it is full
        process = command(folder, ["-m", "surgery_r1_jax.cli", *words], stdout=file, stderr=file)
        while process.poll() is None and time.monotonic() - began < 60 * minutes:
            time.sleep(5)
            if (out / "metrics.jsonl").is_file() and (logged := log.read_metrics(out / "metrics.jsonl")[-1:]):
                rows.append((logged[0]["step"], *held(process.pid, temporary)))
        process.send_signal(signal.SIGTERM)
        process.wait()
        file.seek(0)
        told = file.read()
    if rows[-1][0] == rows[-len(rows) // 10][0]:
        print(f"soak: {kind} stood still at step {rows[-1][0]:,}  FAILED\n{told[-500:]}")
        return True
    late = np.array(rows[len(rows) // 3 :], float)  # by then every program was compiled and every cache filled
    ours, workers = (1000 * np.polyfit(late[:, 0], late[:, i], 1)[0] for i in (1, 2))
    # Files and blocks go when Python collects its garbage: what leaks raises the least that is ever held.
    first, _, last = (part.min(axis=0) for part in np.array_split(late[:, 3:], 3))
    good = process.returncode == 75 and max(ours, workers) <= 1 and bool(np.all(last <= 1.1 * first))
    least = "; ".join(f"{name} {int(a)}, then {int(b)}" for name, a, b in zip(HELD, first, last, strict=True))
    print(f"soak: {kind}, {int(late[-1, 0]):,} steps in {minutes:g} minutes; at least held: {least}")
    print(f"  memory grew by {ours:.2f} MB in 1,000 steps, the workers' by {workers:.2f}{'' if good else '  FAILED'}")
    if not good:
        print(told[-500:])
    return not good


def sleeper(words: list[str]) -> int:
    """The command line, with long steps and saves; prints when each save began and when it was whole."""
    from surgery_r1_jax import cli, handlers

    handlers.start_devices()
    from surgery_r1_jax import saves, stream

    save, following = saves.Checkpoints.save, stream.Ahead.__next__

    def slow_save(self, step: int, *rest: object) -> None:
        began = time.monotonic()
        time.sleep(SAVE_S)
        save(self, step, *rest)
        print(f"save {step} {began} {time.monotonic()}", flush=True)

    def slow_next(self) -> object:
        time.sleep(STEP_S)
        return following(self)

    saves.Checkpoints.save, stream.Ahead.__next__ = slow_save, slow_next
    return cli.main(words)


def logged(file: Path) -> list[dict]:
    """The lines of one of a run's files."""
    from surgery_r1_jax import log

    return log.read_metrics(file) if file.is_file() else []


def watched(folder: Path, start: int, last: int | None) -> tuple[float, float, list[list[float]]]:
    """Session number `start` of a run: when it opened its log, when it ended, and step, begin and end of its saves.

    It is killed half a step after step `last`; None lets it come to its end.
    """
    out = folder / "run"
    words = ["sft", "--config", str(folder / "sft.yaml"), "--out", str(out), "--resume", "auto"]
    process = command(folder, [__file__, "sleeper", *words])
    opened, ended = None, lambda: last in [row["step"] for row in logged(out / "metrics.jsonl")[-1:]]
    while process.poll() is None and not (opened and ended()):
        time.sleep(0.02)
        if opened is None and len(logged(out / "sessions.jsonl")) > start:
            opened = time.monotonic()
    if last:
        time.sleep(STEP_S / 2)
        process.kill()
    printed, told = process.communicate()
    now = time.monotonic()
    assert opened and process.returncode == (-signal.SIGKILL if last else 0), told[-2000:]
    saved = [[float(word) for word in line.split()[1:]] for line in printed.splitlines() if line.startswith("save ")]
    return opened, now, saved


def prove_lost(folder: Path, kills: int) -> int:
    """Kill a run; how many figures of its lost time are wrong."""
    steps = SAVE_EVERY * max(kills, 1)
    prepare(folder, workers=0, steps=steps, eval_every=0, save_every=SAVE_EVERY, log_every=1)
    at_work = lost = down = saving = killed = 0.0
    for start in range(kills + 1):
        # The first time before there is a checkpoint, then sooner or later after another one.
        last = SAVE_EVERY * start + SAVE_EVERY * (2 + start % 3) // 5 if start < kills else None
        opened, ended, saved = watched(folder, start, last)
        whole = saved[-1][2] if saved else opened
        at_work += whole - opened
        lost += ended - whole if last else 0
        down += opened - killed if killed else 0
        saving += sum(end - begin for _, begin, end in saved)
        killed = ended
        what = f"killed after step {last}" if last else f"done with step {steps}"
        print(f"  start {start + 1}: at work {whole - opened:.1f} s, {what} {ended - whole:.1f} s later", flush=True)
        time.sleep(PAUSE_S * (1 + start) if last else 0)
    rows, saves, starts = (logged(folder / "run" / f"{name}.jsonl") for name in ("metrics", "saves", "sessions"))
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, steps + 1))
    told = {
        "at work": (saves[-1]["elapsed_s"], at_work),
        "lost": (sum(row["lost_s"] for row in starts), lost),
        "down": (sum(row["down_s"] for row in starts), down),
        "in saves": (sum(row["seconds"] for row in saves), saving),
    }
    wrong = [name for name, (ours, seen) in told.items() if abs(ours - seen) > max(0.05 * seen, 1.0)]
    figures = ", ".join(f"{ours:.1f} s {name} ({seen:.1f})" for name, (ours, seen) in told.items())
    print(f"lost: {kills} kills; the run tells {figures}{'  FAILED: ' + ', '.join(wrong) if wrong else ''}")
    return len(wrong)


def main() -> int:
    """All of it; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new folder")
    parser.add_argument("--stops", type=int, default=84, help="signals to send (default: %(default)s)")
    parser.add_argument("--soak", type=float, default=120, help="minutes to train (default: %(default)s)")
    parser.add_argument("--soaked", default="sft", choices=sorted(WHERE), help="what trains so long (default: sft)")
    parser.add_argument("--lost", type=int, default=3, help="kills of one run (default: %(default)s)")
    arguments = parser.parse_args()
    failed = 0
    soak = functools.partial(prove_soak, kind=arguments.soaked)
    for name, prove in (("stops", prove_stops), ("soak", soak), ("lost", prove_lost)):
        if much := getattr(arguments, name):
            (arguments.work / name).mkdir(parents=True)
            failed += prove(arguments.work / name, much)
    return int(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["victim"]:
        sys.exit(victim(sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
    if sys.argv[1:2] == ["sleeper"]:
        sys.exit(sleeper(sys.argv[2:]))
    sys.exit(main())
