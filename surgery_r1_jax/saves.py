"""What a run saves as it goes, in Orbax, and how it is read back onto any mesh.

    OUT/checkpoints/N/    state (parameters, optimiser, counters) after N batches of the data, meta (JSON)
    OUT/best/N/           parameters of the best step by the dev split, their sums (JSON)

Orbax writes beside the target and renames, so a killed save leaves no step that looks whole. What a disk changes later
is found by the sums of all values (see `sums`), which are kept beside them.
"""

import contextlib
import hashlib
import inspect
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from surgery_r1_jax import errors, heap, optim, places, sums, tensors

FORMAT = 2


class Restored(NamedTuple):
    """What a run goes on from."""

    state: optim.TrainState
    step: int  # batches taken of the data: all there is to know of its place there
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run folder; the two latest are kept."""

    def __init__(self, out: Path):
        self._manager = _manager(places.place(out) / "checkpoints", keep=2)

    def latest(self) -> int | None:
        """Number of the last whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: optim.TrainState, meta: dict[str, Any]) -> None:
        """Save everything; returns when it is on disk."""
        state = state._asdict()
        args = dict(state=ocp.args.StandardSave(state), meta=_meta_of(meta | {"sums": sums.of(state)}))
        _save(self._manager, step, args)

    def restore(self, abstract: optim.TrainState) -> Restored:
        """Load the last checkpoint into `abstract`'s shapes and shardings.

        Raises: InputError where there is none, or where it is not what was saved.
        """
        step = self.latest()
        if step is None:
            raise errors.InputError(
                f"{self._manager.directory}: no checkpoint to resume from; remove this run or choose another --out, "
                "and start without --resume"
            )
        folder = self._manager.directory / str(step)
        before = [other for other in self._manager.all_steps() if other < step]
        with _reading(folder, f"remove it to go on from step {max(before)}" if before else "start a new run"):
            meta = _meta(folder)
            _match(folder / "state", abstract._asdict())
            wanted = ocp.args.Composite(state=ocp.args.StandardRestore(abstract._asdict()))
            state = self._manager.restore(step, args=wanted)["state"]
            _compare(state, meta["sums"])
        return Restored(optim.TrainState(**state), step, meta)

    def close(self) -> None:
        """Wait for the last save."""
        self._manager.close()


class Best:
    """Parameters of the best step so far, by the joint rate on the dev split.

    While they are saved, `at_once` gigabytes of them are copied at a time.
    """

    def __init__(self, out: Path, at_once: int = 96):
        # Weights are noise to a compressor: it takes longer than the disk.
        handlers = {"params": ocp.PyTreeCheckpointHandler(save_concurrent_gb=at_once, use_compression=False)}
        handlers["meta"] = ocp.JsonCheckpointHandler()
        by_rate = dict(best_fn=lambda metrics: metrics["joint_rate"], item_handlers=handlers)
        self._manager = _manager(places.place(out) / "best", keep=1, **by_rate)

    @property
    def rate(self) -> float:
        """The kept parameters' joint rate, -1 before there are any. Counts steps that a killed run has to repeat."""
        step = self._manager.best_step()
        if step is None:
            return -1.0
        folder = self._manager.directory / str(step)
        with _reading(folder, "remove it"):
            return _meta(folder)["joint_rate"]

    def save(self, step: int, params: dict, rate: float) -> None:
        """Replace the kept parameters."""
        known = {dtype: sums.of(params, dtype) for dtype in tensors.DTYPES}
        meta = _meta_of({"joint_rate": rate, "sums": known})
        args = dict(params=ocp.args.PyTreeSave(params), meta=meta)
        if step in self._manager.all_steps():  # of a run that repeats steps, not to the last bit
            self._manager.delete(step)
        _save(self._manager, step, args, metrics={"joint_rate": rate}, force=True)

    def close(self) -> None:
        """Wait for the last save."""
        self._manager.close()


def last_step(out: Path) -> int | None:
    """The step of a run's last whole checkpoint, if there is one."""
    return max(steps(places.run_folder(out) / "checkpoints"), default=None)


def steps(folder: Path) -> list[int]:
    """The numbers of the whole checkpoints in a folder."""
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def params(out: Path, which: str, wanted: dict) -> dict:
    """The best or the last parameters of a run, of which there may be more than `wanted`.

    Raises: InputError where there are none, or where they are not what was saved.
    """
    best, last = steps(out / "best"), steps(out / "checkpoints")
    if which == "best" and best:
        folder = out / "best" / str(best[-1])
    elif last:
        folder = out / "checkpoints" / str(last[-1])
    else:
        raise errors.InputError(f"{out}: a run folder without a checkpoint; let it train until its first save")
    with _reading(folder, "start from another model"):
        meta, dtype = _meta(folder, older=True), str(jax.tree.leaves(wanted)[0].dtype)
        if which == "best" and best:
            found = _pick(folder / "params", wanted)
            known = meta["sums"][dtype] if meta else None
        else:
            found = _pick(folder / "state", {"params": wanted})
            known = meta["sums"] if meta and dtype == "float32" else None
        if known:
            _compare(found, known)
    return found if folder.parent.name == "best" else found["params"]


