"""Two and four processes over loopback train, draw, stop and evaluate as one does.

Each group is started once and does everything; see group_worker.py.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import group_worker as worker
import jax
import numpy as np
import pytest
import toy
from toy import few_devices, quick_compile  # noqa: F401

from surgery_r1_jax import checkpoint, log, saves, sft

LIMIT = 600  # seconds; about 60 on two idle cores
COUNTS = (4, 2)
RELAYS = ("forth", "back")  # 1, 4, 2, 1 processes and 1, 2, 4, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.write_start(tmp_path_factory.mktemp("groups"), frames=12)


@pytest.fixture(scope="module")
def found(folder):
    """What every process wrote, by the number of processes. One process runs the first leg of each relay."""
    for run in RELAYS:
        sft.train(worker.sft_settings(folder, worker.LEG), folder / run)
    groups = {count: start(folder, count) for count in COUNTS}  # they wait for one another
    try:
        alone = json.loads(json.dumps(worker.together(folder)))
        codes = {count: [process.wait(timeout=LIMIT) for process in group] for count, group in groups.items()}
    finally:
        for process in itertools.chain(*groups.values()):
            process.kill()
    assert not any(itertools.chain(*codes.values())), "\n".join(
        path.read_text()[-3000:] for path in sorted(folder.glob("log*"))
    )
    read = lambda count, process: json.loads((folder / f"found{count}_{process}.json").read_text())  # noqa: E731
    return {1: [alone]} | {count: [read(count, process) for process in range(count)] for count in COUNTS}


def start(folder, count):
    port = toy.free_port()
    tests = Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(tests / "group_worker.py"), str(folder), str(process), str(count), str(port)],
            env=environment,
            stdout=(folder / f"log{count}_{process}").open("w"),
            stderr=subprocess.STDOUT,
        )
        for process in range(count)
    ]


@pytest.mark.parametrize("count", COUNTS)
def test_every_process_knows_every_answer_and_no_question_is_answered_twice(found, count):
    (alone,) = found[1]
    rows = alone["answers"]
    assert len(rows) == len({(row["frame"], row["question"]) for row in rows}) > 10
    assert len({row["frame"] for row in rows}) % count  # some process has fewer rows than others
    assert [process["answers"] for process in found[count]] == [rows] * count
    assert [process["devices"] for process in found[count]] == [count] * count


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("seed", [str(seed) for seed in worker.SEEDS])
def test_the_tokens_that_are_drawn_do_not_depend_on_the_number_of_processes(found, count, seed):
    (alone,) = found[1]
    assert [frame for process in found[count] for frame in process["tokens"][seed]] == alone["tokens"][seed]
    assert len({json.dumps(alone["tokens"][seed]) for seed in alone["tokens"]}) == len(worker.SEEDS)


@pytest.mark.parametrize("count", COUNTS)
def test_a_grpo_update_is_that_of_one_process(folder, found, count):
    (alone,) = found[1]
    assert alone["update"]["grad_norm"] > 0.1
    for process in found[count]:
        assert process["update"] == pytest.approx(alone["update"], rel=1e-5, abs=1e-5)
    one, many = np.load(folder / "updated1.npz"), np.load(folder / f"updated{count}.npz")
    before = jax.tree.leaves(checkpoint.load_model(folder / "start").params)
    moved = 0.0
    for name, old in zip(one.files, before, strict=True):
        np.testing.assert_allclose(one[name], many[name], atol=1e-5)
        moved = max(moved, np.abs(one[name] - old).max())
    assert moved > 1e-3


@pytest.mark.parametrize("count", COUNTS)
def test_each_process_opens_the_images_of_its_part_of_a_batch_alone(found, count):
    (alone,) = found[1]
    parts = [process["opened"] for process in found[count]]
    assert sorted(name for part in parts for name in part) == alone["opened"] and len(alone["opened"]) == 4
    assert {len(part) for part in parts} == {4 // count}


def logged(out):
    rows = [row for row in log.read_metrics(out / "metrics.jsonl") if row["split"] == "train"]
    return np.asarray([[row[name] for name in ("step", "loss", "grad_norm", "num_tokens")] for row in rows])


@pytest.fixture(scope="module")
def last(folder, found):
    """The step at which one process ends both relays, and another run that was never handed on."""
    told = {process["stopped"] for process in found[2]}
    (step,) = (int(re.match(r"stopped after step (\d+) of 200", text)[1]) for text in told)
    assert 2 * worker.LEG < step < 200 and saves.Checkpoints(folder / "forth").latest() == step
    assert saves.Checkpoints(folder / "back").latest() == 3 * worker.LEG
    sft.train(worker.sft_settings(folder, step + worker.LEG), folder / "alone")
    return step + worker.LEG


@pytest.mark.parametrize("run", RELAYS)
def test_a_run_handed_on_between_one_two_and_four_processes_is_the_run_of_one(folder, last, run):
    """Every checkpoint is compared with what was saved as it is restored; here it is what is made of it."""
    sft.train(worker.sft_settings(folder, last), folder / run, resume=True)
    relayed, alone = logged(folder / run), logged(folder / "alone")
    np.testing.assert_allclose(relayed, alone, rtol=1e-5)
    assert alone[:, 0].tolist() == list(range(1, last + 1)) and alone[-1, 1] < alone[0, 1] - 1e-3
    ours, theirs = (
        jax.tree.leaves(checkpoint.load_model(folder / each, which="last").params) for each in (run, "alone")
    )
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
