"""Two processes over loopback train, stop and evaluate as one does."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
import two_process_worker as worker
from toy import few_devices, quick_compile  # noqa: F401

from surgery_r1_jax import checkpoint, grpo, log, options, sft

LIMIT = 420  # seconds; about 60 on two idle cores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.write_start(tmp_path_factory.mktemp("two"), frames=12)


@pytest.fixture(scope="module")
def found(folder):
    """What either process wrote, the first one's first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tests = Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}",
    }
    script, logs = str(tests / "two_process_worker.py"), [folder / f"log{process}" for process in (0, 1)]
    running = [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(process), str(port)],
            env=environment,
            stdout=logs[process].open("w"),
            stderr=subprocess.STDOUT,
        )
        for process in (0, 1)
    ]
    try:
        codes = [process.wait(timeout=LIMIT) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0, 0], "\n".join(path.read_text()[-3000:] for path in logs)
    return [json.loads((folder / f"found{process}.json").read_text()) for process in (0, 1)]


def test_evaluation_counts_every_question_once_on_both_processes(folder, found):
    want = json.loads(json.dumps(worker.answers(folder)))
    assert len(want) == 15 == len({(row["frame"], row["question"]) for row in want})
    assert found[0]["answers"] == want and found[1]["answers"] == want
    assert found[0]["devices"] == found[1]["devices"] == 2


def test_both_processes_stop_at_the_same_step_with_one_checkpoint_of_it(folder, found):
    assert found[0]["stopped"] == found[1]["stopped"]
    step = stopping_step(found)
    assert 2 <= step < 200 and checkpoint.Checkpoints(folder / "two_sft").latest() == step


def stopping_step(found) -> int:
    return int(re.match(r"stopped after step (\d+) ", found[0]["stopped"])[1])


def logged(out, *names):
    rows = [row for row in log.read_metrics(out / "metrics.jsonl") if row["split"] == "train"]
    return np.asarray([[row[name] for name in names] for row in rows])


def parameters(out):
    return jax.tree.leaves(checkpoint.load_model(out, which="last").params)


def test_sft_of_two_processes_equals_that_of_one(folder, found):
    step = stopping_step(found)
    sft.train(worker.settings(folder, options.SFT, step), folder / "one_sft")
    names = ("loss", "grad_norm", "num_tokens")
    one, two = logged(folder / "one_sft", *names), logged(folder / "two_sft", *names)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    assert len(one) == step and one[-1, 0] < one[0, 0] - 1e-3
    for ours, theirs in zip(parameters(folder / "one_sft"), parameters(folder / "two_sft"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_grpo_step_of_two_processes_equals_that_of_one(folder, found):
    scores = grpo.train(worker.grpo_settings(folder), folder / "one_grpo")
    assert found[0]["grpo"] == found[1]["grpo"] == scores["n"]
    names = ("num_tokens", "completions/mean_length", "entropy", "kl", "groups", "grad_norm")
    one, two = logged(folder / "one_grpo", *names), logged(folder / "two_grpo", *names)
    assert len(one) == 1 and one[0, 0] > 20
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
