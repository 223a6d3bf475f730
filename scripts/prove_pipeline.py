#!/usr/bin/env python
"""The stream of batches goes on from everywhere, whoever makes it, and nothing dies in silence.

Two drawn data sets are mixed, with shuffling and several shapes. Every position of 2.5 epochs is restored with 0, 2 and
4 worker processes, and the rest of the batches compared; each row is counted; changed data and configurations are
refused; workers are killed, leave, and raise, and the run must say so within 20 seconds and miss nothing afterwards.

.venv/bin/python scripts/prove_pipeline.py --only ledger deaths
"""

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from surgery_r1_jax import errors, examples, hf, options, pipeline, run, synth, tiny

SEED = 3
LIMIT_S = 20.0
PARTS = ("positions", "ledger", "changes", "deaths")


class Faulty(examples.Encoder):
    """An encoder that comes to grief, in the way told by its system's name, at one frame."""

    def training(self, frame, *rest):
        """As its class does, but for that frame."""
        if frame.id.endswith("frame003"):
            match os.environ["FAULT"]:
                case "leave":
                    os._exit(0)
                case "exit":
                    os._exit(123)
                case "raise":
                    raise ZeroDivisionError("told to")
        return super().training(frame, *rest)


def main() -> int:
    """All proofs, one line each; 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deaths", type=int, default=20, help="of each kind (default: %(default)s)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="these parts of it (default: all)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, encoder = prepare(Path(folder))
        parts = {
            "positions": lambda: positions(data, encoder),
            "ledger": lambda: ledger(data, encoder),
            "changes": lambda: changes(Path(folder), data, encoder),
            "deaths": lambda: deaths(data, encoder, args.deaths),
        }
        failed = [name for part in args.only for name in parts[part]()]
    print(f"{'FAILED: ' + ', '.join(failed) if failed else 'all held'}")
    return bool(failed)


def prepare(folder: Path) -> tuple[options.Data, examples.Encoder]:
    """Two data sets, their configuration, and a tiny model's encoder."""
    for name, count in (("one", 16), ("two", 8)):
        synth.write(folder / name, frames=count, seed=count, size=(84, 56), max_tools=3, sequences=("seq_2",))
    model = tiny.write_folder(folder / "model", tiny.Sizes(size=(84, 56)))
    sources = options.Source(root=str(folder / "one"), weight=2.0), options.Source(root=str(folder / "two"))
    data = options.Data(mix=sources, frames=2, questions=4, buckets=3)
    return data, hf.encoder_of(model, hf.read_config(model))


def stream_of(data: options.Data, encoder: examples.Encoder, seed: int = SEED, **targets):
    """The shipped training stream, and its fingerprint."""
    frames, taught = pipeline.read(data), options.Targets(reasoning=0.5, box_slack=0.3, **targets)
    stream = pipeline.training(frames, encoder, data, taught, seed=seed)
    return stream, pipeline.fingerprint(frames, seed, stream.plan, taught)


def positions(data, encoder):
    """Restore everywhere, compare the rest."""
    stream, _ = stream_of(data, encoder)
    steps = int(2.5 * stream.plan.rows / data.frames)
    whole = [stream[number] for number in range(steps)]
    for workers in (0, 2, 4):
        other, _ = stream_of(data.model_copy(update=dict(workers=workers)), encoder)
        since, equal = time.monotonic(), 0
        for taken in range(steps):
            with other.starting(taken) as rest:
                equal += all(same(next(rest), batch) for batch in whole[taken:])
        print(
            f"{workers} workers: {equal} of {steps} positions of 2.5 epochs ({len(stream.shapes)} shapes, 2 sources) "
            f"go on equally, {time.monotonic() - since:.0f} s"
        )
        if equal < steps:
            yield f"positions with {workers} workers"
    if same(whole[0], whole[1]):  # a comparison that cannot fail proves nothing
        yield "control of positions"


def same(one, other) -> bool:
    """Whether two batches hold the same bytes."""
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def ledger(data, encoder):
    """Each source's rows, counted in each of its buckets over 2.5 epochs."""
    seen, frames = Counter(), pipeline.read(data)
    stream = pipeline.rollouts(frames, encoder, data, seed=SEED)
    steps = int(2.5 * stream.plan.rows / data.frames)
    order = []
    for number in range(steps):
        _, gold = stream[number]
        for frame, records, valid in zip(gold.frame_B, gold.record_BQ, gold.valid_BQ, strict=True):
            order.append((int(frame), tuple(records[valid].tolist())))
    seen.update(order)
    wrong = 0
    for bucket in stream.plan.buckets:
        for rows in filter(None, bucket.rows):
            members = {(row.frame, row.records) for row in rows}
            own = [row for row in order if row in members]
            for at in range(0, len(own), len(members)):
                epoch = own[at : at + len(members)]
                wrong += len(set(epoch)) != len(epoch)
    print(f"ledger: {len(order)} rows drawn, {len(seen)} of {stream.plan.rows} seen, {wrong} epochs with a row twice")
    if wrong or len(seen) < stream.plan.rows:
        yield "ledger"


