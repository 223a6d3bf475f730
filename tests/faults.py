"""Saves that are killed or fail at a named call of the file system; started by test_failures.py and prove_failures.py.

python faults.py FOLDER checkpoints|best kill|ERRNO POINT ...

For each point (a share of a save's calls from 0 to 1) a copy of a run that saved twice saves a third time, in a process
of its own that the fault strikes; another one then looks at what is there, goes on from it and saves again. One JSON
line tells of each: point, call, ended (exit status, or minus a signal), told, steps (their folders before anything is
mended), step (what is gone on from), whole, goes_on, left.
"""

import ctypes
import errno
import functools
import importlib
import itertools
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax

from surgery_r1_jax import errors, optim, saves

TX = optax.adam(0.1)
FIRST = 3  # the step that is struck; 1 and 2 were saved, of which the best is 2 alone, and saving 3 prunes one


# What a run comes by, as module and name.
PLACES = {
    "start": ("run", "prepare"),
    "ready": ("run", "keep_layout"),
    "data": ("stream", "Ahead.__next__"),
    "rollout": ("grpo", "sample"),
    "reward": ("grade", "grade"),
    "step": ("milestones", "StopSignal.now"),
    "evaluation": ("evaluate", "predict"),
    "save": ("saves", "Checkpoints.save"),
}


def interrupted(function: Callable, call: int, how: Callable[[], None]) -> Callable:
    """A function that `how` happens to as call number `call` begins."""
    calls = itertools.count(1)

    def counted(*arguments, **named):
        if next(calls) == call:
            how()
        return function(*arguments, **named)

    return counted


def arm(place: str, call: int, how: Callable[[], None]) -> None:
    """Have a place `interrupted`."""
    module, name = PLACES[place]
    *within, name = name.split(".")
    owner = functools.reduce(getattr, within, importlib.import_module(f"surgery_r1_jax.{module}"))
    setattr(owner, name, interrupted(getattr(owner, name), call, how))


def state_of(step: int) -> optim.TrainState:
    """A state that tells its step."""
    params = {"a": np.arange(4096, dtype=np.float32).reshape(64, 64) + step, "b": np.full(300, step, np.float32)}
    return jax.device_get(optim.start(jax.tree.map(jax.numpy.asarray, params), TX))._replace(step=np.int32(step))


def spread(state: optim.TrainState) -> optim.TrainState:
    """The state on a device of each process; a matrix has its rows cut over them."""
    mesh = jax.sharding.Mesh(jax.devices()[:: jax.local_device_count()], "x")

    def put(leaf):
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*"x" * (np.ndim(leaf) == 2)))
        return jax.make_array_from_callback(np.shape(leaf), where, lambda part: np.asarray(leaf)[part])

    return jax.tree.map(put, state)


def save(out: Path, step: int, what: str = "checkpoints") -> None:
    """As a run does."""
    state = spread(state_of(step))
    if what == "best":
        best = saves.Best(out)
        best.save(step, state.params, step / 10)
        best.close()
        return
    manager = saves.Checkpoints(out)
    manager.save(step, state, {"data": "-"})
    manager.close()


def restore(out: Path, what: str = "checkpoints") -> tuple[int, bool]:
    """The step that a run goes on from, or has its best parameters of, and whether it has every byte."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), np.asarray(leaf).dtype, sharding=here), state_of(0)
    )
    if what == "best":
        best = saves.Best(out)
        step = round(10 * best.rate)
        best.close()
        found, wanted = saves.params(out, "best", abstract.params), state_of(step).params
    else:
        found, step, _ = saves.Checkpoints(out).restore(abstract)
        wanted = state_of(step)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return step, all(np.asarray(ours).tobytes() == np.asarray(theirs).tobytes() for ours, theirs in pairs)


def forked(work, *given) -> tuple[int, str]:
    """Do it in a child: its exit status or minus its signal, and what it says."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(told)
        status = 0
        try:
            said = str(work(*given))
        except errors.StorageError as problem:
            status, said = 1, str(problem)
        except BaseException:
            status, said = 99, traceback.format_exc()
        os.write(tell, said.encode()[:60000])
        os._exit(status)
    os.close(tell)
    with os.fdopen(told) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def struck(out: Path, what: str, call: int, number: int) -> int:
    """Save with a fault at this call; how many there were."""
    shim = ctypes.CDLL(None)
    shim.faults_arm(str(out / what).encode(), ctypes.c_long(call), ctypes.c_int(number))
    save(out, FIRST, what)
    return shim.faults_count()


def steps(folder: Path) -> list[int]:
    """The steps that look whole."""
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def look(out: Path, what: str) -> str:
    """What is there after the fault; goes on from it."""
    there = steps(out / what)
    step, whole = restore(out, what)
    save(out, step + 1, what)
    after, whole_after = restore(out, what)
    left = sorted(entry.name for entry in (out / what).iterdir() if not entry.name.isdigit())
    kept = [step + 1] if what == "best" else [step, step + 1]
    goes_on = whole_after and after == step + 1 and steps(out / what) == kept
    return json.dumps({"steps": there, "step": step, "whole": whole, "goes_on": goes_on, "left": left})


def prepare(out: Path, what: str = "checkpoints") -> None:
    """Two whole saves."""
    for step in (1, 2):
        save(out, step, what)


def main(folder: Path, what: str, fault: str, points: list[float]) -> None:
    number = 0 if fault == "kill" else getattr(errno, fault)
    start, out = folder / "start", folder / "struck"
    assert forked(prepare, start, what)[0] == 0

    def fresh() -> Path:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(start, out)
        return out

    status, said = forked(struck, fresh(), what, 1 << 40, 0)
    assert status == 0, said
    calls = int(said)
    for point in points:
        call, began = 1 + round(point * (calls - 1)), time.monotonic()
        ended, told = forked(struck, fresh(), what, call, number)
        status, said = forked(look, out, what)
        seen = json.loads(said) if status == 0 else {"refused": said}
        line = {"point": point, "call": call, "calls": calls, "ended": ended, "told": told}
        print(json.dumps(line | seen | {"seconds": round(time.monotonic() - began, 2)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:4], [float(point) for point in sys.argv[4:]])
