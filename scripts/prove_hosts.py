#!/usr/bin/env python
"""SFT, GRPO and evaluation by the command line, as one process, two and four, over loopback: the same figures.

Prints for each command and number of processes the largest difference of what is logged from that of one process,
relative to it, whether all answers and drawn texts are the same, and what others than process 0 printed.

.venv/bin/python scripts/prove_hosts.py --work /tmp/hosts --steps 6
"""

import argparse
import json
import sys
import time
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOME), str(HOME / "tests")]
COUNTS, TOLERANCE = (1, 2, 4), 1e-4  # of sums of logarithms and of quotients, in float32
CONFIG = """model: {model}
data: {{root: {data}, frames: 4, questions: 2}}
optimizer: {{learning_rate: 0.1, b1: 0.0, eps: 1.0, schedule: constant, warmup: 0.0}}
schedule: {{steps: {steps}, eval_every: 3, save_every: 3, log_every: 1}}
evaluation: {{frames: 4, questions: 2, limit: 5, max_tokens: 4}}
"""


def start(folder: Path, count: int, words: list[str]) -> tuple[float, str]:
    """Run a command as so many processes: seconds, and what others than the first printed."""
    import toy

    began, running = time.monotonic(), toy.start_group(folder, count, words)
    codes = [process.wait() for process in running]
    printed = "".join((folder / f"printed{index}").read_text() for index in range(1, count))
    assert codes == [0] * count, (codes, printed, (folder / "printed0").read_text()[-2000:])
    return time.monotonic() - began, printed


def figures(out: Path) -> list[dict]:
    """What a run or an evaluation tells, without times and without the padding, which is that of process 0."""
    if out.is_dir():
        import toy

        return [{name: row[name] for name in row if not name.startswith("padding/")} for row in toy.logged(out)]
    known = json.loads(out.with_suffix(".json").read_text())
    return [{name: value for name, value in known.items() if isinstance(value, float)}]


def drawn(out: Path) -> set[tuple]:
    """The texts that a run or an evaluation shows; a run those of frames of process 0."""
    path = out / "completions.jsonl" if out.is_dir() else out.with_name(out.name + ".predictions.jsonl")
    rows = map(json.loads, path.read_text().splitlines())
    return {(row.get("step"), row["frame"], row["question"], row.get("completion") or row["text"]) for row in rows}


def difference(one: list[dict], other: list[dict]) -> float:
    """The largest difference of two logs; infinite where they are not about the same."""
    if [row.keys() for row in one] != [row.keys() for row in other]:
        return float("inf")
    pairs = [(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a]
    if any((type(a), a) != (type(b), b) for a, b in pairs if not isinstance(a, float)):
        return float("inf")
    return max(abs(a - b) / max(1e-3, abs(a)) for a, b in pairs if isinstance(a, float))


def main() -> int:
    """All of it; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new folder")
    parser.add_argument("--steps", type=int, default=6, help="of training (default: %(default)s)")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True)
    import toy

    toy.write_start(work, frames=12)
    plain = CONFIG.format(model=work / "start", data=work / "data", steps=arguments.steps)
    (work / "sft.yaml").write_text(plain)
    (work / "grpo.yaml").write_text(plain + "samples: 2\nsampler: {max_tokens: 4}\n")
    wrong = 0
    for command in ("sft", "grpo", "evaluate"):
        for count in COUNTS:
            out = work / f"{command}{count}"
            words = [command, "--config", str(work / f"{command}.yaml"), "--out", str(out)]
            if command == "evaluate":
                words = [command, "--checkpoint", str(work / "sft1"), "--data", str(work / "data"), "--split", "all"]
                words += ["--out", str(out), "--batch-frames", "4", "--max-completion", "8"]
            seconds, printed = start(work, count, words)
            first = work / f"{command}1"
            apart = difference(figures(first), figures(out))
            texts = drawn(out)
            same = texts == drawn(first) if command == "evaluate" else texts <= drawn(first)
            same = same and bool(texts) == (command != "sft")  # which draws none
            good = apart <= TOLERANCE and same and not printed
            wrong += not good
            told = f"{command:<9} {count} processes  figures within {apart:.1e}  texts {'equal' if same else 'DIFFER'}"
            print(f"{told}  others printed {len(printed)} characters  {seconds:.0f} s{'' if good else '  FAILED'}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