def changes(folder: Path, data, encoder):
    """What a checkpoint must not be resumed on."""
    _, before = stream_of(data, encoder)
    label = sorted((folder / "one").glob("seq_2/vqla/label/*.txt"))[1]
    image = sorted((folder / "two").glob("seq_2/left_frames/*"))[2]
    heavier = (data.mix[0].model_copy(update=dict(weight=3.0)), data.mix[1])
    tried = {
        "label byte": lambda: spoilt(label, data, encoder),
        "image byte": lambda: spoilt(image, data, encoder),
        "seed": lambda: stream_of(data, encoder, seed=SEED + 1)[1],
        "batch": lambda: stream_of(data.model_copy(update=dict(frames=1)), encoder)[1],
        "questions": lambda: stream_of(data.model_copy(update=dict(questions=2)), encoder)[1],
        "weights": lambda: stream_of(data.model_copy(update=dict(mix=heavier)), encoder)[1],
        "buckets": lambda: stream_of(data.model_copy(update=dict(buckets=1)), encoder)[1],
        "targets": lambda: stream_of(data, encoder, answer_only=0.5)[1],
    }
    refused = 0
    for name, change in tried.items():
        now = change()
        try:
            run.same_data({"data": before}, now, folder)
            yield f"change of {name} passed"
        except errors.InputError as refusal:
            refused += before[:12] in str(refusal) and now[:12] in str(refusal)
    workers = stream_of(data.model_copy(update=dict(workers=4, threads=1)), encoder)[1]
    print(f"changes: {refused} of {len(tried)} refused with both fingerprints; another number of workers is none")
    if refused < len(tried) or workers != before:
        yield "changes"


def spoilt(file: Path, data, encoder) -> str:
    """The fingerprint with one byte of a file changed: of a label its last digit, of an image one of its text chunk."""
    content = file.read_bytes()
    if file.suffix == ".txt":
        at = max(i for i in range(len(content)) if content[i : i + 1].isdigit())
        changed = content[:at] + (b"1" if content[at : at + 1] != b"1" else b"2") + content[at + 1 :]
    else:
        changed = content[:-1] + bytes([content[-1] ^ 1])  # of the checksum of the end, which no reader needs
    try:
        file.write_bytes(changed)
        return stream_of(data, encoder)[1]
    finally:
        file.write_bytes(content)


def deaths(data, encoder, count: int):
    """Workers that are killed, leave in peace, exit and raise."""
    helped, _ = stream_of(data.model_copy(update=dict(workers=2)), encoder)
    sound, _ = stream_of(data, encoder)
    whole = [sound[number] for number in range(2 * sound.plan.rows)]
    faulty = Faulty(**{name: getattr(encoder, name) for name in encoder.__dataclass_fields__})
    broken, _ = stream_of(data.model_copy(update=dict(workers=2)), faulty)
    blocks = set(os.listdir("/dev/shm"))
    for how in ("kill", "leave", "exit", "raise"):
        os.environ["FAULT"] = how
        told, missing, slowest, messages = 0, 0, 0.0, Counter()
        for number in range(count):
            with (helped if how == "kill" else broken).starting() as batches:
                taken = [next(batches) for _ in range(1 + number % 3)] if how == "kill" else []
                if how == "kill":
                    os.kill(workers(2)[number % 2].pid, signal.SIGKILL)
                since = time.monotonic()
                try:
                    while len(taken) < len(whole):
                        taken.append(next(batches))
                        since = time.monotonic()
                except errors.InputError as line:
                    told += "\n" not in str(line)
                    messages[str(line).partition("; ")[0].partition(" process ")[0] + ": " + reason(str(line))] += 1
                slowest = max(slowest, time.monotonic() - since)
            with sound.starting(len(taken)) as rest:
                seen = [*taken, *(next(rest) for _ in range(len(whole) - len(taken)))]
            missing += not all(map(same, seen, whole))
        said = "; ".join(f"{n} x {message}" for message, n in messages.items())
        print(
            f"{how}: {told} of {count} told in one line, the slowest after {slowest:.1f} s; {missing} with a gap; "
            f"{said}"
        )
        if told < count or missing or slowest > LIMIT_S:
            yield how
    left = {name for name in set(os.listdir("/dev/shm")) - blocks if not name.startswith("sem.")}
    print(f"shared memory: {len(left)} blocks left of {4 * count} deaths")


def workers(count: int) -> list[multiprocessing.Process]:
    """The worker processes, when all of them have been started."""
    while True:
        found = [child for child in multiprocessing.active_children() if child.name.startswith("grain")]
        if len(found) >= count:
            return sorted(found, key=lambda child: child.pid)
        time.sleep(0.05)


def reason(line: str) -> str:
    """A message without its process number."""
    return " ".join(word for word in line.partition(", often")[0].split() if not word.isdigit())


if __name__ == "__main__":
    sys.exit(main())
