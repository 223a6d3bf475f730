#!/usr/bin/env python
"""Where the time of some runs went, their first lines left out, in which programs are compiled.

SFT should wait for data less than 2 % of its time:

    .venv/bin/python scripts/time_split.py runs/demo/sft runs/demo/grpo
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from surgery_r1_jax import charts, log


def shares(run: Path) -> dict[str, float]:
    """Share of each phase in the time after the run's first line."""
    first, *rest = (row for row in log.read_metrics(run / "metrics.jsonl") if row["split"] == "train")
    since = first["elapsed_s"]
    split = charts.time_split([row | {"elapsed_s": row["elapsed_s"] - since} for row in rest])
    return {area.phase: area.share for area in split.areas} if split else {}


def main() -> None:
    """Print a row a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories")
    found = {run: shares(run) for run in parser.parse_args().runs}
    phases = [phase for phase in charts.PHASES if any(phase in split for split in found.values())]
    table = Table("run", *(charts.PHASES[phase] for phase in phases))
    for run, split in found.items():
        table.add_row(str(run), *(f"{split.get(phase, 0.0):.2%}" for phase in phases))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
