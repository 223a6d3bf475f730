#!/usr/bin/env python
"""What is left of a run when a host is lost, when a save is killed, when the disk is full, and when it turns bits.

    hosts   two processes train a tiny model by the command line; one of them is killed, or stopped, at a named place;
            the other has to end within a minute with one line, and both, started again with --resume auto, have to
            arrive at the checkpoint and the log of a run that was never disturbed, bit for bit
    commits the same, but one of the two meets a full disk, or another error, from some call of a save on; both have to
            end within that time, with one line each, and no step may look whole but those before it
    kills   a save is killed at every so-many-th call that changes something on disk: half of them saves of the best
            parameters, the others of a checkpoint
    full    a save meets a full disk, or another error, from some such call on; as many of both
    lives   a whole run is killed so many times, at any such call of it, and started again with --resume auto; it has
            to lose no more than the steps since a checkpoint was due, and to arrive where the undisturbed one does
    bits    one bit of a checkpoint is turned, or a file of it cut or removed
    sums    what part of the time of restoring a state of so many gigabytes its sums take; fails nothing

Each prints what was tried and what of it failed; the exit status is 1 if anything did. Needs Linux and a C compiler.

.venv/bin/python scripts/prove_failures.py --work /tmp/failures --hosts 20 --kills 240 --bits 500
"""

import argparse
import contextlib
import ctypes
import errno
import itertools
import json
import logging
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOME), str(HOME / "tests")]
LIMIT_S = 60  # within which the others have to end
STEPS, SAVE_EVERY = 9, 3
WHERE = {"step": (2, 4, 7), "save": (1, 2), "commit": (2, 5), "evaluation": (1, 2)}  # places, and at which call
ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EACCES")


def host(place: str, call: int, number: int, words: list[str]) -> int:
    """The command line, with a signal to this whole host at call number `call` of a place.

    At "disk" the number is that of an error, which all calls of the second save have from number `call` on.
    """
    from surgery_r1_jax import cli, hosts

    join, calls = hosts.join, itertools.count(1)

    def strike() -> None:
        for process in (os.getppid(), os.getpid()):  # the one that watches first
            os.kill(process, number)

    def fill() -> None:
        out = Path(words[words.index("--out") + 1])
        ctypes.CDLL(None).faults_arm(str(out / "checkpoints").encode(), ctypes.c_long(call), ctypes.c_int(number))
        (out / "struck").touch()

    def join_armed(*arguments) -> None:
        join(*arguments)
        import faults

        if place in faults.PLACES:
            faults.arm(place, call, strike)
        elif place == "disk":
            faults.arm("save", 2, fill)
        elif place == "commit":  # in the middle of a save
            ours = lambda given: any("checkpoints/" in str(path) for path in given)  # noqa: E731
            counted = lambda event, given: event in ("os.rename", "os.mkdir", "open") and ours(given[:2])  # noqa: E731
            sys.addaudithook(lambda *about: strike() if counted(*about) and next(calls) == call else None)

    hosts.join = join_armed
    return cli.main(words)


class Pair:
    """Two processes that train together."""

    def __init__(self, folder: Path, out: Path, fault: tuple[int, str, int, int] | None = None):
        import toy

        port, environ = toy.free_port(), toy.environ(folder)
        if fault and fault[1] == "disk":
            environ["LD_PRELOAD"] = str(shim(folder))
        self.errors, self.processes = [folder / f"errors{i}" for i in range(2)], []
        for i, errors in enumerate(self.errors):
            victim, place, call, number = fault or (-1, "-", 0, 0)
            words = ["host", place if i == victim else "-", str(call), str(number)]
            words += ["sft", "--config", str(folder / "sft.yaml"), "--out", str(out), "--resume", "auto"]
            words += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id", str(i)]
            with errors.open("w") as file, open(os.devnull, "w") as nothing:
                program = [sys.executable, __file__, *words]
                self.processes.append(subprocess.Popen(program, env=environ, stdout=nothing, stderr=file))

    def ends(self, index: int, within: float = 600) -> int:
        """The exit status of one."""
        return self.processes[index].wait(timeout=within)

    def told(self, index: int) -> list[str]:
        """What one says is wrong."""
        return [line for line in self.errors[index].read_text().splitlines() if "error" in line]


def prepare(folder: Path) -> None:
    """Data, a model and the configuration of a run."""
    import toy

    toy.write_start(folder, frames=12)
    (folder / "sft.yaml").write_text(
        f"model: {folder}/start\n"
        f"data: {{root: {folder}/data, frames: 4, questions: 2}}\n"
        f"schedule: {{steps: {STEPS}, eval_every: 4, save_every: {SAVE_EVERY}, log_every: 1}}\n"
        "evaluation: {frames: 4, questions: 2, limit: 3, max_tokens: 4}\n"
    )


