"""A run's log survives kills and resumes, stays plain JSON, and never lets model text steer the terminal."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from surgery_r1_jax import log
from surgery_r1_jax.errors import InputError


def screen(*, terminal=False, width=100):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def shown(console):
    return console.file.getvalue()


def run(directory, first, last, *, console=None, **options):
    """Steps first..last of a made-up run, with an evaluation and a completion every fifth."""
    console = console or screen()
    with log.RunLog(directory, total_steps=20, console=console, **options) as run_log:
        for step in range(first, last + 1):
            run_log.metrics(step, {"loss": np.float32(1 / step), "rewards/iou/mean": 0.5, "num_tokens": step})
            if step % 5 == 0:
                run_log.metrics(step, {"accuracy": 0.5}, split="dev")
                run_log.table(step, [{"question": "q", "completion": f"c{step}", "reward": 0.25}])
    return console


def without_time(path):
    return [{k: v for k, v in row.items() if k != "elapsed_s"} for row in log.read_metrics(path)]


def test_every_line_is_one_json_object_under_the_names_of_the_caller(tmp_path):
    run(tmp_path, 1, 5)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert list(first) == ["step", "split", "elapsed_s", "loss", "rewards/iou/mean", "num_tokens"]
    assert (first["step"], first["split"], first["loss"], first["num_tokens"]) == (1, "train", 1.0, 1)
    assert (last["step"], last["split"], last["accuracy"]) == (5, "dev", 0.5)
    assert [json.loads(line)["elapsed_s"] for line in lines] == sorted(json.loads(line)["elapsed_s"] for line in lines)
    assert log.read_metrics(tmp_path / "completions.jsonl") == [
        {"step": 5, "question": "q", "completion": "c5", "reward": 0.25}
    ]


def test_numbers_that_are_not_finite_become_null_and_other_values_are_bugs(tmp_path):
    with log.RunLog(tmp_path, total_steps=2, console=screen()) as run_log:
        values = {"a": float("nan"), "b": np.float32("inf"), "c": -np.inf, "d": np.float64(0.1), "e": np.int32(7)}
        run_log.metrics(1, values)
        with pytest.raises(TypeError, match="a metric is a number"):
            run_log.metrics(2, {"a": "0.1"})
        with pytest.raises(ValueError, match="may not be called"):
            run_log.metrics(2, {"split": 1.0})
    (row,) = log.read_metrics(tmp_path / "metrics.jsonl")
    assert [row[name] for name in "abcde"] == [None, None, None, 0.1, 7]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("resume_step", [-1, 0, 4, 5, 10, 13])
@pytest.mark.parametrize("tail", [b"", b'{"step": 14, "split": "tr'])
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path, resume_step, tail):
    run(tmp_path / "whole", 1, 20)
    run(tmp_path / "cut", 1, 13)
    for name in ("metrics", "completions", "sessions"):
        with open(tmp_path / "cut" / f"{name}.jsonl", "ab") as file:
            file.write(tail)
    run(tmp_path / "cut", max(resume_step, 0) + 1, 20, resume_step=resume_step)
    for name in ("metrics", "completions"):
        whole, cut = tmp_path / "whole" / f"{name}.jsonl", tmp_path / "cut" / f"{name}.jsonl"
        assert without_time(cut) == without_time(whole)
        assert not list((tmp_path / "cut").glob("*.part"))
    assert len(log.read_metrics(tmp_path / "cut" / "sessions.jsonl")) == 2
    times = [row["elapsed_s"] for row in log.read_metrics(tmp_path / "cut" / "metrics.jsonl")]
    assert times == sorted(times)


def test_a_log_is_never_overwritten_by_a_new_run(tmp_path):
    run(tmp_path, 1, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="this run exists already; add --resume"):
        run(tmp_path, 1, 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def clock(monkeypatch):
    """Seconds on the wall, to be moved on by hand."""
    clock = types.SimpleNamespace(now=1_700_000_000.0)
    for name in ("time", "monotonic"):
        monkeypatch.setattr(log.time, name, lambda: clock.now)
    return clock


def work(directory, clock, first, last, *, resume_step=None, save_every=99):
    """A session that compiles for 40 s, takes 10 s a step and 5 s a save, and 3 s more before it is killed."""
    with log.RunLog(directory, total_steps=9, resume_step=resume_step, console=screen()) as run_log:
        clock.now += 40
        for step in range(first, last + 1):
            clock.now += 10
            run_log.metrics(step, {"loss": 1.0})
            if step % save_every == 0:
                with run_log.saving(step):
                    clock.now += 5
    clock.now += 3


def told(directory):
    """Seconds in the run, lost and down, of each session."""
    rows = log.read_metrics(directory / "sessions.jsonl")
    return [(row["elapsed_s"], row["lost_s"], row["down_s"]) for row in rows]


@pytest.mark.survival
def test_work_lost_and_down_time_add_up_to_the_time_on_the_wall(tmp_path, clock):
    start = clock.now
    # first step, last step, resumed step, seconds before the session
    for first, last, resume_step, down_s in [(1, 5, None, 0), (3, 6, 2, 200), (7, 9, 6, 70), (5, 5, 4, 1)]:
        clock.now += down_s
        work(tmp_path, clock, first, last, resume_step=resume_step, save_every=2)
    for file in tmp_path.iterdir():
        os.utime(file, (0, 0))  # a copy of a run tells no times of files
    sessions = log.read_metrics(tmp_path / "sessions.jsonl")
    assert [row["step"] for row in sessions] == [0, 2, 6, 4]
    assert [row["elapsed_s"] for row in sessions] == [0, 65, 155, 130]  # the save that is gone on from is not lost
    assert [row["lost_s"] for row in sessions] == [0, 35, 0, 100]
    assert [row["down_s"] for row in sessions] == [0, 203, 73, 4]
    saves = log.read_metrics(tmp_path / "saves.jsonl")
    assert [tuple(row.values()) for row in saves] == [(2, 65, 5), (4, 130, 5)]
    in_run = log.read_metrics(tmp_path / "metrics.jsonl")[-1]["elapsed_s"]
    assert in_run + sum(row["lost_s"] + row["down_s"] for row in sessions) == clock.now - start - 3


def test_a_session_that_logs_nothing_is_down_time(tmp_path, clock):
    work(tmp_path, clock, 1, 3, save_every=2)
    for _ in range(2):
        work(tmp_path, clock, 1, 0, resume_step=2)  # killed while it compiles
    assert told(tmp_path) == [(0, 0, 0), (65, 10, 3), (65, 0, 43)]


def test_what_was_done_before_a_first_checkpoint_is_lost_when_a_run_is_begun_anew(tmp_path, clock):
    work(tmp_path, clock, 1, 3)
    for _ in range(2):  # the first restart is killed before it opens the log
        clock.now += 30
        log.put_away(tmp_path)
    work(tmp_path, clock, 1, 9)
    assert told(tmp_path) == [(0, 0, 0), (0, 70, 63)]
    assert [row["step"] for row in log.read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 10))
    assert not (tmp_path / "unsaved.jsonl").exists()


def test_a_killed_process_loses_at_most_the_line_it_was_writing(tmp_path):
    code = f"""
