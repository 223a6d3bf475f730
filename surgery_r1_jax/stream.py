"""Batches without end, by number: made in threads and worker processes, and placed ahead of use.

What a batch holds follows from its number alone. So the state of a stream is how many batches were taken of it, going
on is slicing, and neither worker processes nor the processes that share a batch out change anything.
"""

import atexit
import contextlib
import functools
import gc
import multiprocessing
import os
import queue
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain

from surgery_r1_jax import batch, errors, options
from surgery_r1_jax.batch import Shape
from surgery_r1_jax.plan import Plan, Row

ENDLESS = 1 << 52  # rows; more batches of one frame Grain cannot count
AHEAD = 2  # batches that are placed before they are asked for
LOOK_S = 0.5  # seconds between looks at the worker processes while none gives anything
CLOSE_S = 3.0  # seconds that a thread is given to end
STOP_S = 300  # seconds that a worker outlives a stop signal, in which the run comes to where it saves and ends
LINGER_S = 0.1  # seconds that Grain's thread is given to free shared memory

Example = Callable[[Row, Shape, int], Any]  # of a row, its bucket's shape and its place in the stream


class Shard(NamedTuple):
    """Which of how many equal parts of every batch this process reads."""

    index: int = 0
    count: int = 1

    def part(self, settings: options.Data) -> slice:
        """Its rows of a batch. Raises: InputError where a batch has no equal parts."""
        if settings.frames % self.count:
            raise errors.InputError(
                f"data.frames {settings.frames} cannot be shared out over {self.count} processes; take a multiple of "
                "them"
            )
        local = settings.frames // self.count
        return slice(self.index * local, (self.index + 1) * local)


class Turns:
    """Whose turn each number is, where part i has `shares[i]` of every sum(shares) turns, spread evenly: Grain's
    selection map.

    Grain's own mix rounds its weights to hundredths of the least one, by which parts drift apart over many epochs.
    """

    def __init__(self, shares: tuple[int, ...]):
        self._shares = shares

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> tuple[int, int]:
        """The part, and how many turns it had before."""
        rest = sum(self._shares)
        for part, share in enumerate(self._shares):
            others, others_then = number * (rest - share) // rest, (number + 1) * (rest - share) // rest
            if others == others_then:  # the turn is not one of the others'
                return part, number - others
            number, rest = others, rest - share
        raise IndexError(number)


class Stream:
    """The batches of a plan: each epoch has every row of a source's bucket once, in an order of its own."""

    def __init__(self, plan: Plan, example: Example, settings: options.Data, seed: int, shard: Shard = Shard()):
        if plan.rows < plan.frames:
            raise errors.InputError(
                f"{settings.name}: {plan.rows} rows of frames do not fill a batch of {plan.frames}; lower data.frames"
            )
        self.plan, self._settings = plan, settings
        self._turns = Turns(tuple(sum(bucket.turns) for bucket in plan.buckets))
        lists = [_lists(bucket, plan.frames, seed + 64 * number) for number, bucket in enumerate(plan.buckets)]
        part, frames = shard.part(settings), plan.frames

        def make(number: int, drawn: tuple[Shape, list[Row]]):
            shape, rows = drawn
            places = range(number * frames, (number + 1) * frames)
            return batch.stack([example(row, shape, at) for row, at in zip(rows[part], places[part], strict=True)])

        self._drawn = grain.MapDataset.select_from_datasets(lists, self._turns)
        self._batches = self._drawn.map_with_index(make)

    @property
    def shapes(self) -> list[Shape]:
        """Those of the buckets."""
        return [bucket.shape for bucket in self.plan.buckets]

    def __getitem__(self, number: int):
        """One batch."""
        return self._batches[number]

    def rows(self, number: int) -> list[Row]:
        """The rows of one batch, on all processes."""
        return self._drawn[number][1]

    def first_of(self, bucket: int) -> int:
        """Number of the first batch of a bucket."""
        return next(number for number in range(ENDLESS) if self._turns[number][0] == bucket)

    def __iter__(self) -> Iterator:
        with self.starting() as batches:
            yield from batches

    def starting(self, taken: int = 0, place: Callable[[Any], Any] | None = None) -> "Ahead":
        """What is left after so many batches, each handed to `place` ahead of use. Close it, or use it in a `with`."""
        settings = self._settings
        reading = grain.ReadOptions(num_threads=settings.threads, prefetch_buffer_size=2 * settings.threads)
        rest, signed_on = self._batches[taken:].to_iter_dataset(reading), None
        if settings.workers:
            from absl import flags

            flags.FLAGS.mark_as_parsed()  # else the workers stop at unparsed flags
            _free_at_exit()
            signed_on = Path(tempfile.mkdtemp())
            workers = grain.MultiprocessingOptions(num_workers=settings.workers)
            rest = rest.mp_prefetch(workers, worker_init_fn=functools.partial(_sign_on, signed_on))
        return Ahead(iter(rest), place or (lambda made: made), signed_on)


