"""What a run says while it works: metrics, sampled completions, a progress bar, optionally TensorBoard.

A run directory receives four files with one JSON object per line:

    metrics.jsonl      step, split, elapsed_s and the numbers of that step under the caller's names
    completions.jsonl  step and one sampled completion with its rewards
    saves.jsonl        one line per checkpoint: step, elapsed_s once it was whole, seconds that it took
    sessions.jsonl     one line per start: started_unix, step, elapsed_s, lost_s, down_s

A number that is not finite is written as null, so that every line is plain JSON. Each line is handed to the
system at once: a killed process loses at most the line it was writing. On a resume the lines past the restored
step go, and the files read as if the run had never stopped, provided that a step is logged before its checkpoint
is saved.

Lost time: `elapsed_s` counts the work that is in the run, compiling and saving included; `lost_s` the work that a
resume threw away, from the checkpoint it went on from to the last line; `down_s` the time from there until the log was
opened again, starting up included. Together they are the time on the wall since the log was first opened. What a
killed session did after its last line nobody knows: it counts as down.
"""

import contextlib
import datetime
import json
import math
import operator
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from surgery_r1_jax import places
from surgery_r1_jax.errors import InputError, StorageError, naming, printable

LIVE = (
    "loss",
    "reward",
    "kl",
    "accuracy",
    "miou",
    "grad_norm",
)  # shown beside the bar, the first few present
MAX_LIVE = 4
FILES = ("metrics", "completions", "saves", "sessions")
UNSAVED = "unsaved"  # metrics of a run that is begun anew, until the next session has counted them as lost
KEEP_EVERY_S = 30.0  # a bucket gets the log at least so often, if anything is logged
RATES = {"speed/tokens_per_s": "{:,.0f} tokens/s", "speed/mfu": "MFU {:.0%}"}  # shown behind the pace
MAX_CELL = 600  # characters of a completion shown in the terminal; the file holds all of it


