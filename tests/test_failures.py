"""What a run keeps when it is killed, when the disk is full, and when a disk changes what it keeps.

Named cases; scripts/prove_failures.py has all of them.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import jax
import pytest
import toy

from surgery_r1_jax import errors, hosts, saves

pytestmark = pytest.mark.survival
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("faults are put before system calls by a library, which a C compiler on Linux has to make")
    library = tmp_path_factory.mktemp("shim") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, TESTS / "faults.c", "-ldl"], check=True)
    return library


def strike(shim, folder, what, fault, *points):
    """What faults.py tells of saves that are struck at these points."""
    environ = os.environ | {"LD_PRELOAD": str(shim), "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    environ["XLA_FLAGS"] = ""  # one device
    words = [sys.executable, str(TESTS / "faults.py"), str(folder), what, fault, *map(str, points)]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


WHOLE = {"checkpoints": [1, 2], "best": [2]}  # before the save that is struck


@pytest.mark.parametrize(
    ("what", "points"), [("checkpoints", (0, 0.3, 0.6, 0.9)), ("best", (0, 0.6, 0.98))], ids=["checkpoints", "best"]
)
def test_a_save_that_is_killed_at_any_call_leaves_a_whole_one_to_go_on_from(shim, tmp_path, what, points):
    told = strike(shim, tmp_path, what, "kill", *points)
    ended = [line["ended"] for line in told]
    # The number of calls differs a little from save to save, and their order: the last may not have come.
    assert ended[:2] == [-signal.SIGKILL] * 2 and set(ended) <= {-signal.SIGKILL, 0}, told
    for line in told:
        assert line["whole"] and line["goes_on"] and line["left"] == [], line
        before, after = WHOLE[what], [*WHOLE[what], 3]
        assert line["steps"] in ([before] if line["step"] == 2 else [after, after[1:]]), line
        assert line["step"] == 3 or line["ended"] != 0, line
    assert told[0]["step"] == 2, told


@pytest.mark.parametrize("what", ["checkpoints", "best"])
def test_a_full_disk_is_one_line_and_leaves_what_was_saved_before(shim, tmp_path, what):
    told = strike(shim, tmp_path, what, "ENOSPC", 0.1, 0.5)
    for line in told:
        assert line["ended"] == errors.StorageError.exit_status, line
        expected = f"{tmp_path}/struck/{what}/3: not saved: No space left on device; step 2 is whole. Make room"
        assert line["told"].startswith(expected) and "\n" not in line["told"], line
        assert (line["steps"], line["step"], line["whole"]) == (WHOLE[what], 2, True), line
        assert line["goes_on"] and line["left"] == [], line


# One of two that save together; a full disk meets the one that is told a call of its third save.
HOST = """
import ctypes, errno, os, pathlib, sys
from surgery_r1_jax import cli, hosts, launchers
index, port, out, call = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), int(sys.argv[4])
hosts.HEARTBEAT_S = 6
def work(argv):
    hosts.join(launchers.Place(f"127.0.0.1:{port}", 2, index))
    import faults
    faults.prepare(out)
    if call:
        ctypes.CDLL(None).faults_arm(str(out / "checkpoints").encode(), ctypes.c_long(call), errno.ENOSPC)
        (out / "struck").touch()
    faults.save(out, 3)
cli._run = work
sys.exit(cli.main([]))
"""


@pytest.mark.parametrize(("victim", "call"), [(0, 40), (1, 4)])
def test_a_commit_that_fails_on_one_of_two_ends_both_and_leaves_the_checkpoint_before_it(shim, tmp_path, victim, call):
    environ = toy.environ(tmp_path) | {"LD_PRELOAD": str(shim), "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    port, running = toy.free_port(), []
    for index in range(2):
        words = [sys.executable, "-c", HOST, *map(str, (index, port, tmp_path, call if index == victim else 0))]
        with (tmp_path / f"error{index}").open("w") as file:
            running.append(subprocess.Popen(words, env=environ, stdout=subprocess.DEVNULL, stderr=file))
    try:
        statuses = [process.wait(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    assert time.time() - (tmp_path / "struck").stat().st_mtime < 60
    said = [(tmp_path / f"error{index}").read_text() for index in range(2)]
    assert (statuses[victim], statuses[1 - victim]) == (errors.StorageError.exit_status, hosts.LOST), said
    assert "3: not saved: No space left on device; step 2 is whole. Make room" in said[victim], said
    assert f"lost process {victim}" in said[1 - victim], said
    assert [text.count("\n") for text in said] == [1, 1], said
    assert faults.steps(tmp_path / "checkpoints") == [1, 2]
    assert faults.restore(tmp_path) == (2, True)
    faults.save(tmp_path, 3)
    assert faults.restore(tmp_path) == (3, True) and faults.steps(tmp_path / "checkpoints") == [2, 3]


# A run again and again, whose disk fails at a call below a path.
RUNS = """
import ctypes, errno, pathlib, sys
from surgery_r1_jax import cli
folder = pathlib.Path(sys.argv[1])
for n, case in enumerate(sys.argv[2:]):
    place, call, error = case.split(":")
    path = str(folder / f"run{n}{place}")
    ctypes.CDLL(None).faults_arm(path.encode(), ctypes.c_long(int(call)), ctypes.c_int(getattr(errno, error)))
    status = cli.main(["sft", "--config", str(folder / "sft.yaml"), "--out", str(folder / f"run{n}")])
    print("ended", status, file=sys.stderr)
