#!/usr/bin/env python
"""All reasoning of a training set: every text borne out by its labels, every lie found, many phrasings.

Makes the six kinds of record of a list of labels (or a data set folder), checks each reasoning text, changes one
instrument, state, location or box in each, and checks that every changed text is refused.

.venv/bin/python scripts/prove_traces.py data/EndoVis-18-VQLA
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from surgery_r1_jax import answer, build, tracecheck

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import trace_mutations as lies


def main() -> int:
    """Build, check, change, check, print; 1 where a text fails or a lie passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="data set folder or list of labels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    frames, _ = build.read(args.source)
    by_id = {frame.id: frame for frame in frames}
    with tempfile.TemporaryDirectory() as folder:
        since = time.monotonic()
        stats = build.run(args.source, Path(folder) / "out", seed=args.seed)
        seconds = time.monotonic() - since
        reference = json.loads((Path(folder) / "out" / "data.json").read_text())["location"]["reference"]
        rows = [json.loads(line) for line in (Path(folder) / "out" / "records.jsonl").open()]
    rng = random.Random(args.seed)
    refused, missed, tried, phrases, examples = Counter(), Counter(), Counter(), Counter(), []
    reasoned = [row for row in rows if "reasoning" in row]
    for row in reasoned:
        name, index, _ = row["id"].rsplit("/", 2)
        frame, text = by_id[name], row["reasoning"]
        about = dict(want=answer.WANT.index(row["want"]), reference=reference)
        record = frame.records[int(index)]
        if (reason := tracecheck.check(text, frame, record, **about)) != "ok":
            refused[reason.value] += 1
        phrases.update({lies.skeleton(sentence) for sentence in lies.sentences(text)})
        for what in (*lies.NAMES, "box"):
            if lie := lies.mutate(text, what, rng):
                tried[what] += 1
                if tracecheck.check(lie, frame, record, **about) == "ok":
                    missed[what] += 1
                    examples.append(lie)
    lengths = sorted(len(row["reasoning"]) for row in reasoned)
    phrase, most = phrases.most_common(1)[0]
    result = dict(
        records=stats["records"],
        build_seconds=round(seconds, 1),
        reasoning=len(reasoned),
        refused=dict(refused),
        lies=dict(tried),
        lies_that_passed=dict(missed),
        sentence_skeletons=len(phrases),
        most_frequent={"skeleton": phrase, "share": round(most / len(reasoned), 3)},
        characters_p90_over_p10=round(lengths[len(lengths) * 9 // 10] / lengths[len(lengths) // 10], 2),
    )
    print(json.dumps(result, indent=2))
    for lie in examples[:5]:
        print("passed:", lie)
    return 1 if refused or missed else 0


if __name__ == "__main__":
    sys.exit(main())
