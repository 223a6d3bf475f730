"""What one split gives away of another: a sequence in both, the same picture, one that looks the same."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from surgery_r1_jax import likeness, records
from surgery_r1_jax.labels import Problem
from surgery_r1_jax.records import Frame


class Pairs(NamedTuple):
    """Ids of frames of two splits that show the same."""

    equal: tuple[tuple[str, str], ...]  # the same image file, byte for byte
    near: tuple[tuple[str, str, int], ...]  # alike, and the bits of 64 that tell their fingerprints apart
    problems: tuple[Problem, ...]


def sequences(splits: Mapping[str, Sequence[Frame]]) -> list[Problem]:
    """Sequences in two splits: each shows one operation, so that what is learned of it here is no test there."""
    owner: dict[str, str] = {}
    problems: dict[str, Problem] = {}
    for name, members in splits.items():
        for frame in members:
            if frame.sequence == "all":  # the table names no sequences
                continue
            if (other := owner.setdefault(frame.sequence, name)) != name:
                reason = f"sequence {frame.sequence} is in split {other} and in {name}; keep it in one of them"
                problems.setdefault(frame.sequence, Problem("error", str(frame.image), reason, str(frame.image)))
    return list(problems.values())


def pictures(splits: Mapping[str, Sequence[Frame]], prints: Mapping[str, int | None]) -> Pairs:
    """The pictures of one split that another has too; `prints` are fingerprints by image file."""
    equal, near, problems = [], [], []
    for (name, ours), (_, theirs) in itertools.combinations(splits.items(), 2):
        files = {frame.id: str(frame.image) for frame in (*ours, *theirs)}
        same = records.content_overlaps(ours, theirs)
        sides = ([prints[str(frame.image)] for frame in side] for side in (ours, theirs))
        alike = [(ours[our].id, theirs[their].id, bits) for our, their, bits in likeness.nearest(*sides)]
        alike = [(our, their, bits) for our, their, bits in alike if (our, their) not in same]
        equal += same
        near += alike
        for our, their in same:
            reason = f"the same image as {files[our]}, which is in split {name}; drop one"
            problems.append(Problem("error", files[their], reason, files[their]))
        for our, their, bits in alike:
            reason = f"looks like {files[our]}, which is in split {name}: {bits} of 64 bits differ; see whether it is"
            problems.append(Problem("warning", files[their], reason, files[their]))
    return Pairs(tuple(equal), tuple(near), tuple(problems))
