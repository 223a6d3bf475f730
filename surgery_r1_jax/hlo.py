"""What the text of a compiled program tells: what its devices send each other, and stacks of layers held whole.

The text is the compiler's (`jax.stages.Compiled.as_text`), after sharding: all shapes in it are those of one device.
"""

import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_BITS = {"pred": 8, "bf16": 16}  # of other types the first number in their name: f32, s4, f8e4m3fn
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LOOP = re.compile(r" while\(.*\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)")
_NUMBER = re.compile(r"%([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_ELEMENT = re.compile(r"%([\w.\-]+) = [su]\d+\[\]\S* get-tuple-element\(.*index=(\d+)")
_SUM = re.compile(r" add\(%([\w.\-]+), %([\w.\-]+)\)")


class Sent(NamedTuple):
    """All collectives of one kind in one run of a program."""

    count: int
    bytes: int  # of their results on one device


class Stack(NamedTuple):
    """A matrix of every layer, one array."""

    layers: tuple[int, ...]  # how many of them a program takes together: all, or those of a group
    whole: tuple[int, ...]  # shape of a layer's matrix
    own: tuple[int, ...]  # of the part of it that lives on a device


def collectives(text: str) -> dict[str, Sent]:
    """What the devices send each other, by kind.

    The body of a loop counts as often as it is run: as the compiler notes, or else as often as its counter needs to the
    bound that it is compared with, which is the most that a loop which may stop early is run.
    """
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            entry = name if header[1] else entry
            computations[name] = []
        elif name:
            computations[name].append(line)
    times_run = Counter()  # of every instruction that sends: its kind, bytes and channel, and where it stands

    def run(name: str, times: int) -> None:
        for number, line in enumerate(computations[name]):
            if found := _COLLECTIVE.search(line):
                channel = mark[1] if (mark := _CHANNEL.search(line)) else f"{name}:{number}"
                transfer = found[2], _result_bytes(found[1], started=bool(found[3])), channel
                times_run[transfer, name, number] += times
            called = _CALLED.findall(line) + [
                n.strip(" %") for names in _BRANCHES.findall(line) for n in names.split(",")
            ]
            rounds = _rounds(line, computations) if called else 1
            for each in called:
                run(each, times * rounds)

    run(entry, 1)
    times_sent: dict[tuple, int] = {}
    for (transfer, *_), times in times_run.items():
        # What is hidden behind other work, the rounds of a loop even, has its channel in every instruction of it.
        times_sent[transfer] = min(times, times_sent.get(transfer, times))
    counts, volume = Counter(), Counter()
    for (kind, size, _), times in times_sent.items():
        counts[kind] += times
        volume[kind] += times * size
    return {kind: Sent(counts[kind], volume[kind]) for kind in KINDS if counts[kind]}


def whole_stacks(text: str, stacks: Mapping[str, Stack]) -> dict[str, tuple[int, ...]]:
    """Stacks of which a device at some time holds several layers with more than its own share of each.

    Returns the shape of such an array for each stack that has one. It is known by its shape alone, whatever the
    operation is called that makes it and however the axes behind the layers are ordered or joined; so extents must be
    told apart: an activation of just such a shape would be taken for one.
    """
    plain = lambda axes: tuple(n for n in axes if n > 1)  # noqa: E731
    arrays = {plain(map(int, dims.split(","))) for _, dims in _ARRAY.findall(text) if dims}
    for stack in stacks.values():  # one matrix, gathered, may look like another's share
        arrays = {dims for dims in arrays if not _several(dims, stack.layers, plain(stack.own))}
    found = {}
    for name, (layers, whole, own) in stacks.items():
        wider = {plain(axes) for axes in itertools.product(*zip(own, whole, strict=True))} - {plain(own)}
        for dims in sorted(arrays):
            if any(_several(dims, layers, axes) for axes in wider):
                found[name] = dims
                break
    return found


def _rounds(line: str, computations: Mapping[str, Sequence[str]]) -> int:
    """How often an instruction runs what it calls."""
    if noted := _ROUNDS.search(line):
        return int(noted[1])
    if not (loop := _LOOP.search(line)):
        return 1
    condition, body = ("\n".join(computations[name]) for name in loop.groups())
    counter = {index for _, index in _ELEMENT.findall(condition)}
    bound = max((int(n) for _, n in _NUMBER.findall(condition)), default=1)
    counters = {name for name, index in _ELEMENT.findall(body) if index in counter}
    numbers = dict(_NUMBER.findall(body))
    steps = [int(numbers[by]) for name, by in _SUM.findall(body) if name in counters and by in numbers]
    return -(-bound // max(steps, default=1))


def _several(dims: tuple[int, ...], layers: tuple[int, ...], axes: tuple[int, ...]) -> bool:
    """Whether an array is so many layers of a matrix with these axes."""
    leading = itertools.accumulate(dims, operator.mul)
    return any(n in layers and _same_axes(dims[at:], axes) for at, n in enumerate(leading, start=1))


def _same_axes(dims: tuple[int, ...], axes: tuple[int, ...]) -> bool:
    """Whether `dims` are these axes, in any order, some of them joined."""
    if math.prod(dims) != math.prod(axes):
        return False
    if not dims:
        return True
    rest = range(len(axes))
    for count in range(1, len(axes) + 1):
        for chosen in itertools.combinations(rest, count):
            if math.prod(axes[i] for i in chosen) == dims[0]:
                left = tuple(axes[i] for i in rest if i not in chosen)
                if _same_axes(dims[1:], left):
                    return True
    return False


def _result_bytes(types: str, *, started: bool) -> int:
    """Bytes of a result; what starts a transfer names its operands before its results."""
    sizes = [_bytes(dtype, dims) for dtype, dims in _ARRAY.findall(types)]
    return max(sizes, default=0) if started else sum(sizes)


def _bytes(dtype: str, dims: str) -> int:
    bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8