from surgery_r1_jax import log
with log.RunLog({str(tmp_path)!r}, total_steps=10**9) as run_log:
    for step in range(1, 10**9):
        run_log.metrics(step, {{"loss": 1.0}})
        print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    said = [process.stdout.readline() for _ in range(50)]
    os.kill(process.pid, signal.SIGKILL)
    said += process.stdout.read().splitlines()
    process.wait()
    process.stdout.close()
    last = int(said[-1])
    steps = [row["step"] for row in log.read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) in (last, last + 1)


def test_reading_skips_a_half_line_and_refuses_a_broken_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"ste')
    assert log.read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_bytes(b"")
    assert log.read_metrics(path) == []
    for broken in (b'{"step": \n', b"[1]\n", b"{}\n", b"\xff\n", b"\0\0\0\n"):
        path.write_bytes(b'{"step": 1}\n' + broken + b'{"step": 2}\n')
        with pytest.raises(InputError, match=r"metrics\.jsonl:2: not a line of a run's log"):
            log.read_metrics(path)
    with pytest.raises(InputError, match="no such file"):
        log.read_metrics(tmp_path / "none.jsonl")


def test_only_the_first_process_writes(tmp_path):
    console = run(tmp_path / "run", 1, 5, enabled=False)
    assert not (tmp_path / "run").exists()
    assert shown(console) == ""


def test_where_there_is_no_terminal_lines_come_by_the_clock(tmp_path):
    console = run(tmp_path, 1, 20, plain_every_s=3600, description="sft")
    lines = [line for line in shown(console).splitlines() if line.startswith("sft")]
    assert len(lines) == 6  # the first, the last and four evaluations
    assert lines[0] == "sft 1/20 | loss 1"
    assert lines[1] == "sft 5/20 dev | accuracy 0.5"
    assert re.fullmatch(r"sft 20/20 \| [0-9.]+ steps/s \| 0:00:00 left \| loss 0\.05", lines[-2])
    assert "\x1b" not in shown(console)


def test_a_terminal_gets_a_bar_with_step_rate_time_left_and_metrics(tmp_path):
    console = run(tmp_path, 1, 20, console=screen(terminal=True), description="grpo")
    assert re.search(r"grpo .* 20/20 [0-9.]+ steps/s \| 0:00:00 left \| loss 0\.05", shown(console))
    assert shown(console).endswith("\x1b[?25h")  # the cursor is back