"""


def test_a_disk_that_fails_outside_of_saves_is_one_line_with_file_and_remedy(shim, tmp_path):
    toy.write_start(tmp_path, frames=4)
    (tmp_path / "sft.yaml").write_text(
        f"model: {tmp_path}/start\ndata: {{root: {tmp_path}/data, frames: 2, questions: 1}}\n"
        "schedule: {steps: 2, log_every: 1}\nevaluation: {frames: 2, questions: 1, limit: 1, max_tokens: 2}\n"
    )
    cases = [":1:EROFS", "/config.yaml:2:EIO", "/metrics.jsonl:1:EACCES", "/sessions.jsonl:2:ENOSPC"]
    environ = toy.environ(tmp_path) | {"LD_PRELOAD": str(shim)}
    words = [sys.executable, "-c", RUNS, str(tmp_path), *cases]
    done = subprocess.run(words, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    told = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "ended "))]
    right, room = "get the right to it, or choose another place", "make room and start again with --resume"
    disk = "see what the system's log says of this disk, and start again with --resume"
    expected = [
        f"run0/model: Read-only file system; {right}",
        f"run1/config.yaml: Input/output error; {disk}",
        f"run2/metrics.jsonl: Permission denied; {right}",
        f"run3/sessions.jsonl: No space left on device; {room}",
    ]
    lines = [(f"error: {tmp_path}/{line}", f"ended {errors.StorageError.exit_status}") for line in expected]
    assert told == [line for pair in lines for line in pair] and "Traceback" not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with two checkpoints."""
    out = tmp_path_factory.mktemp("kept")
    faults.prepare(out)
    assert faults.restore(out) == (2, True)
    return out


def files(out):
    return sorted(path for path in (out / "checkpoints" / "2").rglob("*") if path.is_file())


def test_a_bit_that_a_disk_turns_is_found_or_does_not_matter(kept):
    refused = {}
    for number, path in enumerate(files(kept)):
        whole = path.read_bytes()
        for place in {len(whole) // 2, (997 * (number + 1)) % max(1, len(whole))} if whole else ():
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << number % 8)]) + whole[place + 1 :])
            try:
                assert faults.restore(kept) == (2, True), (path, place)
            except errors.InputError as refusal:
                refused[path.name] = str(refusal)
        path.write_bytes(whole)
    assert faults.restore(kept) == (2, True)
    assert "metadata" in refused and len(refused) >= 3
    for line in refused.values():
        assert f"{kept}/checkpoints/2: " in line and "remove it to go on from step 1" in line and "\n" not in line


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_file_that_is_cut_or_gone_is_refused_or_does_not_matter(kept, share):
    refused = 0
    for path in files(kept):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))]) if share else path.unlink()
        try:
            assert faults.restore(kept) == (2, True), path
        except errors.InputError as refusal:
            refused += "remove it to go on from step 1" in str(refusal)
        path.write_bytes(whole)
    assert refused >= 3 and faults.restore(kept) == (2, True)


def test_nothing_but_the_refusal_is_printed_of_a_spoilt_checkpoint(kept):
    code = f"""
import pathlib, faults
from surgery_r1_jax import errors
folder = pathlib.Path({str(kept)!r})
for path in sorted(path for path in (folder / "checkpoints" / "2" / "state").rglob("*") if path.is_file()):
    whole = path.read_bytes()
    for share in (0.0, 0.5):
        path.write_bytes(whole[: int(share * len(whole))])
        try:
            faults.restore(folder)
        except errors.InputError as refusal:
            print(refusal)
    path.write_bytes(whole)
"""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) >= 4 and "TensorStore details" not in done.stdout
    noise = ("Traceback", "Exception ignored", "never retrieved", "never awaited")
    assert not [each for each in noise if each in done.stderr], done.stderr


