"""Frames with records made by hand, for tests of what is written about them."""

from pathlib import Path

from surgery_r1_jax import vocabulary
from surgery_r1_jax.records import Frame, Record

ORGAN, STATE, LOCATION, TOOL = range(4)
HERE, THERE, ELSEWHERE = (0.1, 0.1, 0.3, 0.3), (0.5, 0.5, 0.9, 0.9), (0.0, 0.0, 1.0, 1.0)


def record(kind, name, topic=None, box=HERE):
    tool = topic if kind in (STATE, LOCATION) else None
    return Record(vocabulary.ask(kind, topic), name, box, kind, tool, "labels.txt:1")


def frame(*records):
    return Frame("seq_2/frame000", "seq_2", Path("frame000.png"), 1280, 1024, records)