def test_the_rate_starts_at_the_first_line_of_the_session(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    console = screen()
    with log.RunLog(tmp_path, total_steps=10, console=console, plain_every_s=0) as run_log:
        now[0] = 100.0  # a long compilation
        run_log.metrics(1, {"loss": 1.0})
        now[0] = 106.0
        run_log.metrics(4, {"loss": 1.0})
    assert "train 4/10 | 2.0 s/step | 0:00:12 left | loss 1" in shown(console)


def test_the_line_tells_rates_where_they_are_known(tmp_path):
    console = screen()
    with log.RunLog(tmp_path, total_steps=10, console=console, plain_every_s=0) as run_log:
        run_log.metrics(1, {"loss": 1.0, "speed/tokens_per_s": 51234.5, "speed/mfu": 0.414, "time/update": 0.9})
        run_log.metrics(2, {"loss": 1.0, "speed/tokens_per_s": 51234.5})
    assert "1/10 | 51,234 tokens/s | MFU 41% | loss 1" in shown(console)
    assert re.search(r"2/10 \| .* left \| 51,234 tokens/s \| loss 1", shown(console))


def test_markup_and_control_characters_of_model_text_are_shown_not_obeyed(tmp_path):
    hostile = "[bold red]x[/bold red] \x1b[31m\x07\x9b2J\r\n\u202eab\u200b \ud800 [/nothing]"
    console = screen(terminal=True, width=400)
    with log.RunLog(tmp_path, total_steps=1, console=console) as run_log:
        run_log.table(1, [{"completion": hostile, "reward": 1.0}, {"completion": "b", "rewards/[i]": None}])
        run_log.say(hostile)
        run_log.metrics(1, {"loss": 1.0})
    text = r"[bold red]x[/bold red] \x1b[31m\x07\x9b2J\r\n\u202eab\u200b \ud800 [/nothing]"
    assert shown(console).count(text) == 2
    assert "rewards/[i]" in shown(console)
    assert not {"\x07", "\x9b", "\u202e", "\u200b", "\ud800"} & set(shown(console))
    first, second = log.read_metrics(tmp_path / "completions.jsonl")
    assert first["completion"] == hostile
    assert "reward" not in second
    assert (tmp_path / "completions.jsonl").read_bytes().isascii()


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.characters(), max_size=50), encoding=st.sampled_from(["utf-8", "ascii", "latin-1"]))
def test_any_text_is_printable_on_any_terminal(tmp_path_factory, text, encoding):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    console = Console(file=file, width=200, color_system=None)
    directory = tmp_path_factory.mktemp("run")
    with log.RunLog(directory, total_steps=1, console=console) as run_log:
        run_log.say(text)
        run_log.table(1, [{"completion": text}])
    file.flush()
    printed = file.buffer.getvalue().decode(encoding)
    assert all(c in "\n " or c.isprintable() for c in printed)
    assert log.read_metrics(directory / "completions.jsonl")[0]["completion"] == text


def test_a_long_completion_is_cut_on_the_screen_only(tmp_path):
    console = screen()
    with log.RunLog(tmp_path, total_steps=1, console=console) as run_log:
        run_log.table(1, [{"completion": "x" * 5000}])
    assert shown(console).count("x") == log.MAX_CELL
    assert "(5000 characters)" in shown(console)
    assert len(log.read_metrics(tmp_path / "completions.jsonl")[0]["completion"]) == 5000


def test_tensorboard_without_its_package_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match=r"pip install 'surgery-r1-jax\[tensorboard\]'"):
        log.RunLog(tmp_path, total_steps=1, tensorboard=True)
    assert not list(tmp_path.iterdir())


def test_tensorboard_receives_every_finite_number(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, **options):
            calls.append((folder, options["purge_step"]))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", type(sys)("tensorboardX"))
    sys.modules["tensorboardX"].SummaryWriter = SummaryWriter
    run_log = log.RunLog(tmp_path, total_steps=9, resume_step=4, tensorboard=True, console=screen())
    with run_log:
        run_log.metrics(5, {"loss": 0.5, "kl": float("nan")})
    assert calls == [(str(tmp_path / "tensorboard"), 5), ("train/loss", 0.5, 5), "closed"]


def test_the_real_tensorboard_writer_takes_the_same_calls(tmp_path, monkeypatch):
    if "torch" not in sys.modules:
        monkeypatch.setitem(sys.modules, "torch", None)  # it would import torch, which takes seconds
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    run(tmp_path, 1, 2, tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/rewards/iou/mean" in events.read_bytes()
