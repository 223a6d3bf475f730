"""What the C library's allocator does with freed memory."""

import ctypes
import subprocess
import sys

import jax.numpy as jnp
import pytest

from surgery_r1_jax import heap, optim, saves

MEGABYTE = 1 << 20
# Of what is freed every sixteenth kilobyte stays: what lies free at the end would go by itself.
PROGRAM = """
import os
from pathlib import Path
from surgery_r1_jax import heap
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
blocks = [bytes([1]) * 1000 for _ in range(64_000)]
full = resident()
blocks = blocks[::16]
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library has no malloc_trim")
def test_free_pages_go_back_to_the_system_and_only_when_told():
    code = PROGRAM + "print(full, resident()); heap.give_back(); print(resident())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    full, freed, after = map(int, done.stdout.split())
    assert full - freed < MEGABYTE
    assert freed - after > 30 * MEGABYTE


@pytest.mark.parametrize("call", [heap.keep, heap.give_back])
def test_another_c_library_is_left_alone(monkeypatch, call):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    call()


def test_memory_is_given_back_after_each_save(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(heap, "give_back", lambda: given.append(checkpoints.latest()))
    checkpoints = saves.Checkpoints(tmp_path)
    fields = dict.fromkeys(optim.TrainState._fields, jnp.zeros(())) | {"params": {"kernel": jnp.zeros(3)}}
    for step in (1, 2):
        checkpoints.save(step, optim.TrainState(**fields), {})
    checkpoints.close()
    assert given == [1, 2]