class RunLog:
    """The log of one run; a context manager.

    resume_step: None for a new run, which refuses a directory that holds a log; else the lines of later steps
        are dropped (-1 drops all).
    enabled: False on every process but the first, where each call does nothing.
    plain_every_s: seconds between progress lines where standard error is no terminal.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        total_steps: int,
        description: str = "train",
        resume_step: int | None = None,
        enabled: bool = True,
        tensorboard: bool = False,
        plain_every_s: float = 30.0,
        console: Console | None = None,
    ):
        self.directory = places.place(directory)
        self.total_steps = total_steps
        self.description = description
        self.resume_step = resume_step
        self.enabled = enabled
        self.plain_every_s = plain_every_s
        self.console = console or Console(stderr=True, highlight=False)
        self._writer_class = _tensorboard_writer() if tensorboard else None

    def __enter__(self) -> "RunLog":
        if not self.enabled:
            return self
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *about) -> None:
        if self.enabled:
            self._stack.__exit__(*about)

    def metrics(self, step: int, values: Mapping[str, Any], split: str = "train") -> None:
        """Write the numbers of a step (scalars of any library); those of "train" move the progress bar."""
        if not self.enabled:
            return
        numbers = {name: _number(value) for name, value in values.items()}
        line = {"step": step, "split": split, "elapsed_s": round(self._elapsed_s(), 3)}
        if clash := line.keys() & numbers.keys():
            raise ValueError(f"metrics may not be called {sorted(clash)}")
        _append(self._metrics_file, line | numbers)
        if self._writer:
            for name, number in numbers.items():
                if number is not None:
                    self._writer.add_scalar(f"{split}/{name}", number, step)
        self._show(step, numbers, split)
        if self._mirror and time.monotonic() >= self._next_keep_s:
            self.keep()

    def keep(self) -> None:
        """See that what was logged is where the checkpoints are; to be called before one is saved.

        A run folder on a bucket gets its log at such times, and at the end, for objects cannot be appended to. A
        bucket that is out of reach gets it the next time; only at the end of a run is that an error.
        """
        if self.enabled and self._mirror:
            try:
                self._mirror.put()
            except StorageError as problem:
                self.say(f"the log follows later: {problem}")
            self._next_keep_s = time.monotonic() + KEEP_EVERY_S

    def _keep_last(self, kind: type[BaseException] | None, *_: object) -> None:
        """`keep`, at the end: raises StorageError, unless something else ends the run."""
        try:
            self._mirror.put()
        except StorageError as problem:
            if kind is None:
                raise
            self.say(f"the end of the log is lost: {problem}")

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """While a checkpoint is saved: `keep`, and a line of `saves.jsonl` once it is whole."""
        self.keep()
        began = time.monotonic()
        yield
        if self.enabled:
            took = {"elapsed_s": round(self._elapsed_s(), 3), "seconds": round(time.monotonic() - began, 3)}
            _append(self._saves_file, {"step": step} | took)

    def table(self, step: int, rows: Sequence[Mapping[str, Any]], title: str = "completions") -> None:
        """Print sampled completions with their rewards, a dict each, and append them to `completions.jsonl`."""
        if not self.enabled or not rows:
            return
        name = self._safe(f"{title}, step {step}")
        table = Table(title=Text(name), title_justify="left", show_header=False, show_lines=True)
        table.add_column("text", overflow="fold")
        table.add_column("numbers", no_wrap=True)
        for row in rows:
            plain = {name: v if isinstance(v, str) else _number(v) for name, v in row.items()}
            _append(self._completions_file, {"step": step} | plain)
            texts = {name: value for name, value in plain.items() if isinstance(value, str)}
            numbers = {name: value for name, value in plain.items() if name not in texts}
            table.add_row(self._block(texts), self._block(numbers))
        self.console.print(table)

    def _block(self, cells: Mapping[str, Any]) -> Text:
        """Names and values, a line each, the values lined up."""
        width = max(map(len, cells), default=0)
        lines = (self._safe(f"{name:{width}}  {_cell(value)}") for name, value in cells.items())
        return Text("\n").join(map(Text, lines))

    def say(self, text: str) -> None:
        """Print one line above the progress bar."""
        if self.enabled:
            self.console.print(Text(self._safe(text)), soft_wrap=True)

    def _open(self, stack: ExitStack) -> None:
        """Mend or make the files, note the start of a session, show the bar."""
        step = max(self.resume_step or 0, 0)
        self._here, self._mirror, self._next_keep_s = self.directory, None, 0.0
        if places.remote(self.directory):
            self._here = stack.enter_context(places.scratch())
            self._mirror = places.Mirror(self._here, self.directory)
            self._mirror.bring(f"{name}.jsonl" for name in (*FILES, UNSAVED))
            stack.push(self._keep_last)
        self._here.mkdir(parents=True, exist_ok=True)
        kept_s, lost_s, down_s = self._mend()
        self._started, self._kept_s = time.monotonic(), kept_s
        self._first: tuple[int, float] | None = None  # step and time of this session's first line
        self._next_plain_s = 0.0
        session = {"started_unix": time.time(), "step": step, "elapsed_s": kept_s, "lost_s": lost_s}
        with self._file("sessions") as sessions:
            _append(sessions, session | {"down_s": down_s})
        self._metrics_file = stack.enter_context(self._file("metrics"))
        self._completions_file = stack.enter_context(self._file("completions"))
        self._saves_file = stack.enter_context(self._file("saves"))
        self._writer = None
        if self._writer_class:
            folder = str(self._here / "tensorboard")
            self._writer = self._writer_class(folder, purge_step=step + 1 if step else None, flush_secs=10)
            stack.callback(self._writer.close)
        self._progress: Progress | None = None
        if self.console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn()
            status = TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True))
            self._progress = stack.enter_context(Progress(*columns, status, console=self.console))
            self._task = self._progress.add_task(self.description, total=self.total_steps, completed=step, status="")

    def _mend(self) -> tuple[float, float, float]:
        """Cut the files of an earlier session back to the resumed step; its seconds kept, lost and down."""
        metrics, completions, saves, sessions = (self._here / f"{name}.jsonl" for name in FILES)
        unsaved, last_step = self._here / f"{UNSAVED}.jsonl", self.resume_step
        if last_step is None:
            if metrics.exists():
                there = self.directory / metrics.name
                raise InputError(f"{there}: this run exists already; add --resume, or choose another --out")
            if unsaved.exists():
                os.replace(unsaved, metrics)
            last_step = -1
        lines, saved = _truncate(metrics, last_step), _truncate(saves, last_step)
        _truncate(completions, last_step)
        started, _ = _truncate(sessions, math.inf)
        if not started or not metrics.exists():
            return 0.0, 0.0, 0.0
        kept_s, dropped_s = (
            max((row["elapsed_s"] for row in rows), default=0.0) for rows in map(operator.add, lines, saved)
        )
        reached_s = max(kept_s, dropped_s)
        last_sign_of_life = started[-1]["started_unix"] + reached_s - started[-1]["elapsed_s"]
        return kept_s, reached_s - kept_s, max(0.0, time.time() - last_sign_of_life)

    def _file(self, name: str) -> FileIO:
        """One of the run's files, open at its end."""
        return open(self._here / f"{name}.jsonl", "ab", buffering=0)

    def _elapsed_s(self) -> float:
        """Seconds of work in the run, earlier sessions included."""
        return self._kept_s + time.monotonic() - self._started

    def _show(self, step: int, numbers: Mapping[str, float | None], split: str) -> None:
        """Move the bar, or print a line where there is none or where the numbers are of another split."""
        now = time.monotonic()
        live = [f"{name} {_cell(numbers[name])}" for name in LIVE if name in numbers][:MAX_LIVE]
        if split != "train":
            self.say(" | ".join([f"{self.description} {step}/{self.total_steps} {split}", *live]))
            return
        rates = [form.format(numbers[name]) for name, form in RATES.items() if numbers.get(name) is not None]
        status = [*self._pace(step, now), *rates, *live]
        if self._progress:
            self._progress.update(self._task, completed=step, status=self._safe(" | ".join(status)))
        elif now >= self._next_plain_s or step >= self.total_steps:
            self._next_plain_s = now + self.plain_every_s
            self.say(" | ".join([f"{self.description} {step}/{self.total_steps}", *status]))

    def _pace(self, step: int, now: float) -> list[str]:
        """Rate and time left, counted from this session's first line so that compilation is left out."""
        if self._first is None:
            self._first = (step, now)
        steps, seconds = step - self._first[0], now - self._first[1]
        if steps <= 0 or seconds <= 0:
            return []
        left = datetime.timedelta(seconds=round((self.total_steps - step) * seconds / steps))
        rate = f"{seconds / steps:.1f} s/step" if seconds >= steps else f"{steps / seconds:.1f} steps/s"
        return [rate, f"{left} left"]

    def _safe(self, text: str) -> str:
        """Text that cannot steer the terminal: control, format and unencodable characters as escapes."""
        text = "".join(c if c == " " or c.isprintable() else _escape(c) for c in text)
        encoding = self.console.encoding
        return text.encode(encoding, "backslashreplace").decode(encoding)


