"""The benchmark against TRL: both sides train alike, and it would say so if they did not."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_training.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_training", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(kind, *told):
    named = dict(kind=kind, attention="xla", layout="shared")
    return [named | dict(side=side, told=each) for side, each in zip(("ours", "trl"), told, strict=True)]


def test_sides_that_train_otherwise_are_told_apart(bench):
    same = [[7.0, 2.0], [6.5, 2.1]]
    for kind in ("sft", "lora", "grpo"):
        assert bench.differing(rows(kind, same, same), "float32") == []
        (line,) = bench.differing(rows(kind, same, [[7.1, 2.0], [6.5, 2.1]]), "float32")
        assert line.startswith(f"{kind} trl xla shared tells")
    # What is drawn by each side for itself is not compared: later GRPO steps, the gradient of adapters.
    later, gradient = [[7.0, 2.0], [6.9, 2.1]], [[7.0, 3.0], [6.5, 2.1]]
    found = {
        kind: [bool(bench.differing(rows(kind, same, other), "float32")) for other in (later, gradient)]
        for kind in ("sft", "lora", "grpo")
    }
    assert found == {"sft": [True, True], "lora": [False, False], "grpo": [False, True]}
    refused = rows("sft", same, same)[0] | {"refused": "out of memory"}
    del refused["told"]
    assert bench.differing([refused, *rows("sft", same, same)], "float32") == []


@pytest.mark.slow
def test_four_steps_of_ours_and_of_trl_arrive_at_the_same_numbers(tmp_path):
    pytest.importorskip("trl", reason="needs TRL and a CPU build of PyTorch")
    words = ["--work", str(tmp_path / "work"), "--size", "tiny", "--out", str(tmp_path / "rows.json")]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["side"] for row in found] == ["ours", "ours", "trl"] * 3
    assert all((row["completions_s"] is not None) == (row["kind"] == "grpo") for row in found)
