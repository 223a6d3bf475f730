"""Saves that are killed or fail at a named call of the file system; started by test_failures.py and prove_failures.py.

python faults.py FOLDER kill|ERRNO POINT ...

For each point (a share of a save's calls from 0 to 1) a copy of a run with two checkpoints makes a third, in a process
of its own that the fault strikes; another one then looks at what is there, goes on from it and saves again. One JSON
line tells of each: point, call, ended (exit status, or minus a signal), seen (what the second says), step, left.
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
FIRST = 3  # the step that is struck; 1 and 2 are whole, and saving 3 prunes 1


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


def save(out: Path, step: int) -> None:
    """As a run does."""
    manager = saves.Checkpoints(out)
    manager.save(step, jax.tree.map(jax.numpy.asarray, state_of(step)), {"data": "-"})
    manager.close()


def restore(out: Path) -> tuple[int, bool]:
    """The step that a run goes on from, and whether it has every byte."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), np.asarray(leaf).dtype, sharding=here), state_of(0)
    )
    found = saves.Checkpoints(out).restore(abstract)
    pairs = zip(jax.tree.leaves(found.state), jax.tree.leaves(state_of(found.step)), strict=True)
    return found.step, all(np.asarray(ours).tobytes() == np.asarray(theirs).tobytes() for ours, theirs in pairs)


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


def struck(out: Path, call: int, number: int) -> int:
    """Save with a fault at this call; how many there were."""
    shim = ctypes.CDLL(None)
    shim.faults_arm(str(out / "checkpoints").encode(), ctypes.c_long(call), ctypes.c_int(number))
    save(out, FIRST)
    return shim.faults_count()


def look(out: Path) -> str:
    """What is there after the fault; goes on from it."""
    step, whole = restore(out)
    save(out, step + 1)
    after, whole_after = restore(out)
    left = sorted(entry.name for entry in (out / "checkpoints").iterdir() if not entry.name.isdigit())
    return json.dumps({"step": step, "whole": whole, "goes_on": whole_after and after == step + 1, "left": left})


def prepare(out: Path) -> None:
    """Two whole checkpoints."""
    for step in (1, 2):
        save(out, step)


def main(folder: Path, fault: str, points: list[float]) -> None:
    number = 0 if fault == "kill" else getattr(errno, fault)
    start, out = folder / "start", folder / "struck"
    assert forked(prepare, start)[0] == 0

    def fresh() -> Path:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(start, out)
        return out

    status, said = forked(struck, fresh(), 1 << 40, 0)
    assert status == 0, said
    calls = int(said)
    for point in points:
        call, began = 1 + round(point * (calls - 1)), time.monotonic()
        ended, told = forked(struck, fresh(), call, number)
        status, said = forked(look, out)
        seen = json.loads(said) if status == 0 else {"refused": said}
        line = {"point": point, "call": call, "calls": calls, "ended": ended, "told": told}
        print(json.dumps(line | seen | {"seconds": round(time.monotonic() - began, 2)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [float(point) for point in sys.argv[3:]])
