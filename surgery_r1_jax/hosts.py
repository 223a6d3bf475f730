"""Many hosts: how processes meet that work together, and what becomes of them when one is lost.

jax watches over its processes: one that died or stands still ends all others, by an abort in the middle of whatever
they wait for. So the work is done by a child process. The one that was started watches it, turns such an end into one
line and an exit status, and takes the whole group of processes down with it.
"""

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import BinaryIO, TextIO

from surgery_r1_jax.errors import InputError, Preempted, printable
from surgery_r1_jax.launchers import Place

JOIN_S = 300  # the longest wait for all others at the start
HEARTBEAT_S = 30  # of silence, after which a process counts as lost
LEAVE_S = 10  # the longest wait for others that may be leaving for the same reason
LOST = 69  # exit status: others did not come, or one was lost


def join(place: Place | None, limit_s: float = JOIN_S) -> None:
    """Meet the others, before anything is computed; whoever calls goes on as a child of the process that was started.

    Raises: InputError where process 0 cannot listen. SystemExit in the process that watches, with the child's status.
    """
    if place is None:
        return
    tell = _fork(place, limit_s)
    import jax
    from jax.experimental import multihost_utils

    if place.index:
        _be_quiet()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    tell("joining")
    _claim(place)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            local_device_ids=place.device,
            cluster_detection_method=None if place.coordinator is None else "deactivate",
            initialization_timeout=int(limit_s) + 60,  # the process that watches is first to lose patience
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
    except ValueError:
        if place.coordinator is not None:
            raise
        tell("alone")
        return
    except RuntimeError as problem:
        raise InputError(f"{place}: cannot start at {place.coordinator}: {printable(problem)}; free it") from None
    # Lines between processes are laid at their first use, and not all of them are waited for: while all are here.
    multihost_utils.sync_global_devices("met")
    tell(f"joined {jax.process_index()} {jax.process_count()}")
    if jax.process_index() and place.index is None:
        _be_quiet()


def _claim(place: Place) -> None:
    """Refuse a port that is taken: jax would share it with another job and mix up the processes of both, or crash."""
    if place.index or place.coordinator is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(place.coordinator.rpartition(":")[2])))
        except OSError as problem:
            told = f"{place}: cannot listen at {place.coordinator}: {problem.strerror}; give another port"
            raise InputError(told) from None


def _be_quiet() -> None:
    """Print nothing from here on but errors, in front of which the parent puts the number of this process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def leave(status: int) -> int:
    """The exit status of a process that ends; with an error it does not wait long for the others to end too."""
    if status and joined():
        import jax

        last = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        last.start()
        last.join(LEAVE_S)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def joined() -> bool:
    """Whether this process is one of several."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def first() -> bool:
    """Whether this process is the one that prints and writes."""
    if not joined():
        return True
    import jax

    return jax.process_index() == 0


def outlive(problem: Exception) -> None:
    """Of an error that may come of a lost process, wait for jax's word on it, which ends this one."""
    signs = r"gloo|nccl|unavailable|deadline|aborted|cancelled|connection|socket|peer|barrier|coordination"
    if joined() and re.search(signs, str(problem), re.IGNORECASE):
        time.sleep(HEARTBEAT_S + 15)


def _fork(place: Place, limit_s: float) -> Callable[[str], None]:
    """Go on in a child, which gets a way to tell the parent how far it is; the parent leaves with its status."""
    (life, held), (heard, say), (noise, stderr) = os.pipe(), os.pipe(), os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        for end in (life, say, stderr):
            os.close(end)
        raise SystemExit(_Watch(place, limit_s, child).until_it_ends(os.fdopen(heard), os.fdopen(noise, "rb")))
    for end in (held, heard, noise):
        os.close(end)
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until jax listens to it; the parent tells what came of it

    def end_with_the_parent():
        os.read(life, 1)  # nothing is ever written
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    # What libraries write to the error stream goes through the parent; our own goes where it went.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(stderr, 2)
    return lambda word: os.write(say, f"{word}\n".encode())


