"""Holds the launch files against the programs that read them, and prints what each host would run. No cloud is asked.

    python scripts/launch/check.py                     with what is installed; what is not is said
    python scripts/launch/check.py --crd jobset.yaml   and the JobSets against the definition of a cluster:
                                                       kubectl get crd jobsets.jobset.x-k8s.io -o yaml > jobset.yaml

Worth having beside it, in an environment of its own: pip install -r scripts/launch/requirements.txt
"""

import argparse
import copy
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SCRIPTS = sorted([*HERE.glob("*.sh"), HERE / "slurm.sbatch"])
SKY, JOBSETS = sorted(HERE.glob("sky-*.yaml")), sorted(HERE.glob("jobset-*.yaml"))
XPK = dict(PROJECT="p", ZONE="us-east5-b", CLUSTER="c", IMAGE="i", ROOT="gs://my-bucket/surgery")


class Skipped(Exception):
    """A check that cannot be made here, and why."""


def syntax() -> str:
    """Every script is one for bash, and shellcheck has nothing to say."""
    for script in SCRIPTS:
        _run(["bash", "-n", script])
    if not (found := _program("shellcheck")):
        return f"{len(SCRIPTS)} scripts by bash -n; shellcheck is not installed"
    _run([found, *SCRIPTS])
    return f"{len(SCRIPTS)} scripts by bash -n and shellcheck"


