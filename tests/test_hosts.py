"""Who is who, how processes meet, and how the rest end when one is lost."""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from surgery_r1_jax import cli, errors, handlers, hosts, launchers
from surgery_r1_jax.launchers import Place

pytestmark = pytest.mark.survival
HOME = Path(__file__).resolve().parents[1]
SLURM = dict(
    SLURM_JOB_ID="4100", SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="2", SLURM_LOCALID="0", SLURM_STEP_NUM_NODES="4"
)
OPEN_MPI = dict(OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_LOCAL_RANK="1")
SKYPILOT = dict(SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1", SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2\n")
JAX = dict(JAX_COORDINATOR_ADDRESS="train-workers-0-0.train:8476", JAX_NUM_PROCESSES="4")


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, None),
        (JAX | {"JAX_PROCESS_ID": "1"}, Place(JAX["JAX_COORDINATOR_ADDRESS"], 4, 1)),
        (JAX | {"JOB_COMPLETION_INDEX": "3"}, Place(JAX["JAX_COORDINATOR_ADDRESS"], 4, 3)),
        (JAX | {"JAX_PROCESS_ID": "1", "JOB_COMPLETION_INDEX": "3"}, Place(JAX["JAX_COORDINATOR_ADDRESS"], 4, 1)),
        ({"JAX_COORDINATOR_ADDRESS": "n1:99"} | SLURM, Place("n1:99", 4, 2)),
        ({"JAX_COORDINATOR_ADDRESS": "n1:99", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (dict(SLURM_JOB_ID="41", SLURM_NTASKS="4", SLURM_PROCID="0"), None),  # the batch script, not a step of it
        (  # a shell that `salloc` gives
            dict(SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0", SLURM_STEP_NODELIST="n1"),
            None,
        ),
        (SLURM | {"SLURM_STEP_NODELIST": "node001,node7"}, Place("node001:61444", 4, 2)),
        (SLURM | {"SLURM_STEP_NODELIST": "n[004-6,9],x"}, Place("n004:61444", 4, 2)),
        (SLURM | {"SLURM_STEP_NODELIST": "rack-1", "JAX_COORDINATOR_PORT": "5"}, Place("rack-1:5", 4, 2)),
        (SLURM | {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (
            SLURM | {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"},
            Place("n1:61444", 4, 2, 1),
        ),
        (
            SLURM | {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "3"},
            Place("n1:61444", 4, 2),
        ),
        (
            SLURM | {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_NODES": "1", "SLURM_GPUS_PER_TASK": "2"},
            Place("n1:61444", 4, 2),  # it is shown its own
        ),
        (  # a rank that Open MPI started by a step of its own
            SLURM
            | {
                "SLURM_STEP_NODELIST": "n[2-4]",
                "SLURM_STEP_NUM_TASKS": "3",
                "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://h:1",
            }
            | OPEN_MPI,
            Place("h:61441", 4, 3),
        ),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        (OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "n1:99"}, Place("n1:99", 4, 3)),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.96.0.1,10.148.0.1:34911"},
            Place("10.96.0.1:62880", 4, 3),
        ),
        (
            OPEN_MPI
            | {
                "OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::b9b:ac5d,2620::1]:43370",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            Place("[fe80::b9b:ac5d]:61441", 4, 3, 1),
        ),
        (SKYPILOT, Place("10.0.0.1:8476", 2, 1)),
        (SKYPILOT | {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}, None),
    ],
)
def test_the_environment_tells_who_is_who(environ, place):
    assert launchers.find(environ=environ) == place
    assert launchers.find("a:1", 3, 2, environ=environ) == Place("a:1", 3, 2)  # flags go first


def test_a_tpu_is_left_to_jax_and_goes_before_skypilot(monkeypatch):
    monkeypatch.setattr(launchers, "_on_tpu", lambda environ: True)
    assert launchers.find(environ={}) == launchers.find(environ=SKYPILOT) == Place()
    assert launchers.find(environ=JAX | {"JAX_PROCESS_ID": "0"}).index == 0


@pytest.mark.parametrize(
    ("words", "environ", "line"),
    [
        (
            "--processes 2 --process-id 0",
            {},
            "--coordinator, --processes, --process-id go together; --coordinator missing",
        ),
        ("--process-id 0", {}, "go together; --coordinator and --processes missing"),
        (
            "--coordinator a --processes 2 --process-id 0",
            {},
            "--coordinator: expected HOST:PORT as in node1:8476, given 'a'",
        ),
        ("--coordinator http://a:1 --processes 2 --process-id 0", {}, "given 'http://a:1'"),
        ("--coordinator a:70000 --processes 2 --process-id 0", {}, "given 'a:70000'"),
        (
            "--coordinator a:1 --processes 2 --process-id 2",
            {},
            "--process-id: 2 processes are counted from 0 to 1, given 2",
        ),
        ("--coordinator a:1 --processes 0 --process-id 0", {}, "--processes: expected a whole number of at least 1"),
        ("--coordinator a:1 --processes two --process-id 0", {}, "given 'two'"),
        ("", {"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_COORDINATOR_ADDRESS is set and JAX_NUM_PROCESSES is not"),
        ("", JAX, "JAX_COORDINATOR_ADDRESS is set and JAX_PROCESS_ID is not"),
        ("", JAX | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID: expected a whole number, given '-1'"),
        ("", JAX | {"JOB_COMPLETION_INDEX": "4"}, "JOB_COMPLETION_INDEX: 4 processes are counted from 0 to 3, given 4"),
        (
            "",
            OPEN_MPI,
            "no variable tells the machine of process 0; set JAX_COORDINATOR_ADDRESS to HOST:PORT",
        ),
        ("", OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "?"}, "OMPI_MCA_orte_hnp_uri is ?; set JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_wrong_or_partial_places_are_one_line(capsys, monkeypatch, words, environ, line):
    monkeypatch.setattr(launchers.find, "__defaults__", (None, None, None, environ))
    command = "evaluate --checkpoint none --data none --split val --out none"
    assert cli.main([*command.split(), *words.split()]) == 2
    told = capsys.readouterr().err
    assert line in told and told.startswith("error: ") and told.count("\n") == 1


def test_a_machine_that_is_alone_starts_no_other_process_and_no_jax():
    code = (
        "import os, sys; os.fork = None; from surgery_r1_jax import hosts, launchers; "
        "hosts.join(launchers.find(environ={})); print('jax' in sys.modules, hosts.joined(), hosts.leave(3))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False 3\n"


# What stands for a run: it meets the others and works with them until it is told to end.
STAND_IN = """
import os, sys, time
from surgery_r1_jax import cli, hosts, launchers
from surgery_r1_jax.errors import InputError
index, count, port, limit, ready, fail = sys.argv[1:]
hosts.HEARTBEAT_S = 6
def work(argv):
    hosts.join(launchers.Place(f"127.0.0.1:{port}", int(count), int(index)), float(limit))
    from jax.experimental import multihost_utils
    print("to be seen of process 0 alone")
    open(f"{ready}{index}", "w").write(str(os.getpid()))
    if fail == "folder":
        from pathlib import Path
        from surgery_r1_jax import run
        run.same_folder(Path(ready).parent)
        run.same_folder(Path(ready).parent / f"of_{index}")
    for step in range(10**6):
        multihost_utils.sync_global_devices("step")
        time.sleep(0.05)
        if fail == index and step == 5:
            raise InputError("frame.png: damaged; restore it")
cli._run = work
sys.exit(cli.main([]))
"""


class Group:
    """Processes that work together, each under the one that watches it."""

    def __init__(self, folder, count=2, started=None, limit=120, fail=""):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environ = os.environ | {"PYTHONPATH": str(HOME), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        self.folder, self.ready = folder, folder / "ready"
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", STAND_IN, *map(str, (index, count, port, limit, self.ready, fail))],
                env=environ,
                stdout=(folder / f"out{index}").open("w"),
                stderr=(folder / f"err{index}").open("w"),
            )
            for index in range(started or count)
        ]

    def send(self, number, index):
        """A signal to a whole host: the process that works and the one that watches."""
        file = Path(f"{self.ready}{index}")
        until = time.monotonic() + 120
        while not (file.exists() and file.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        for pid in (int(file.read_text()), self.processes[index].pid):
            os.kill(pid, number)

    def ends(self, *indices):
        """Of these processes the exit status, what they print, and what they say is wrong."""
        found = []
        for index in indices:
            status = self.processes[index].wait(timeout=120)
            found.append((status, *((self.folder / f"{name}{index}").read_text() for name in ("out", "err"))))
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for index, process in enumerate(self.processes):
            if process.poll() is None:
                process.kill()
                process.wait()
            if (file := Path(f"{self.ready}{index}")).exists():
                assert gone(int(file.read_text())), "a process is left"


def gone(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def hears(pid, number):
    """Whether a process has a handler for a signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_others_that_never_come_are_one_line_in_the_time_that_was_given(tmp_path):
    began = time.monotonic()
    with Group(tmp_path, count=2, started=1, limit=2) as group:
        ((status, _, err),) = group.ends(0)
    assert status == hosts.LOST and err.count("\n") == 1
    assert re.match(r"error: process 0 of 2: the others did not come at 127\.0\.0\.1:\d+ within 2 s; start", err)
    assert time.monotonic() - began < 60


def test_a_stop_while_waiting_for_others_is_one_line(tmp_path):
    with Group(tmp_path, count=2, started=1) as group:
        while not hears(group.processes[0].pid, signal.SIGTERM):
            time.sleep(0.05)
        group.processes[0].terminate()
        ((status, _, err),) = group.ends(0)
    assert (status, err) == (
        errors.Preempted.exit_status,
        "stopped: process 0 of 2: told to stop, with nothing to save; start all again, training with --resume auto\n",
    )


@pytest.mark.parametrize(
    ("number", "victim", "lost"), [(signal.SIGKILL, 0, "0, the coordinator"), (signal.SIGSTOP, 1, "1")]
)
def test_when_a_host_is_killed_or_stands_still_the_other_ends_with_one_line(tmp_path, number, victim, lost):
    with Group(tmp_path) as group:
        group.send(number, victim)
        ((status, out, err),) = group.ends(1 - victim)
        if number == signal.SIGSTOP:
            group.send(signal.SIGKILL, victim)
    lines = [line for line in err.splitlines() if line]
    assert lines == [
        f"error: process {1 - victim} of 2: lost process {lost}; see what it says, then start all again, training with "
        "--resume"
    ]
    assert status == hosts.LOST and ("to be seen" in out) == (victim == 1)


def test_a_run_folder_that_is_not_one_for_all_is_refused_by_all(tmp_path):
    with Group(tmp_path, fail="folder") as group:
        (first, _, said), (second, _, err) = group.ends(0, 1)
    told = "process 1 cannot see what process 0 writes there; give a folder that all share\n"
    assert (first, said) == (2, f"error: {tmp_path / 'of_0'}: {told}")
    assert (second, err) == (2, f"process 1: error: {tmp_path / 'of_1'}: {told}")
    assert not [path for path in tmp_path.rglob(".seen*")]


def test_a_port_that_another_job_has_is_refused():
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as jax's coordinator binds
        taken.bind(("", 0))
        taken.listen()
        place = Place(f"localhost:{taken.getsockname()[1]}", 2, 0)
        with pytest.raises(errors.InputError, match=f"process 0 of 2: cannot listen at {place.coordinator}: .*; give"):
            hosts._claim(place)
        hosts._claim(place._replace(index=1))
    hosts._claim(place)


@pytest.mark.parametrize("saves", [False, True])
def test_only_a_command_that_saves_is_left_to_hear_of_a_stop_by_itself(monkeypatch, saves):
    monkeypatch.setattr(launchers, "find", lambda *_: Place("n1:1", 2, 0))
    monkeypatch.setattr(hosts, "join", lambda *_: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    before = signal.getsignal(signal.SIGTERM)
    try:
        args = argparse.Namespace(coordinator=None, processes=None, process_id=None, join_timeout=1)
        handlers.start_together(args, saves=saves)
        assert signal.getsignal(signal.SIGTERM) == (signal.SIG_IGN if saves else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_mistake_that_one_process_meets_is_told_with_its_number_and_ends_all(tmp_path):
    with Group(tmp_path, fail="1") as group:
        (first, _, said), (second, out, err) = group.ends(0, 1)
    assert (second, out, err) == (2, "", "process 1: error: frame.png: damaged; restore it\n")
    assert first == hosts.LOST and said.startswith("error: process 0 of 2: lost process 1;")