class _Watch:
    """The process that was started: it waits for the one that works."""

    def __init__(self, place: Place, limit_s: float, child: int):
        self._place, self._limit_s, self._child = place, limit_s, child
        self._late = self._stopped = False
        self._timer = threading.Timer(limit_s, self._lose_patience)
        self._kept: list[bytes] = []  # what jax says from its first word of a lost process

    def until_it_ends(self, words: TextIO, noise: BinaryIO) -> int:
        """Pass on what the child prints and is sent; the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        readers = [threading.Thread(target=self._follow, args=(words,), daemon=True)]
        readers.append(threading.Thread(target=self._pass_on, args=(noise,), daemon=True))
        for reader in readers:
            reader.start()
        _, ended = os.waitpid(self._child, 0)
        self._timer.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child, signal.SIGKILL)  # what it started
        readers[1].join(5)
        return self._judge(os.waitstatus_to_exitcode(ended))

    def _forward(self, number: int, *_: object) -> None:
        self._stopped |= number == signal.SIGTERM
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, number)

    def _follow(self, words: TextIO) -> None:
        for word in map(str.split, words):
            match word:
                case ["joining"]:
                    self._timer.start()
                case ["alone"]:
                    self._timer.cancel()
                case ["joined", index, count]:
                    self._timer.cancel()
                    self._place = self._place._replace(index=int(index), count=int(count))

    def _pass_on(self, noise: BinaryIO) -> None:
        for line in noise:
            if self._kept or any(word in line for word in (b"coordination_service", b"preemption_sync", b"JAX distri")):
                self._kept.append(line)
            else:
                self._print(line)

    def _print(self, line: bytes) -> None:
        front = f"process {self._place.index}: " if self._place.index else ""
        sys.stderr.buffer.write(front.encode() + line)
        sys.stderr.flush()

    def _lose_patience(self) -> None:
        self._late = True
        os.kill(self._child, signal.SIGKILL)

    def _judge(self, status: int) -> int:
        """The exit status of the whole; one line where the child could not tell its end itself."""
        said = b"".join(self._kept).decode(errors="replace")
        if self._late:
            where = f" at {self._place.coordinator}" if self._place.coordinator else ""
            told = f"the others did not come{where} within {self._limit_s:g} s; start as many as --processes says, "
            return self._tell(told + "all with one coordinator, whose port they must reach", LOST)
        if "Unexpected task registered" in said or "invalid task" in said.lower():
            return self._tell("another process counts other processes; give all the same --processes", 2)
        if status == -signal.SIGABRT and "JAX distributed service" in said:
            return self._tell(f"{_lost(said)}; see what it says, then start all again, training with --resume", LOST)
        if self._stopped and status == -signal.SIGTERM:
            told = "told to stop, with nothing to save; start all again, training with --resume auto"
            return self._tell(told, Preempted.exit_status, "stopped")
        if status < 0:
            for line in self._kept:
                self._print(line)
            name = signal.Signals(-status).name
            more = "; perhaps its memory was at an end" if name == "SIGKILL" else ""
            return self._tell(f"was ended by {name}{more}", 128 - status)
        return status

    def _tell(self, reason: str, status: int, what: str = "error") -> int:
        print(f"{what}: {self._place}: {reason}", file=sys.stderr, flush=True)
        return status


def _lost(said: str) -> str:
    """Which process jax says is lost."""
    listed = re.search(r"stopped sending heartbeats\):\n([\d\n]+)", said)
    numbers = {int(number) for number in listed[1].split()} if listed else set()
    numbers |= {int(number) for number in re.findall(r"Task (\d+) heartbeat timeout", said)}
    if not numbers:
        return "lost process 0, the coordinator"
    return f"lost {'process' if len(numbers) == 1 else 'processes'} {', '.join(map(str, sorted(numbers)))}"
