"""stream.py: exact turns, whole epochs, going on from any number, and no silence where a worker has died."""

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery_r1_jax import errors, options, plan, stream
from surgery_r1_jax.plan import Row, Size

pytestmark = pytest.mark.survival


def planned(lengths, frames=4, most=3, weights=(1.0,)):
    """A plan for rows of one branch, whose lengths are given for each source; rows are numbered through."""
    rows, at = [], 0
    for source in lengths:
        rows.append([Row(at + i, (0,)) for i in range(len(source))])
        at += len(source)
    sizes = [[Size(1, 8, (length,)) for length in source] for source in lengths]
    return plan.make(rows, sizes, plan.PACKED, weights=weights, frames=frames, most=most, window_tokens=1)


def batches_of(found, seed=0, example=None, **more):
    """A stream whose examples are the numbers of the row, of its place, and of its shape's lane."""
    settings = options.Data(root="data", **{"frames": found.frames, **more})
    example = example or (lambda row, shape, place: np.array([row.frame, place, shape.lane_tokens]))
    return stream.Stream(found, example, settings, seed)


def drawn(batches, count):
    """The rows of the first batches, in their order."""
    return [int(frame) for number in range(count) for frame in batches[number][:, 0]]


# Turns


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=6), st.integers(0, 10**12))
def test_turns_are_shared_out_exactly_and_evenly(shares, start):
    turns, whole = stream.Turns(tuple(shares)), sum(shares)
    for number in range(start, start + 20):
        part, before = turns[number]
        # Nobody is ever a turn for each other part away from the fair share.
        assert abs(Fraction(number * shares[part], whole) - before) < len(shares)
        assert turns[number + whole] == (part, before + shares[part])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_every_part_counts_its_turns_through(shares):
    turns, counts = stream.Turns(tuple(shares)), Counter()
    for number in range(3 * sum(shares)):
        part, before = turns[number]
        assert before == counts[part]
        counts[part] += 1
    assert [counts[part] for part in range(len(shares))] == [3 * share for share in shares]


# Epochs


@pytest.mark.parametrize("rows", [120, 118])
def test_epochs_over_buckets_have_every_row_once_shuffled_over_the_edge(rows):
    lengths = np.random.default_rng(1).integers(1, 100, rows)
    found = planned([lengths.tolist()])
    batches = batches_of(found, seed=5)
    assert len(found.buckets) == 3
    seen = drawn(batches, int(2.5 * rows / 4))
    if rows % 4 == 0:  # whole batches: 2.5 epochs to the row
        counts = [Counter(seen[:rows]), Counter(seen[rows : 2 * rows]), Counter(seen[2 * rows :])]
        assert counts[0] == counts[1] == Counter(range(rows)) and max(counts[2].values()) == 1
        assert seen[:rows] != seen[rows : 2 * rows]
    for bucket in found.buckets:  # and of each bucket's rows, where a batch lies in two epochs
        members = {row.frame for (row_list,) in [bucket.rows] for row in row_list}
        own = [row for row in seen if row in members]
        for at in range(0, len(own), len(members)):
            epoch = Counter(own[at : at + len(members)])
            assert max(epoch.values()) == 1 and (sum(epoch.values()) < len(members) or epoch.keys() == members)
    shapes = {lane: {int(f) for f in b[:, 0]} for b in map(batches.__getitem__, range(30)) for lane in b[:1, 2]}
    assert all(len({lane for lane in batches[number][:, 2]}) == 1 for number in range(30)) and len(shapes) == 3


def test_weights_are_kept_in_the_long_run_and_rows_of_a_source_come_equally_often():
    rng = np.random.default_rng(2)
    found = planned([rng.integers(1, 100, n).tolist() for n in (30, 90, 7)], weights=(2.0, 1.0, 0.5))
    assert len(found.buckets) == 3
    counts = Counter(drawn(batches_of(found, seed=1), 120))
    total, start = sum(counts.values()), 0
    for size, share in ((30, 2 / 3.5), (90, 1 / 3.5), (7, 0.5 / 3.5)):
        of_source = [counts[row] for row in range(start, start + size)]
        assert sum(of_source) / total == pytest.approx(share, abs=0.02)
        assert max(of_source) - min(of_source) <= 2, "an epoch of every part has each of its rows once"
        start += size


