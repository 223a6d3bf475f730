"""The launch files say one thing to every engine: the same stages, restarted for all but a mistake."""

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from surgery_r1_jax import cli, config, options

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "scripts" / "launch"
spec = importlib.util.spec_from_file_location("launch_check", FOLDER / "check.py")
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)


@pytest.fixture(scope="module")
def hosts():
    return list(check.hosts())


@pytest.mark.parametrize("name", ["syntax", "skypilot", "jobset", "xpk"])
def test_the_programs_that_read_the_files_take_them(name):
    try:
        assert getattr(check, name)()
    except check.Skipped as why:
        pytest.skip(str(why))


def test_every_host_of_every_engine_is_told_who_it_is(hosts):
    told = {}
    for engine, who, _ in hosts:
        told.setdefault(engine, []).append(who)
    assert {engine: len(rows) for engine, rows in told.items()} == {
        "sky-gpu.yaml": 2,
        "sky-tpu.yaml": 4,
        "jobset-gpu.yaml": 2,
        "jobset-tpu.yaml": 4,
        "slurm.sbatch": 2,
    }
    assert all(len(set(rows)) == len(rows) for rows in told.values())


def test_all_hosts_run_the_same_stages_and_the_program_takes_every_line(hosts):
    for _, _, commands in hosts:
        lines = [shlex.split(line) for line in commands.splitlines()]
        assert [line[1] for line in lines] == ["sft", "grpo", "evaluate", "evaluate"]
        places = {}
        for _, name, *words in lines:
            parser = cli.commands()[name]
            words, overrides = parser.sort(words)
            places[name] = args = parser.parse_args(words)
            if name != "evaluate":
                kind = {"sft": options.SFT, "grpo": options.GRPO}[name]
                places[name].settings = config.load(kind, ROOT / args.config, overrides)
                assert args.resume == "auto"
        assert places["grpo"].settings.model == os.fspath(places["sft"].out) != os.fspath(places["grpo"].out)
        assert places["sft"].settings.data.root == places["grpo"].settings.data.root
        assert places["sft"].settings.data.frames % 16 == 0  # chips of the slice, GPUs of the machines
    for engine in {engine for engine, _, _ in hosts}:
        assert len({commands for name, _, commands in hosts if name == engine}) == 1