def test_a_checkpoint_of_each_format_that_was_released_is_read_or_named(tmp_path):
    """The folder was written by `faults.save` at version 0.1 and stays as it is."""
    released = TESTS / f"checkpoint_format_{saves.FORMAT}"
    assert released.is_dir(), "keep one of every format here"
    kept = shutil.copytree(released, tmp_path / "run")
    assert faults.restore(kept) == (2, True)
    meta = kept / "checkpoints" / "2" / "meta" / "metadata"
    for other in (saves.FORMAT - 1, saves.FORMAT + 1):
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": other}))
        told = f"checkpoint format {other}, this version reads {saves.FORMAT}; go on with the version that wrote it, or"
        with pytest.raises(errors.InputError, match=told):
            faults.restore(kept)
    assert sorted(path.name for path in (kept / "checkpoints").iterdir()) == ["2"], "a refusal removes nothing"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tree: {"a": tree["a"]}, "b is missing"),
        (lambda tree: tree | {"c": tree["b"]}, "c is not of this run"),
        (lambda tree: {"a": tree["a"], "c": tree["b"]}, "b is missing"),
        (lambda tree: tree | {"b": tree["b"].reshape(3, 100)}, "b was saved as float32[3, 100], not float32[300]"),
        (lambda tree: tree | {"b": tree["b"].astype("float16")}, "b was saved as float16[300], not float32[300]"),
    ],
    ids=["dropped", "added", "renamed", "reshaped", "retyped"],
)
def test_a_checkpoint_of_other_leaves_than_the_runs_is_refused_by_the_name_of_one(tmp_path, change, told):
    state = faults.state_of(2)
    moments, rest = state.opt_state
    spoilt = {
        "params": state._replace(params=change(state.params)),
        "opt_state.0.mu": state._replace(opt_state=(moments._replace(mu=change(moments.mu)), rest)),  # all zeros
    }
    for where, each in spoilt.items():
        checkpoints = saves.Checkpoints(tmp_path / where)
        checkpoints.save(2, jax.tree.map(jax.numpy.asarray, each), {})
        checkpoints.close()
        with pytest.raises(errors.InputError) as refusal:
            faults.restore(tmp_path / where)
        line = f"{tmp_path / where}/checkpoints/2: {where}.{told}; restore it, or start a new run"
        assert str(refusal.value) == line


@pytest.mark.parametrize("which", ["best", "last"])
def test_parameters_of_another_shape_are_refused_by_name(tmp_path, which):
    state = jax.tree.map(jax.numpy.asarray, faults.state_of(2))
    faults.save(tmp_path, 2)
    best = saves.Best(tmp_path)
    best.save(2, state.params, 0.5)
    best.close()
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {"b": jax.ShapeDtypeStruct((3, 100), "float32", sharding=here)}
    with pytest.raises(errors.InputError, match=r"\bb was saved as float32\[300\], not float32\[3, 100\]; restore it"):
        saves.params(tmp_path, which, wanted)


def test_best_parameters_that_changed_are_not_used(tmp_path):
    params = {"a": jax.numpy.arange(4096.0)}
    best = saves.Best(tmp_path)
    best.save(5, params, 0.5)
    best.close()
    wanted = {"a": jax.ShapeDtypeStruct((4096,), "float32", sharding=params["a"].sharding)}
    assert (saves.params(tmp_path, "best", wanted)["a"] == params["a"]).all()
    (data,) = (path for path in (tmp_path / "best").rglob("d/*") if path.stat().st_size > 4096)
    whole = bytearray(data.read_bytes())
    whole[len(whole) // 2] ^= 16
    data.write_bytes(whole)
    with pytest.raises(errors.InputError, match=r"best/5: a is not what was saved; restore it"):
        saves.params(tmp_path, "best", wanted)


def test_a_file_that_may_not_grow_is_told_by_the_system_itself(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(errors.StorageError, match=r"checkpoints/3: not saved: File too large; step 2 is whole"):
            faults.save(tmp_path / "run", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert faults.restore(tmp_path / "run") == (2, True)
