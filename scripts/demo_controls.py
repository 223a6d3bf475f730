#!/usr/bin/env python
"""What else the time of the demo's GRPO could have bought, on the same held-out questions.

coarse      SFT continued on the same coarse boxes, for as many seconds as GRPO took
exact       SFT continued on exact boxes, for as many seconds
no_coherence  GRPO with the coherence reward off, for as many steps

surgery-r1 demo --out runs/demo0 --seed 0
.venv/bin/python scripts/demo_controls.py runs/demo0
"""

import argparse
import json
import shutil
from pathlib import Path

from surgery_r1_jax import config, demo, evaluate, grpo, handlers, log, options, records, sft


def seconds_of(folder: Path) -> tuple[int, float]:
    """Steps of a finished run and the seconds from its first logged step to its last."""
    rows = [row for row in log.read_metrics(folder / "metrics.jsonl") if row["split"] == "train"]
    return rows[-1]["step"] - rows[0]["step"], rows[-1]["elapsed_s"] - rows[0]["elapsed_s"]


def longer(out: Path, slack: float, steps: int) -> options.SFT:
    """The demo's SFT, started from its own result."""
    settings = config.load(options.SFT, out / "sft" / "config.yaml")
    optimizer = settings.optimizer.model_copy(update={"learning_rate": settings.optimizer.learning_rate / 3})
    return settings.model_copy(
        update={
            "model": str(out / "sft"),
            "seed": settings.seed + 1000,
            "targets": settings.targets.model_copy(update={"box_slack": slack}),
            "optimizer": optimizer,
            "schedule": settings.schedule.model_copy(update={"steps": steps, "save_every": steps}),
        }
    )


def main() -> None:
    """Run the controls of one demo folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of a finished demo")
    parser.add_argument("--only", choices=("coarse", "exact", "no_coherence"), help="run one control")
    args = parser.parse_args()
    handlers.start_devices()
    out = args.demo
    budget = json.loads((out / demo.MARKER).read_text())
    frames = records.split(records.read(out / "data"), "val")[: budget["eval_frames"]]
    _, grpo_seconds = seconds_of(out / "grpo")
    sft_steps, sft_seconds = seconds_of(out / "sft")
    matched = round(grpo_seconds / (sft_seconds / sft_steps))
    plain = config.load(options.GRPO, out / "grpo" / "config.yaml")
    without = plain.model_copy(update={"reward": plain.reward.model_copy(update={"coherence_weight": 0.0})})
    controls = {
        "coarse": lambda folder: sft.train(longer(out, budget["box_slack"], matched), folder),
        "exact": lambda folder: sft.train(longer(out, 0.0, matched), folder),
        "no_coherence": lambda folder: grpo.train(without, folder),
    }
    path = out / "controls.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, run in controls.items():
        if args.only in (None, name):
            folder = out / "controls" / name
            shutil.rmtree(folder, ignore_errors=True)
            run(folder)
            results[name] = evaluate.score(demo.answers(folder, frames)) | {"sft_steps": matched}
            path.write_text(json.dumps(results, indent=2) + "\n")
    stages = json.loads((out / "metrics.json").read_text())
    evaluate.print_scores({"sft": stages["sft"], "grpo": stages["grpo"]} | results, title=f"controls of {out}")


if __name__ == "__main__":
    main()
