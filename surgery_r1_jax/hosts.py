"""Many hosts: which other processes take part in a command, and what becomes of it when one of them is lost.

The same command is started everywhere. Who is who comes from the first of these that is there: the flags; the variables
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; Slurm, Open MPI or SkyPilot; what jax finds on a TPU.
Without any of them a machine is alone, and nothing here happens.

jax watches over its processes: one that died or stands still ends all others, by an abort in the middle of whatever
they wait for. So the work is done by a child process. The one that was started watches it, turns such an end into one
line and an exit status, and takes the whole group of processes down with it.
"""

import contextlib
import importlib.util
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import BinaryIO, NamedTuple

from surgery_r1_jax.errors import InputError, printable

JOIN_S = 300  # the longest wait for all others at the start
HEARTBEAT_S = 30  # of silence, after which a process counts as lost
LEAVE_S = 10  # the longest wait for others that may be leaving for the same reason
SKYPILOT_PORT = 8476
LOST = 69  # exit status: others did not come, or one was lost


class Place(NamedTuple):
    """This process among all; with None in the place of everything jax is to find out."""

    coordinator: str | None = None  # HOST:PORT where process 0 listens
    count: int | None = None
    index: int | None = None
    device: int | None = None  # the GPU to take where processes share a machine

    def __str__(self) -> str:
        return "this process" if self.index is None else f"process {self.index} of {self.count}"


class Launcher(NamedTuple):
    """What a launcher tells in the environment."""

    count: str
    index: str
    where: str  # the variable that the coordinator's address is made of
    address: Callable[[str, Mapping[str, str]], str]
    local: str = ""  # number on this machine
    machines: str = ""  # of the command, or ...
    together: str = ""  # ... processes on this machine


def _of_slurm(nodes: str, environ: Mapping[str, str]) -> str:
    """The first of node001,x or node[001-4,7],x; a port of the job's own."""
    name, first = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes).groups()
    return f"{name}{first or ''}:{61440 + int(environ.get('SLURM_JOB_ID', 0)) % 4096}"


def _of_open_mpi(uri: str, environ: Mapping[str, str]) -> str:
    """The launching machine, 1314521088.0;tcp://10.96.0.1,10.148.0.1:34911; a port of the job's own."""
    found = re.match(r"(\d+).*?;tcp6?://(\[?)([^,\]:]+|[^,\]]+)[,:\]]", uri)
    if not found:
        raise InputError(f"OMPI_MCA_orte_hnp_uri is {printable(uri)}; set JAX_COORDINATOR_ADDRESS to HOST:PORT")
    job, bracket, host = found.groups()
    return f"{f'[{host}]' if bracket else host}:{61440 + int(job) // 4096 % 4096}"


LAUNCHERS = (
    Launcher(
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "SLURM_STEP_NODELIST",
        _of_slurm,
        local="SLURM_LOCALID",
        machines="SLURM_STEP_NUM_NODES",
    ),
    Launcher(
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_MCA_orte_hnp_uri",
        _of_open_mpi,
        local="OMPI_COMM_WORLD_LOCAL_RANK",
        together="OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher(
        "SKYPILOT_NUM_NODES",
        "SKYPILOT_NODE_RANK",
        "SKYPILOT_NODE_IPS",
        lambda ips, _: f"{ips.split()[0]}:{SKYPILOT_PORT}",
    ),
)


def find(
    coordinator: str | None, count: int | None, index: int | None, environ: Mapping[str, str] = os.environ
) -> Place | None:
    """This process's place by the flags or the environment; None where it is alone. Raises: InputError."""
    given = {"--coordinator": coordinator, "--processes": count, "--process": index}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) < len(given):
        if missing:
            raise InputError(f"{', '.join(given)} go together; {' and '.join(missing)} missing")
        return _checked(*given, Place(coordinator, count, index))
    launcher = next((one for one in LAUNCHERS if environ.get(one.count) and environ.get(one.index)), None)
    if address := environ.get("JAX_COORDINATOR_ADDRESS"):
        counts, indices = ["JAX_NUM_PROCESSES"], ["JAX_PROCESS_ID"]
        if launcher:
            counts, indices = [*counts, launcher.count], [*indices, launcher.index]
        indices.append("JOB_COMPLETION_INDEX")  # of Kubernetes
        found = [_first(names, environ) for names in (counts, indices)]
        (count_name, count), (index_name, index) = found
        place = Place(address, count, index, _device(launcher, environ))
        return _checked("JAX_COORDINATOR_ADDRESS", count_name, index_name, place)
    if launcher and _whole(launcher.count, environ) > 1 and environ.get(launcher.where):
        address = launcher.address(environ[launcher.where], environ)
        if port := environ.get("JAX_COORDINATOR_PORT"):
            address = f"{address.rpartition(':')[0]}:{port}"
        count, index = _whole(launcher.count, environ), _whole(launcher.index, environ)
        place = Place(address, count, index, _device(launcher, environ))
        return _checked(launcher.where, launcher.count, launcher.index, place)
    wanted = environ.get("JAX_PLATFORMS") or "tpu"
    return Place() if "tpu" in wanted and importlib.util.find_spec("libtpu") else None