@contextlib.contextmanager
def byte_bar(description: str, enabled: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for weights: gives a function to be told of a tensor, and how many bytes of how many are done."""
    whole = Column(no_wrap=True)
    columns = (
        TextColumn("{task.description}", table_column=whole),
        BarColumn(bar_width=20, table_column=whole),
        DownloadColumn(table_column=whole),
        TransferSpeedColumn(table_column=whole),
        TimeRemainingColumn(table_column=whole),
        TextColumn(
            "{task.fields[tensor]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
        ),
    )
    bar = Progress(*columns, console=Console(stderr=True), expand=True, disable=not enabled)
    task = bar.add_task(description, total=None, tensor="")

    def tell(tensor: str, done: int, total: int) -> None:
        bar.start()  # no bar before there is something to tell: a mistake is a line alone
        bar.update(task, completed=done, total=total, tensor=printable(tensor))

    try:
        yield tell
    finally:
        if bar.live.is_started:
            bar.stop()


def put_away(directory: Path) -> None:
    """Clear the log of a run that was killed before its first checkpoint; what it did will count as lost."""
    if (metrics := directory / "metrics.jsonl").exists():
        (directory / f"{UNSAVED}.jsonl").write_bytes(metrics.read_bytes())
        metrics.unlink()
    (directory / "completions.jsonl").unlink(missing_ok=True)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` or its siblings, without the half line a killed process may have left."""
    path = places.place(path)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; is this a run directory?") from None
    lines = text.split(b"\n")[:-1]  # what follows the last line feed is half a line, or nothing
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or "step" not in row:
            raise InputError(f"{path}:{number}: not a line of a run's log; restore the file or remove the line")
        rows.append(row)
    return rows


def _truncate(path: Path, last_step: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Drop the lines of later steps and a half line at the end; the lines (kept, dropped)."""
    if not path.exists():
        return [], []
    rows = read_metrics(path)
    kept = [row for row in rows if row["step"] <= last_step]
    part = path.with_name(path.name + ".part")
    with open(part, "wb", buffering=0) as file:
        for row in kept:
            _append(file, row)
        os.fsync(file.fileno())
    os.replace(part, path)
    return kept, [row for row in rows if row["step"] > last_step]


def _append(file: FileIO, row: Mapping[str, Any]) -> None:
    """Write a line and hand it to the system; nothing is kept back, which closing the file would try to write again."""
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    with naming(file.name):
        while line:
            line = line[file.write(line) :]


def _number(value: Any) -> float | int | bool | None:
    """A scalar of any library as Python's; None if it is missing or not finite."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, int | float | None):
        raise TypeError(f"a metric is a number, not {value!r}")
    return value if value is None or math.isfinite(value) else None


def _cell(value: Any) -> str:
    """A value as shown in the terminal."""
    if isinstance(value, str):
        return value if len(value) <= MAX_CELL else f"{value[:MAX_CELL]}... ({len(value)} characters)"
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _escape(character: str) -> str:
    """A character as Python would write it in a string."""
    return character.encode("unicode_escape").decode()


def _tensorboard_writer() -> Any:
    """tensorboardX's SummaryWriter class."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise InputError(
            "TensorBoard logs need tensorboardX; pip install 'surgery-r1-jax[tensorboard]', or turn them off"
        ) from None
    return SummaryWriter