def _pick(folder: Path, wanted: dict) -> dict:
    """The arrays of `wanted` (shapes, dtypes, shardings) out of a saved tree that may hold more, from any mesh."""
    how = ocp.args.PyTreeRestore(
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=gigabytes(wanted))) as checkpointer:
        try:
            found = checkpointer.restore(places.absolute(folder), args=how)
        except ValueError:
            _match(folder, wanted, part=True)  # tells which array it is
            raise
    for path, leaf in sums.named(found).items():
        if not isinstance(leaf, jax.Array):
            raise ValueError(f"parameter {path} is missing")
    return found


def _save(manager: ocp.CheckpointManager, step: int, args: dict[str, ocp.args.CheckpointArgs], **how: Any) -> None:
    """Save, until it is on disk. Raises: StorageError where the disk does not take it."""
    with _without_strays() as quiet:
        try:
            manager.save(step, args=ocp.args.Composite(**args), **how)
            manager.wait_until_finished()
        except Exception as problem:
            if not (told := errors.of_storage(problem)):
                raise
            quiet.pop_all()  # strays come later too
            whole = steps(manager.directory)
            kept = f"step {whole[-1]} is whole" if whole else "there is none before it"
            raise errors.StorageError(
                f"{manager.directory}/{step}: not saved: {told}; {kept}. Make room, then go on with --resume"
            ) from None
    heap.give_back()  # Orbax saves by new threads each time


def _meta_of(about: dict[str, Any]) -> ocp.args.JsonSave:
    """What is kept beside arrays, with a hash of itself."""
    about = about | {"format": FORMAT}
    return ocp.args.JsonSave(about | {"digest": _digest(about)})


def _meta(folder: Path, *, older: bool = False) -> dict[str, Any] | None:
    """What is kept beside the arrays of a checkpoint; None, if that will do, where an older version kept less.

    Raises: InputError for another format, ValueError for a spoilt file.
    """
    file = folder / "meta" / "metadata"
    if older and not file.is_file():
        return None
    meta = json.loads(file.read_bytes())
    if (found := meta.get("format")) != FORMAT:
        if older:
            return None
        raise errors.InputError(
            f"{folder}: checkpoint format {found}, this version reads {FORMAT}; go on with the version that wrote it, "
            "or start a new run from what that version exports"
        )
    if meta.pop("digest", None) != _digest(meta):
        raise ValueError("meta is not what was saved")
    return meta


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _match(folder: Path, wanted: dict, *, part: bool = False) -> None:
    """Raises: ValueError for an array that was not saved as it is wanted, by what Orbax keeps about it.

    As a `part`, more may have been saved, and in other dtypes.
    """
    there, wanted = sums.named(ocp.PyTreeCheckpointHandler().metadata(places.absolute(folder)).tree), sums.named(wanted)
    for path in wanted if part else wanted | there:
        if path not in there:
            raise ValueError(f"{path} is missing")
        if path not in wanted:
            raise ValueError(f"{path} is not of this run")
        saved, leaf = there[path], wanted[path]
        if saved.shape != leaf.shape or (not part and saved.dtype != leaf.dtype):
            told = (f"{each.dtype}{list(each.shape)}" for each in (saved, leaf))
            raise ValueError("{} was saved as {}, not {}".format(path, *told))


def _compare(found: dict, saved: sums.Sums) -> None:
    """Raises: ValueError for an array that is not what was saved; what else was saved does not matter."""
    for path, pair in sums.of(found).items():
        if saved.get(path) != pair:
            raise ValueError(f"{path} is not what was saved")


@contextlib.contextmanager
def _reading(folder: Path, remedy: str) -> Iterator[None]:
    """What goes wrong in reading a checkpoint, as InputError."""
    with _without_strays() as quiet:
        try:
            yield
        except (errors.InputError, jax.errors.JaxRuntimeError):  # the second is of devices and other processes
            raise
        except Exception as problem:  # Orbax raises what it likes
            quiet.pop_all()  # strays come later too
            told = problem.__cause__ if "TensorStore details" in str(problem) and problem.__cause__ else problem
            raise errors.InputError(f"{folder}: {errors.one_line(told)}; restore it, or {remedy}") from None


def _without_strays() -> contextlib.ExitStack:
    """Keeps quiet about what Orbax gave up when another read or write failed: it ends in its threads, unawaited.

    Python tells of them in three ways, Orbax's log in a fourth. Closing what is returned undoes it.
    """
    quiet = contextlib.ExitStack()
    quiet.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
    sys.unraisablehook = _tell_but_strays
    for logger in map(logging.getLogger, ("asyncio", "absl")):
        quiet.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
    quiet.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    return quiet


def _tell_but_strays(about: Any) -> None:
    """As Python does, but for the tracebacks of strays."""
    if not ("Event loop is closed" in str(about.exc_value) or inspect.iscoroutine(about.object)):
        sys.__unraisablehook__(about)


class _Manager(ocp.CheckpointManager):
    """Orbax's, but blind to a stop signal: asking for it as well, it would disturb the count of who does stop."""

    def reached_preemption(self, step: int) -> bool:
        return False


def _manager(folder: Path, keep: int, best_fn=None, item_handlers=None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        cleanup_tmp_directories=True,  # what killed saves left
        enable_async_checkpointing=False,
        best_fn=best_fn,
        keep_checkpoints_without_metrics=False,  # what is left of a best one whose removal was killed
    )
    return _Manager(places.absolute(folder), options=options, item_handlers=item_handlers)


def gigabytes(tree) -> int:
    """Whole gigabytes that hold the largest array of a tree, which Orbax must be allowed to have at hand."""
    return 1 + max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) // 10**9
