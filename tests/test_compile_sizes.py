"""The TPU compiler accepts a released size on a slice that holds it, and refuses it where it would not fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-tpu" / "bin" / "python"
SFT_3B = "--size", "Qwen2.5-VL-3B", "--config", "sft_3b.yaml", "--optimizer.rates.tower=1", "--programs", "update"


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.is_file(), reason="no TPU compiler; scripts/compile_sizes.sh makes its environment")
@pytest.mark.parametrize(("more", "status"), [((), 0), (("--compute.remat=false",), 1)])
def test_three_billion_weights_train_on_eight_chips_if_activations_are_made_again(tmp_path, more, status):
    out = tmp_path / "sizes.json"
    line = [str(PYTHON), "scripts/compile_sizes.py", *SFT_3B, "--slice", "v5e:2x4", "--out", str(out), *more]
    assert subprocess.run(line, cwd=ROOT, stdout=sys.stderr).returncode == status
    (row,) = json.loads(out.read_text())
    if status:
        assert not row["fits"] and "of 15.75G" in row["refusal"]
    else:
        assert row["fits"] and 8 < row["peak_gib"] < 11 and row["whole_stacks"] == {}