@functools.cache
def _free_at_exit() -> None:
    """Have the program free the shared memory of its last batches as it ends, before Python ends what frees it."""

    def free() -> None:
        gc.collect()
        time.sleep(LINGER_S)

    atexit.register(free)


def _sign_on(folder: Path, *_: int) -> None:
    """What a worker process does first: leave its number. A stop signal to all of a group is the run's to heed."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(STOP_S))
    (folder / str(os.getpid())).touch()


class Ahead:
    """What an iterator of Grain gives, placed by a thread of its own up to AHEAD items before it is asked for.

    What goes wrong there is raised here: a worker process that ended, in whatever way, as InputError. `signed_on` is
    the folder, which goes at the end, in which each of them left its number.
    """

    def __init__(self, source: grain.DatasetIterator, place: Callable[[Any], Any], signed_on: Path | None = None):
        self._source: grain.DatasetIterator | None = source
        self._place, self._signed_on = place, signed_on
        self._before = set(multiprocessing.active_children())
        self._workers: set[multiprocessing.Process] = set()
        self._ready: queue.Queue = queue.Queue(AHEAD - 1)  # one more is in the thread's hands
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self):
        self._meet()
        while not self._closing.is_set():
            try:
                item, problem = self._ready.get(timeout=LOOK_S)
            except queue.Empty:
                if (problem := self._ended_worker()) is None:
                    continue
            if problem is None:
                return item
            problem = self._explained(problem)  # before all workers end
            self.close()
            raise problem
        raise StopIteration

    def close(self) -> None:
        """End the thread and the worker processes."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join(CLOSE_S)  # it may be at work on a batch
        closing = threading.Thread(target=self._source.close, name="closing", daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():  # for ever, where a worker has ended in peace
            for pid in self._numbers() | {worker.pid for worker in self._workers}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._thread.join(CLOSE_S)
        self._source, self._ready = None, queue.Queue()
        if self._signed_on:
            shutil.rmtree(self._signed_on, ignore_errors=True)
            gc.collect()  # lets go of shared memory now, and not as Python leaves, when it is too late

    def _run(self) -> None:
        try:
            for item in self._source:
                if not self._offer(self._place(item), None):
                    return
            self._offer(None, StopIteration())
        except BaseException as problem:  # is raised again where the item is asked for
            self._offer(None, problem)

    def _offer(self, item, problem: BaseException | None) -> bool:
        """Whether it was taken before the end."""
        while not self._closing.is_set():
            try:
                self._ready.put((item, problem), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _ended_worker(self) -> errors.InputError | None:
        """What there is to say of a worker process that has ended; Grain waits for ever for one that ends in peace."""
        self._meet()
        ended = {worker.pid: worker.exitcode for worker in self._workers if worker.exitcode is not None}
        ended |= dict.fromkeys(filter(_gone, self._numbers() - {worker.pid for worker in self._workers}))
        if not ended:
            return None
        pid, status = next(iter(ended.items()))
        how = "ended by itself" if status is None else f"ended by itself with status {status}"
        if status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        return errors.InputError(
            f"data worker process {pid} {how}, often for want of memory; lower data.workers, data.cache or "
            "data.frames, and go on from the last checkpoint with --resume"
        )

    def _meet(self) -> None:
        """Remember the workers that are there, for of one that has ended only who knew it can tell how."""
        started = multiprocessing.active_children() if self._signed_on else ()
        self._workers |= {p for p in started if p not in self._before and p.name.startswith("grain-process-prefetch")}

    def _numbers(self) -> set[int]:
        """Of all workers that began, of which one may have ended between two looks."""
        return {int(path.name) for path in self._signed_on.iterdir()} if self._signed_on else set()

    def _explained(self, problem: BaseException) -> BaseException:
        """What went wrong in the data: in worker processes as one line, in this one as it is."""
        if isinstance(problem, errors.InputError | StopIteration) or not self._signed_on:
            return problem
        line = errors.InputError(f"data worker: {type(problem).__name__}: {errors.one_line(problem)}")
        line.__cause__ = problem
        ended = self._ended_worker() if type(problem) is RuntimeError else None  # as which Grain tells of it
        return ended or line


def _gone(pid: int) -> bool:
    """Whether there is no such process any more."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def _lists(bucket, frames: int, seed: int) -> grain.MapDataset:
    """The batches of a bucket as its shape and lists of rows, without end; a batch may lie in two epochs."""
    parts = [
        grain.MapDataset.source(rows).seed((seed + number) % 2**32).shuffle().repeat(ENDLESS // len(rows))
        for number, rows in enumerate(bucket.rows)
        if rows
    ]
    order = grain.MapDataset.select_from_datasets(parts, Turns(tuple(turn for turn in bucket.turns if turn)))
    return order.batch(frames, batch_fn=list).map(functools.partial(_with_shape, bucket.shape))


def _with_shape(shape: Shape, rows: list[Row]) -> tuple[Shape, list[Row]]:
    return shape, rows