@pytest.mark.parametrize("file", check.JOBSETS, ids=lambda file: file.stem)
def test_a_jobset_restarts_all_of_its_hosts_for_all_but_a_mistake(file):
    whole = yaml.safe_load(file.read_text())
    (workers,) = whole["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 5]
    assert rule["onExitCodes"]["operator"] == "In" and rule["onExitCodes"]["containerName"] == container["name"]
    (policy,) = whole["spec"]["failurePolicy"]["rules"]
    assert (policy["action"], policy["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never" and workers["replicas"] == 1
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    (count,) = container["resources"]["limits"].values()
    assert count * job["completions"] == 16
    given = {row["name"]: row["value"] for row in container["env"]}
    if "gpu" in file.stem:
        name = whole["metadata"]["name"]
        assert given["JAX_COORDINATOR_ADDRESS"] == f"{name}-{workers['name']}-0-0.{name}:8476"
        assert given["JAX_NUM_PROCESSES"] == str(job["completions"])


@pytest.mark.parametrize("file", check.SKY, ids=lambda file: file.stem)
def test_skypilot_recovers_what_was_preempted_and_what_saved_itself(file):
    resources = yaml.safe_load(file.read_text())["resources"]
    assert resources["use_spot"] and resources["job_recovery"]["recover_on_exit_codes"] == [69, 75]


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda page: page.stem)
def test_the_pages_name_commands_that_the_program_takes_and_files_that_exist(page):
    text = page.read_text("utf-8")
    for line in (line for line in text.splitlines() if line.startswith("surgery-r1 ")):
        name, *words = shlex.split(line)[1:]
        name = f"{name} {words.pop(0)}" if name == "data" else name
        parser = cli.commands()[name]
        parser.parse_args(parser.sort(words)[0])
    named = re.findall(r"`([a-z-]+\.(?:sh|yaml|sbatch|py|txt|md))`|\]\(([a-z]+\.md)\)", text, re.IGNORECASE)
    assert all((FOLDER / (file or link)).is_file() for file, link in named)
    assert all((ROOT / path).is_file() for path in re.findall(r"(?:scripts|configs)/[\w/-]+\.\w+", text))
    lengths = [len(page.read_text("utf-8").splitlines()) for page in FOLDER.glob("*.md")]
    assert len(lengths) == 4 and max(lengths) < 130


def stand_in(folder, name, text):
    """A program of this name that comes first on the path."""
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "ROOT": str(folder)}


@pytest.mark.parametrize("fails", ["grpo", "evaluate"])
def test_the_stages_end_with_the_status_of_the_one_that_fails(tmp_path, fails):
    environment = stand_in(tmp_path, "surgery-r1", f'echo "$1" >> "$ROOT/ran"; [ "$1" != {fails} ] || exit 5')
    done = subprocess.run([FOLDER / "stages.sh"], env=environment, capture_output=True, timeout=60)
    assert done.returncode == 5
    assert (tmp_path / "ran").read_text().split() == ["sft", "grpo", "evaluate"][: 2 if fails == "grpo" else 3]


def test_sigterm_reaches_the_program_whose_status_is_the_hosts(tmp_path):
    waits = "import signal, sys, time; signal.signal(15, lambda *_: (time.sleep(0.3), sys.exit(75)))"
    waits += f"; open('{tmp_path}/ready', 'w'); time.sleep(60)"
    environment = stand_in(tmp_path, "surgery-r1", f"exec {sys.executable} -c {shlex.quote(waits)}")
    host = subprocess.Popen([FOLDER / "stages.sh"], env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        host.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        host.send_signal(signal.SIGTERM)  # engines may say it twice
        assert host.wait(timeout=30) == 75
    finally:
        host.kill()


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [(0, 0, False), (2, 0, False), (5, 0, False), (69, 0, True), (75, 29, True), (75, 30, False), (143, 1, True)],
)
def test_slurm_requeues_for_all_but_a_mistake(tmp_path, status, restarts, again):
    stand_in(tmp_path, "srun", f"exit {status}")
    environment = stand_in(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/asked')
    environment |= dict(SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts), SLURM_SUBMIT_DIR=str(tmp_path))
    done = subprocess.run(["bash", FOLDER / "slurm.sbatch"], env=environment, timeout=30)
    assert done.returncode == status
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else None) == ("requeue 7\n" if again else None)


def test_slurm_does_not_requeue_a_mistake_that_one_host_met_and_others_lost_it_for(tmp_path):
    stand_in(tmp_path, "srun", 'touch "$MISTAKE"; exit 69')  # srun tells the highest status of all tasks
    environment = stand_in(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/asked')
    environment |= dict(SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(tmp_path))
    done = subprocess.run(["bash", FOLDER / "slurm.sbatch"], env=environment, timeout=30)
    assert done.returncode == 2 and not (tmp_path / "asked").exists()


@pytest.mark.parametrize("status", [2, 69])
def test_a_stage_that_meets_a_mistake_leaves_word_of_it(tmp_path, status):
    environment = stand_in(tmp_path, "surgery-r1", f"exit {status}")
    environment |= dict(ROOT=str(tmp_path), MISTAKE=str(tmp_path / "mistake"))
    done = subprocess.run([FOLDER / "stages.sh"], env=environment, capture_output=True, timeout=30)
    assert (done.returncode, (tmp_path / "mistake").exists()) == (status, status == 2)


def test_a_clusters_definition_refuses_what_it_does_not_name(tmp_path):
    pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    job = {"type": "object", "properties": {"name": {"type": "string"}, "replicas": {"type": "integer"}}}
    rest = {"x-kubernetes-preserve-unknown-fields": True, "type": "object", "properties": {}}
    fields = {"replicatedJobs": {"type": "array", "items": job}, "failurePolicy": rest, "network": rest}
    whole = {"type": "object", "properties": {"spec": {"type": "object", "properties": fields}}}
    whole["properties"] |= {name: {} for name in ("apiVersion", "kind", "metadata")}
    crd, version = tmp_path / "crd.yaml", {"name": "v1alpha2", "schema": {"openAPIV3Schema": whole}}
    crd.write_text(yaml.safe_dump({"spec": {"versions": [version]}}))
    with pytest.raises(Exception, match="'template' was unexpected"):
        check.definition(crd)
    job["properties"]["template"] = rest
    crd.write_text(yaml.safe_dump({"spec": {"versions": [version]}}))
    assert check.definition(crd) == "2 JobSets"