def prove_hosts(work: Path, count: int) -> int:
    """Lose hosts; how often it did not end as it should."""
    import toy

    folder, out = work / "hosts", work / "hosts" / "run"
    prepare(folder)
    plain = Pair(folder, folder / "plain")
    assert [plain.ends(0), plain.ends(1)] == [0, 0], plain.told(0) + plain.told(1)
    wanted = toy.result(folder / "plain", STEPS)
    places = [(place, call) for place, calls in WHERE.items() for call in calls]
    failed, seconds = 0, []
    for n in range(count):
        place, call = places[n % len(places)]
        victim = 0 if place == "commit" else (n // len(places) + n) % 2
        number = signal.SIGSTOP if n % 4 == 3 else signal.SIGKILL
        shutil.rmtree(out, ignore_errors=True)
        began, pair = time.monotonic(), Pair(folder, out, (victim, place, call, number))
        struck = await_signal(pair.processes[victim].pid)
        status = pair.ends(1 - victim)
        took = time.monotonic() - struck
        if number == signal.SIGSTOP:
            for process in [*children(pair.processes[victim].pid), pair.processes[victim].pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        pair.ends(victim)
        said = pair.told(1 - victim)
        again = Pair(folder, out)
        codes = [again.ends(0), again.ends(1)]
        good = status == 69 and len(said) == 1 and took <= LIMIT_S
        good = good and codes == [0, 0] and toy.result(out, STEPS) == wanted
        left = [path.name for path in (out / "checkpoints").iterdir() if not path.name.isdigit()]
        failed += not good or bool(left)
        seconds.append(took)
        name = f"{signal.Signals(number).name} to host {victim} at {place} {call}"
        told = "ok" if good and not left else f"FAILED: {status} {codes} {said} {left}"
        print(
            f"  {n + 1:3} {name:<42} other ends after {took:4.1f} s, {time.monotonic() - began:5.1f} s in all, {told}"
        )
    print(
        f"hosts: {count} lost at {len(places)} places, {failed} failed; the other ended after "
        f"{statistics.median(seconds):.0f} s (median), {max(seconds):.0f} s (longest)"
    )
    return failed


def prove_commits(work: Path, count: int) -> int:
    """Let commits fail on one of two; how often it did not end as it should."""
    import faults
    import toy

    folder, out = work / "commits", work / "commits" / "run"
    prepare(folder)
    plain = Pair(folder, folder / "plain")
    assert [plain.ends(0), plain.ends(1)] == [0, 0], plain.told(0) + plain.told(1)
    wanted, failed, seconds = toy.result(folder / "plain", STEPS), 0, []
    for n in range(count):
        victim, error = n % 2, ERRORS[n // 2 % len(ERRORS)]
        call = 1 + n // 2 * (5 if victim == 0 else 1)  # the first makes more calls
        shutil.rmtree(out, ignore_errors=True)
        pair = Pair(folder, out, (victim, "disk", call, getattr(errno, error)))
        statuses = [pair.ends(0), pair.ends(1)]
        took = time.time() - (out / "struck").stat().st_mtime
        said, there = [path.read_text() for path in pair.errors], faults.steps(out / "checkpoints")
        one_line = [len(pair.told(i)) for i in range(2)] == [1, 1] and "Traceback" not in "".join(said)
        good = (statuses[victim], statuses[1 - victim]) == (1, 69) and one_line and took <= LIMIT_S
        good = good and "6: not saved: " in said[victim] and there == [SAVE_EVERY]
        again = Pair(folder, out)
        good = good and [again.ends(0), again.ends(1)] == [0, 0] and toy.result(out, STEPS) == wanted
        failed += not good
        seconds.append(took)
        told = "ok" if good else f"FAILED: {statuses} {said} {there}"
        print(f"  {n + 1:3} {error} to host {victim} from call {call:<3} both end after {took:4.1f} s, {told}")
    print(f"commits: {count} failed on one of two, {failed} not well; ended after {max(seconds):.0f} s (longest)")
    return failed


def children(pid: int) -> list[int]:
    """The processes that one started."""
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def await_signal(pid: int) -> float:
    """When a process was killed or stopped."""
    while True:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TZ":
                return time.monotonic()
        time.sleep(0.02)


def struck_saves(work: Path, what: str, fault: str, points: list[float], good) -> tuple[int, int, int]:
    """How many saves were struck, at how many different calls, and how many of them were not as they should."""
    folder = work / f"{what}_{fault}"
    folder.mkdir()
    environ = os.environ | {"LD_PRELOAD": str(shim(work)), "PYTHONPATH": str(HOME), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, str(HOME / "tests" / "faults.py"), str(folder), what, fault, *map(str, points)]
    done = subprocess.run(words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    struck = [line for line in lines if line["ended"] != 0]  # the number of calls differs a little from save to save
    before = {"checkpoints": [1, 2], "best": [2]}[what]

    def well(line: dict) -> bool:
        steps = {2: [before], 3: [[*before, 3], [*before, 3][1:]]}.get(line.get("step"), [])
        return line.get("whole") and line["goes_on"] and line["left"] == [] and line["steps"] in steps

    wrong = [line for line in struck if not (well(line) and good(line))]
    wrong += [line for line in lines if line["ended"] == 0 and line.get("step") != 3]
    for line in wrong:
        print(f"  FAILED: {line}")
    return len(struck), len({line["call"] for line in struck}), len(wrong)


def shim(work: Path) -> Path:
    """The library that puts faults before system calls."""
    library = work / "faults.so"
    if not library.exists():
        words = [shutil.which("cc") or "gcc", "-shared", "-fPIC", "-O1", "-o", str(library)]
        subprocess.run([*words, str(HOME / "tests" / "faults.c"), "-ldl"], check=True)
    return library


def prove_saves(work: Path, kills: int) -> int:
    """Kill saves and let them fail; how often not all was well afterwards."""
    failed = 0
    for what, count in (("checkpoints", kills - kills // 2), ("best", kills // 2)):
        points = [n / max(1, count - 1) for n in range(count)]
        tried, calls, wrong = struck_saves(work, what, "kill", points, lambda line: line["ended"] == -9)
        print(f"kills: {what}, {tried} at {calls} different calls of a save, {wrong} failed")
        failed += wrong
        for error in ERRORS:
            told = lambda line: line["ended"] == 1 and "not saved: " in line["told"] and "\n" not in line["told"]  # noqa: E731
            tried, _, wrong = struck_saves(work, what, error, [n / 10 for n in range(10)], told)
            print(f"full: {what}, {error} from {tried} calls on, {wrong} failed")
            failed += wrong
    return failed


def prove_lives(work: Path, count: int) -> int:
    """Kill a run again and again; how often not all was well."""
    import toy

    folder = work / "lives"
    prepare(folder)
    environ, began, lives = toy.environ(folder) | {"LD_PRELOAD": str(shim(work))}, time.monotonic(), []
    words = [sys.executable, __file__, "lives", str(folder), str(count)]
    with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            lives.append(json.loads(line))
            print(f"  {len(lives):3} {line.rstrip()}  {time.monotonic() - began:.0f} s")
    killed = [life for life in lives if life["ended"] == -signal.SIGKILL]
    runs = sum(life["ended"] == 0 for life in lives)
    failed = sum(not life["good"] for life in lives) + process.returncode
    lost, calls = max(life["lost"] for life in lives), len({life["call"] for life in killed})
    print(f"lives: {runs} runs killed {len(killed)} times at {calls} different calls, {failed} not well; ", end="")
    print(f"they lost {lost} steps at most")
    return failed


def live(folder: Path, count: int) -> None:
    """Runs that are killed at calls to the disk, each life a child; a JSON line of each. The shim is preloaded."""
    import faults
    import toy

    from surgery_r1_jax import cli, grpo, log, saves, sft  # noqa: F401 -- once for all children

    shim, rng, killed = ctypes.CDLL(None), random.Random(7), 0

    def life(out: Path, call: int) -> int:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(folder / "errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        shim.faults_arm(str(out).encode(), ctypes.c_long(call), 0)
        status = cli.main(["sft", "--config", f"{folder}/sft.yaml", "--out", str(out), "--resume", "auto"])
        assert status == 0, status
        return shim.faults_count()

    status, calls = faults.forked(life, folder / "plain", 1 << 40)
    assert status == 0, calls
    wanted, out = toy.result(folder / "plain", STEPS), folder / "run"
    while killed < count or out.exists():
        call = rng.randint(1, int(calls)) if killed < count else 1 << 40
        ended, _ = faults.forked(life, out, call)
        killed += ended == -signal.SIGKILL
        rows = log.read_metrics(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
        lost = max([row["step"] for row in rows], default=0) - (saves.last_step(out) or 0)
        good = ended in (0, -signal.SIGKILL) and lost <= SAVE_EVERY
        if ended != -signal.SIGKILL:
            left = [path for path in out.glob("*/*") if "tmp" in path.name]
            good = good and not left and toy.result(out, STEPS) == wanted
            shutil.rmtree(out)
        print(json.dumps({"call": call, "ended": ended, "lost": lost, "good": good}), flush=True)


def prove_bits(work: Path, count: int) -> int:
    """Damage a checkpoint; how often that was not noticed and not without effect."""
    import faults

    from surgery_r1_jax import errors

    logging.disable()  # Orbax tells of what it can do without
    out, random_ = work / "bits", random.Random(0)
    faults.prepare(out)
    files = sorted(path for path in (out / "checkpoints" / "2").rglob("*") if path.is_file())
    tally = {"refused": 0, "without effect": 0, "silent": 0}

    def look(path: Path, whole: bytes, changed: bytes | None) -> None:
        path.unlink() if changed is None else path.write_bytes(changed)
        try:
            how = "without effect" if faults.restore(out) == (2, True) else "silent"
        except errors.InputError as refusal:
            how = "refused" if f"{out}/checkpoints/2: " in str(refusal) else "silent"
        tally[how] += 1
        path.write_bytes(whole)
        if how == "silent":
            print(f"  FAILED: {path}")

    sizes = [path.stat().st_size for path in files]
    for path in random_.choices(files, sizes, k=count):
        whole = path.read_bytes()
        place, bit = random_.randrange(len(whole)), 1 << random_.randrange(8)
        look(path, whole, whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
    for path in files:
        whole = path.read_bytes()
        for changed in (None, b"", whole[: len(whole) // 2], whole[: len(whole) * 99 // 100]):
            look(path, whole, changed)
    assert faults.restore(out) == (2, True)
    tried = f"{count} bits turned, {len(files)} files removed, emptied, cut at 50 and at 99 %"
    print(f"bits: {tried}: {', '.join(f'{n} {how}' for how, n in tally.items())}")
    return tally["silent"]


def measure_sums(work: Path, gigabytes: int, times: int = 5) -> None:
    """What part of a restore the sums take, where the file is in memory already and where it is not."""
    import jax
    import optax

    from surgery_r1_jax import optim, saves

    logging.disable()
    rows = gigabytes * 10**9 // (3 * 4 * 8 * 4096)  # parameters and two moments, eight matrices each
    draw = lambda n: jax.random.normal(jax.random.key(n), (rows, 4096))  # noqa: E731
    state = optim.start({f"w{n}": draw(n) for n in range(8)}, optax.adam(0.1))
    manager = saves.Checkpoints(work / "sums")
    manager.save(1, state, {"data": "-"})
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    compare, spent = saves._compare, []

    def timed(*given) -> None:
        jax.block_until_ready(given)
        began = time.monotonic()
        compare(*given)
        spent.append(time.monotonic() - began)

    saves._compare = timed
    for cold in (False, True):
        spent.clear()
        whole = []
        for _ in range(times + 1):
            for path in (work / "sums").rglob("*") if cold else ():
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.monotonic()
            manager.restore(abstract)
            whole.append(time.monotonic() - began)
        shares = [100 * part / all_ for part, all_ in zip(spent[1:], whole[1:], strict=True)]  # the first compiles
        print(
            f"sums: {statistics.median(spent[1:]):.2f} of {statistics.median(whole[1:]):.2f} s of restoring "
            f"{gigabytes} GB {'from the disk' if cold else 'from memory'}, {statistics.median(shares):.1f} % "
            f"(median of {times}, {min(shares):.1f} to {max(shares):.1f})"
        )


def main() -> int:
    """All of it; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new folder")
    parser.add_argument("--hosts", type=int, default=20, help="hosts to lose (default: %(default)s)")
    parser.add_argument("--commits", type=int, default=20, help="commits to fail (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=240, help="saves to kill (default: %(default)s)")
    parser.add_argument("--lives", type=int, default=200, help="lives of runs to end (default: %(default)s)")
    parser.add_argument("--bits", type=int, default=500, help="bits to turn (default: %(default)s)")
    parser.add_argument("--gigabytes", type=int, default=0, help="state whose sums to time (default: none)")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True)
    began, failed = time.monotonic(), 0
    if arguments.gigabytes:
        measure_sums(arguments.work, arguments.gigabytes)
    if arguments.bits:
        failed += prove_bits(arguments.work, arguments.bits)
    if arguments.kills:
        failed += prove_saves(arguments.work, arguments.kills)
    if arguments.lives:
        failed += prove_lives(arguments.work, arguments.lives)
    if arguments.commits:
        failed += prove_commits(arguments.work, arguments.commits)
    if arguments.hosts:
        failed += prove_hosts(arguments.work, arguments.hosts)
    print(f"{failed} failed, {(time.monotonic() - began) / 60:.0f} minutes")
    return int(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["host"]:
        sys.exit(host(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]))
    if sys.argv[1:2] == ["lives"]:
        sys.exit(live(Path(sys.argv[2]), int(sys.argv[3])))
    sys.exit(main())
