"""Which of how many processes this is, by the flags or by what a launcher leaves in the environment.

The first of these that is there decides: the flags; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; Open
MPI, which may itself be a step of Slurm; a step of Slurm; a TPU, where jax finds out by itself; SkyPilot. Without any
of them a machine is alone.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from surgery_r1_jax.errors import InputError, printable

SKYPILOT_PORT = 8476
Environ = Mapping[str, str]


class Place(NamedTuple):
    """This process among all; with None in the place of everything that jax is to find out."""

    coordinator: str | None = None  # HOST:PORT where process 0 listens
    count: int | None = None
    index: int | None = None
    device: int | None = None  # the GPU to take where processes share a machine

    def __str__(self) -> str:
        return "this process" if self.index is None else f"process {self.index} of {self.count}"


class Launcher(NamedTuple):
    """The variables of a launcher."""

    count: str
    index: str
    where: str  # what the coordinator's address is made of ...
    address: Callable[[str, Environ], str]  # ... and how
    local: str | None = None  # number of the process on its machine ...
    shared: Callable[[Environ], bool] = lambda environ: False  # ... if it is not alone there


def _slurm_address(nodes: str, environ: Environ) -> str:
    """The first of node001,x or node[001-4,7],x, and a port of the job's own."""
    name, first = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes).groups()
    return f"{name}{first or ''}:{61440 + _whole('SLURM_JOB_ID', environ) % 4096}"


def _open_mpi_address(uri: str, environ: Environ) -> str:
    """The machine that launched, of 1314521088.0;tcp://10.96.0.1,10.148.0.1:34911, and a port of the job's own."""
    found = re.match(r"(\d+)[^;]*;(?:tcp://([^,:]+)|tcp6://(\[[^,\]]+))", uri)
    if not found:
        raise InputError(f"OMPI_MCA_orte_hnp_uri is {printable(uri)}; set JAX_COORDINATOR_ADDRESS to HOST:PORT")
    job, host, of_six = found.groups()
    return f"{host or of_six + ']'}:{61440 + int(job) // 4096 % 4096}"


SLURM = Launcher(
    "SLURM_STEP_NUM_TASKS",  # which a batch script and a shell have not, or 1: SLURM_NTASKS is the job's there
    "SLURM_PROCID",
    "SLURM_STEP_NODELIST",
    _slurm_address,
    "SLURM_LOCALID",
    lambda environ: _whole("SLURM_STEP_NUM_TASKS", environ) > _whole("SLURM_STEP_NUM_NODES", environ, 1),
)
OPEN_MPI = Launcher(
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_MCA_orte_hnp_uri",
    _open_mpi_address,
    "OMPI_COMM_WORLD_LOCAL_RANK",
    lambda environ: _whole("OMPI_COMM_WORLD_LOCAL_SIZE", environ, 1) > 1,
)
SKYPILOT = Launcher(
    "SKYPILOT_NUM_NODES",
    "SKYPILOT_NODE_RANK",
    "SKYPILOT_NODE_IPS",
    lambda addresses, environ: f"{addresses.split()[0]}:{SKYPILOT_PORT}",
)


def find(
    coordinator: str | None = None, count: int | None = None, index: int | None = None, environ: Environ = os.environ
) -> Place | None:
    """This process's place; None where it is alone. Raises: InputError, naming the flag or the variable."""
    given = {"--coordinator": coordinator, "--processes": count, "--process-id": index}
    missing = [flag for flag, value in given.items() if value is None]
    if not missing:
        return _checked(*given, Place(coordinator, count, index))
    if len(missing) < len(given):
        raise InputError(f"{', '.join(given)} go together; {' and '.join(missing)} missing")
    running = [one for one in (OPEN_MPI, SLURM, SKYPILOT) if one.count in environ and one.index in environ]
    if address := environ.get("JAX_COORDINATOR_ADDRESS"):
        counts, indices = (one.count for one in running), (one.index for one in running)
        count = _first("JAX_NUM_PROCESSES", *counts, environ=environ)
        index = _first("JAX_PROCESS_ID", *indices, "JOB_COMPLETION_INDEX", environ=environ)  # the last of Kubernetes
        numbers = _whole(count, environ), _whole(index, environ)
        device = next((_device(one, environ) for one in running), None)
        return _checked("JAX_COORDINATOR_ADDRESS", count, index, Place(address, *numbers, device))
    for one in running:
        if one is SKYPILOT and _on_tpu(environ):
            break  # it may number hosts otherwise than the TPU does
        if _whole(one.count, environ) <= 1:
            continue
        if one is OPEN_MPI and one.where not in environ and not _on_tpu(environ):  # as of version 5
            told = f"{one.count} is {environ[one.count]}, but no variable tells the machine of process 0"
            raise InputError(f"{told}; set JAX_COORDINATOR_ADDRESS to HOST:PORT of it, the same for all")
        if one.where in environ:
            address = one.address(environ[one.where], environ)
            if port := environ.get("JAX_COORDINATOR_PORT"):
                address = f"{address.rpartition(':')[0]}:{port}"
            numbers = _whole(one.count, environ), _whole(one.index, environ)
            return _checked(one.where, one.count, one.index, Place(address, *numbers, _device(one, environ)))
    return Place() if _on_tpu(environ) else None


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


def _first(*names: str, environ: Environ) -> str:
    """The first of these variables that is set."""
    for name in names:
        if environ.get(name):
            return name
    raise InputError(f"JAX_COORDINATOR_ADDRESS is set and {names[0]} is not; set it too, or neither")


def _whole(name: str, environ: Environ, default: int | None = None) -> int:
    """The number in a variable."""
    text = environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise InputError(f"{name}: expected a whole number, given '{printable(text)}'")
    return int(text)


def _device(launcher: Launcher, environ: Environ) -> int | None:
    """The GPU of a process that shares its machine with others, unless it is shown just one, or told which."""
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    told = "JAX_LOCAL_DEVICE_IDS" in environ or "SLURM_GPUS_PER_TASK" in environ
    if told or (shown is not None and "," not in shown) or not launcher.shared(environ):
        return None
    return _whole(launcher.local, environ)


def _on_tpu(environ: Environ) -> bool:
    """Whether jax is going to find TPUs here."""
    platforms = environ.get("JAX_PLATFORMS") or "tpu"
    chips = (*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*"))
    return "tpu" in platforms and bool(chips) and importlib.util.find_spec("libtpu") is not None