def test_a_place_is_counted_through_all_batches_and_processes():
    found, whole = planned([[5] * 12]), []
    for index in range(2):
        settings = options.Data(root="data", frames=4)
        part = stream.Stream(found, lambda row, shape, place: np.array([place]), settings, 0, stream.Shard(index, 2))
        whole.append([part[number][:, 0].tolist() for number in range(3)])
    assert [a + b for a, b in zip(*whole, strict=True)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


# Ahead


def test_two_batches_are_placed_before_they_are_asked_for():
    placed = []
    with batches_of(planned([[5] * 12])).starting(0, lambda batch: placed.append(1) or batch) as ready:
        next(ready)
        wait_until(lambda: len(placed) == 3)
        time.sleep(0.3)
        assert len(placed) == 3
        next(ready)
        wait_until(lambda: len(placed) == 4)


def test_closing_ends_the_thread_and_what_it_raises_is_raised_in_the_loop():
    def fails(row, shape, place):
        if place == 9:
            raise ZeroDivisionError("place 9")
        return np.array([row.frame])

    before = threading.active_count()
    with batches_of(planned([[5] * 12]), example=fails).starting() as ready:
        for _ in range(2):
            next(ready)
        with pytest.raises(ZeroDivisionError, match="place 9"):
            next(ready)
        with pytest.raises(StopIteration):
            next(ready)
    with batches_of(planned([[5] * 12])).starting(), pytest.raises(KeyError):
        raise KeyError
    wait_until(lambda: threading.active_count() <= before)


def wait_until(true):
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


# Worker processes


def workers():
    return [child for child in multiprocessing.active_children() if child.name.startswith("grain-process-prefetch")]


def test_a_killed_worker_ends_the_run_with_one_line_and_nothing_is_missing_after_it():
    found = planned([[5] * 12])
    alone = batches_of(found)
    with batches_of(found, workers=1).starting() as ready:
        taken = [next(ready)]
        (worker,) = workers()
        os.kill(worker.pid, signal.SIGKILL)
        since = time.monotonic()
        with pytest.raises(errors.InputError) as refusal:
            while True:
                taken.append(next(ready))
        assert time.monotonic() - since < 20
    message = str(refusal.value)
    assert f"data worker process {worker.pid} was killed by SIGKILL" in message and "\n" not in message
    assert not workers()
    with alone.starting(len(taken)) as rest:
        seen = [*taken, *(next(rest) for _ in range(6))]
    for number, found in enumerate(seen):
        np.testing.assert_array_equal(found, alone[number])


def test_a_stop_signal_to_all_of_a_group_leaves_the_run_its_batches_until_it_ends():
    with batches_of(planned([[5] * 12]), workers=1).starting() as ready:
        next(ready)
        (worker,) = workers()
        os.kill(worker.pid, signal.SIGTERM)
        for _ in range(20):  # more than were ready
            next(ready)
        assert worker.is_alive()
    assert not workers()


@pytest.mark.skipif(not os.path.isfile("/proc/self/maps"), reason="Linux tells there what shared memory is held")
def test_an_end_in_the_middle_frees_the_shared_memory_that_is_held():
    def held():
        return set(re.findall(r"/dev/shm/psm_\w+", Path("/proc/self/maps").read_text()))

    before = held()  # of a killed worker the last block may be there until the program ends
    with batches_of(planned([[5] * 12]), workers=2).starting() as ready:
        next(ready)
        time.sleep(1)  # others are ready by now
        blocks = held() - before
        assert blocks
    limit = time.monotonic() + 10
    while any(map(os.path.exists, blocks)) and time.monotonic() < limit:  # threads of Grain's let go of it
        gc.collect()
        time.sleep(0.05)
    assert not [block for block in blocks if os.path.exists(block)]


def test_a_worker_that_nobody_saw_alive_is_missed(tmp_path):
    class Silent:
        """As Grain's iterator when a worker has ended in peace."""

        def __init__(self):
            self.close = threading.Event().set

        def __iter__(self):
            return iter(threading.Event().wait, None)

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "on").mkdir()
    (tmp_path / "on" / str(ended.pid)).touch()
    refused = pytest.raises(errors.InputError, match=f"data worker process {ended.pid} ended by itself, often")
    with stream.Ahead(Silent(), lambda made: made, tmp_path / "on") as ready, refused:
        next(ready)
    assert not (tmp_path / "on").exists()


def test_a_worker_that_ends_in_peace_ends_the_run_too():
    """Grain itself would wait for ever."""

    def leaves(row, shape, place):
        if place == 4:
            os._exit(0)
        return np.array([row.frame])

    ending = pytest.raises(errors.InputError, match=r"data worker process \d+ ended by itself")
    with batches_of(planned([[5] * 12]), example=leaves, workers=1).starting() as ready, ending:
        for _ in range(2):  # what it made before may be lost with it
            next(ready)
    assert not workers()