def skypilot() -> str:
    """SkyPilot's own library reads its files and finds the resources they name."""
    os.environ.setdefault("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    try:
        import sky
    except ImportError:
        raise Skipped("skypilot is not installed") from None
    tasks = [sky.Task.from_yaml(str(file)) for file in SKY]
    return "; ".join(f"{task.num_nodes} x {next(iter(task.resources))}" for task in tasks)


def jobset() -> str:
    """The JobSets have no field, and no value, that JobSet's and Kubernetes' published interface does not have."""
    try:
        from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
    except ImportError:
        raise Skipped("kubeflow-trainer-api, which has JobSet's interface, is not installed") from None
    for file in JOBSETS:
        given = yaml.safe_load(file.read_text())
        if lost := list(_lost(given, JobsetV1alpha2JobSet.from_dict(given).to_dict())):
            raise ValueError(f"{file}: unknown {', '.join(lost)}")
    return f"{len(JOBSETS)} JobSets"


def definition(crd: Path | None) -> str:
    """The JobSets are valid by a cluster's own definition, in which unknown fields are mistakes."""
    if crd is None:
        raise Skipped("no --crd FILE given")
    try:
        import jsonschema
    except ImportError:
        raise Skipped("jsonschema is not installed") from None
    versions = yaml.safe_load(crd.read_text())["spec"]["versions"]
    schema = closed(next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1alpha2"))
    for file in JOBSETS:
        jsonschema.validate(yaml.safe_load(file.read_text()), schema)
    return f"{len(JOBSETS)} JobSets"


def xpk() -> str:
    """Xpk takes its arguments and makes a JobSet that restarts what ours restart."""
    if not (found := _program("xpk")):
        raise Skipped("xpk is not installed")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "jobset.yaml"
        path = f"{Path(found).parent}{os.pathsep}{os.environ['PATH']}"
        flags = ["--dry-run", "--skip-validation", "--project-number", "1", "--output-manifest-file", made]
        _run([HERE / "xpk.sh", *flags], **XPK, PATH=path)
        spec = yaml.safe_load(made.read_text())["spec"]
    rule = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]
    if rule["operator"] != "NotIn" or {1, 69, 75, 137} - set(rule["values"]) or {2, 5} & set(rule["values"]):
        raise ValueError(f"restarts by {rule}")
    return f"a JobSet that is restarted {spec['failurePolicy']['maxRestarts']} times"


def hosts() -> Iterator[tuple[str, str, str]]:
    """Engine, host, and the commands that this host runs with what the engine tells it, by a dry run of the files."""
    for file in SKY:
        task = yaml.safe_load(file.read_text())
        # SkyPilot counts the hosts of a slice of TPUs, which have four chips each.
        count = task.get("num_nodes") or int(task["resources"]["accelerators"].rpartition("-")[2]) // 4
        for i in range(count):
            told = dict(SKYPILOT_NUM_NODES=str(count), SKYPILOT_NODE_RANK=str(i))
            yield file.name, _told(told), _run(["bash", "-c", task["run"]], **task["envs"], **told, DRY_RUN="1")
    for file in JOBSETS:
        job = yaml.safe_load(file.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
        container = job["template"]["spec"]["containers"][0]
        given = {row["name"]: row["value"] for row in container["env"]}
        for i in range(job["completions"]):
            told = {name: value for name, value in given.items() if name.startswith("JAX")}
            told |= dict(JOB_COMPLETION_INDEX=str(i))
            yield file.name, _told(told), _run(container["command"], **given | told, DRY_RUN="1")
    with tempfile.TemporaryDirectory() as folder:
        # What srun does: the command once for each task.
        (Path(folder) / "srun").write_text('#!/usr/bin/env bash\nshift\nSLURM_PROCID=$TASK exec "$@"\n')
        (Path(folder) / "srun").chmod(0o755)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        for i in range(2):
            told = dict(SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=str(i))
            given = dict(PATH=path, TASK=str(i), ROOT="/shared/surgery", DRY_RUN="1")
            given |= dict(SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(ROOT))
            yield "slurm.sbatch", _told(told), _run(["bash", HERE / "slurm.sbatch"], **given)


def closed(schema: dict) -> dict:
    """A schema in which fields that it does not name are mistakes, as a server that validates strictly has it."""
    schema = copy.deepcopy(schema)
    waiting = [schema]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            if "properties" in here and "x-kubernetes-preserve-unknown-fields" not in here:
                here.setdefault("additionalProperties", False)
            if here.pop("x-kubernetes-int-or-string", False):
                here["anyOf"] = [{"type": "integer"}, {"type": "string"}]
            waiting += here.values()
        elif isinstance(here, list):
            waiting += here
    return schema


def main() -> int:
    """Print every check and every host's commands; 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crd", type=Path, metavar="FILE", help="definition of JobSet as YAML (default: not checked)")
    crd = parser.parse_args().crd
    checks: dict[str, Callable[[], str]] = {
        "scripts": syntax,
        "skypilot": skypilot,
        "jobset": jobset,
        "jobset --crd": lambda: definition(crd),
        "xpk": xpk,
    }
    failed = 0
    for name, check in checks.items():
        try:
            result = f"ok       {check()}"
        except Skipped as why:
            result = f"skipped  {why}"
        except Exception as problem:  # of any library
            failed, result = 1, f"FAILED   {problem}"
        print(f"{name:14}{result}")
    for engine, rows in itertools.groupby(hosts(), lambda row: row[0]):
        print(f"\n{engine}")
        for commands, same in itertools.groupby(rows, lambda row: row[2]):
            print(*(f"  with {told}" for _, told, _ in same), "  each runs", sep="\n")
            print(textwrap.indent(commands.rstrip(), "    "))
    return failed


def _lost(given, kept, where: str = "") -> Iterator[str]:
    """Places of one YAML value that another lacks."""
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(kept, dict) or key not in kept:
                yield f"{where}{key}"
            else:
                yield from _lost(value, kept[key], f"{where}{key}.")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for i, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from _lost(one, other, f"{where}{i}.")
    elif given != kept:
        yield where.rstrip(".")


def _told(environment: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in environment.items())


def _program(name: str) -> str | None:
    """Where a program is: beside this Python, or on the path."""
    return shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)


def _run(command: list, **environment: str) -> str:
    """What a command prints, run in the repository. Raises: ValueError with what it said where it failed."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{command[0]}: status {done.returncode}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