def _checked(coordinator_name: str, count_name: str, index_name: str, place: Place) -> Place | None:
    """The place, or None for the only process. Raises: InputError naming where the mistake was made."""
    host, _, port = place.coordinator.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        told = f"expected HOST:PORT as in node1:8476, given '{printable(place.coordinator)}'"
        raise InputError(f"{coordinator_name}: {told}")
    if place.count < 1:
        raise InputError(f"{count_name}: expected at least 1, given {place.count}")
    if not 0 <= place.index < place.count:
        told = f"{place.count} processes are counted from 0 to {place.count - 1}"
        raise InputError(f"{index_name}: {told}, given {place.index}")
    return place if place.count > 1 else None


def _first(names: list[str], environ: Mapping[str, str]) -> tuple[str, int]:
    """The first of these variables that is set, and its number."""
    for name in names:
        if environ.get(name):
            return name, _whole(name, environ)
    raise InputError(f"JAX_COORDINATOR_ADDRESS is set and {names[0]} is not; set it too, or neither")


def _whole(name: str, environ: Mapping[str, str]) -> int:
    if not environ[name].isdecimal():
        raise InputError(f"{name}: expected a whole number, given '{printable(environ[name])}'")
    return int(environ[name])


def _device(launcher: Launcher | None, environ: Mapping[str, str]) -> int | None:
    """The GPU of a process that shares its machine with others, unless it is shown just one."""
    if not launcher or not environ.get(launcher.local) or environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    if len(environ.get("CUDA_VISIBLE_DEVICES", "several,or unknown").split(",")) == 1:
        return None
    if launcher.together:
        shared = _whole(launcher.together, environ) > 1 if environ.get(launcher.together) else False
    else:
        machines = _whole(launcher.machines, environ) if environ.get(launcher.machines) else 1
        shared = _whole(launcher.count, environ) > machines
    return _whole(launcher.local, environ) if shared else None


def join(place: Place | None, limit_s: float = JOIN_S) -> None:
    """Meet the others, before anything is computed; whoever calls goes on as a child of the process that was started.

    Raises: InputError where process 0 cannot listen. SystemExit in the process that watches, with the child's status.
    """
    if place is None:
        return
    tell = _fork(place, limit_s)
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    tell("joining")
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
    tell(f"joined {jax.process_index()} {jax.process_count()}")
    if jax.process_index():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")  # it puts the number in front
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
        self._late = False
        self._timer = threading.Timer(limit_s, self._lose_patience)
        self._kept: list[bytes] = []  # what jax says from its first word of a lost process

    def until_it_ends(self, words: BinaryIO, noise: BinaryIO) -> int:
        """Pass on what the child prints and is sent; the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: os.kill(self._child, number))
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

    def _follow(self, words: BinaryIO) -> None:
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
            if self._kept or b"coordination_service" in line or b"JAX distributed service" in line:
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
            return self._tell(f"{_lost(said)}; see what it says, then start all again with --resume", LOST)
        for line in self._kept:
            self._print(line)
        if status < 0:
            name = signal.Signals(-status).name
            more = "; perhaps its memory was at an end" if name == "SIGKILL" else ""
            return self._tell(f"was ended by {name}{more}", 128 - status)
        return status

    def _tell(self, reason: str, status: int) -> int:
        print(f"error: {self._place}: {reason}", file=sys.stderr, flush=True)
        return status


def _lost(said: str) -> str:
    """Which process jax says is lost."""
    listed = re.search(r"\(stopped sending heartbeats\):\n([\d\n]+)", said)
    if not listed:
        return "lost process 0, the coordinator"
    numbers = sorted(map(int, listed[1].split()))
    return f"lost {'process' if len(numbers) == 1 else 'processes'} {', '.join(map(str, numbers))}"
