"""Folders on a bucket, `gs://` or `s3://`, where a folder on a disk could be given.

    inputs       are fetched once to a copy on this disk, which is compared with the bucket at each start
    checkpoints  are written to gs:// by Orbax itself, by every host its own part
    all else     is written on this disk first and then put: an object is there whole, or not at all

So what reads and writes files knows nothing of buckets. A folder is complete when its last file is there: a model's
config.json, a checkpoint's commit_success.txt.
"""

import base64
import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from surgery_r1_jax.errors import InputError, StorageError, one_line, printable

NEEDED = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # the package that knows a bucket, and our extra for it
AT_ONCE = 64  # files that are fetched together
LAST = ("config.json",)  # without which a folder is not what it is taken for
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):/")


def remote(path: str | os.PathLike) -> bool:
    """Whether a path leads to a bucket."""
    scheme, found, _ = os.fspath(path).partition("://")
    return bool(found) and scheme in NEEDED


def place(path: str | os.PathLike) -> Path:
    """A path on a disk, or one on a bucket that can be used alike.

    Raises: InputError where no bucket is known by such a name, or the package that reads it is not installed.
    """
    text = os.fspath(path)
    if not (found := _SCHEME.match(text)):
        return Path(path)
    if not remote(text):
        raise InputError(f"{printable(text)}: is not a path; give a folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")
    package, extra = NEEDED[found[1]]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{printable(text)}: needs {package}; pip install 'surgery-r1-jax[{extra}]', or use a disk")
    from etils import epath

    return epath.Path(path)


def reached(path: str | os.PathLike) -> Path:
    """A place, whose bucket answers. Raises: InputError, StorageError."""
    path = place(path)
    if remote(path):
        with _told(path):
            _system(path).exists(os.fspath(path))
    return path


def run_folder(path: str | os.PathLike) -> Path:
    """The place of a run, reached. Raises: InputError also for a bucket that Orbax does not write to."""
    if remote(path) and not is_gs(path):
        raise InputError(f"{path}: checkpoints are written to gs:// and to disks only; choose one, and copy them later")
    return reached(path)


def is_gs(path: str | os.PathLike) -> bool:
    """Whether Orbax writes there by itself."""
    return os.fspath(path).startswith("gs://")


def absolute(path: Path) -> Path:
    """As a path's own; a bucket's is."""
    return path if remote(path) else path.absolute()


def cache() -> Path:
    """The folder of this machine for what can be had again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "surgery_r1_jax"


def fetched(path: str | os.PathLike) -> Path:
    """A copy of a file or folder of a bucket on this disk; a path on a disk as it is.

    What is there already, by size and by the bucket's sum or tag, is not fetched again; what is fetched must have the
    size and, where the bucket tells one, the MD5 sum. Raises: InputError, StorageError.
    """
    path = place(path)
    if not remote(path):
        return path
    copy = cache() / "fetched" / os.fspath(path).replace("://", "/").rstrip("/")
    with _told(path):
        there = _objects(path)
        if not there:
            raise FileNotFoundError
        notes = copy.with_name(copy.name + ".fetched.json")
        known = json.loads(notes.read_text("utf-8")) if notes.is_file() else {}
        _drop_others(copy, there)
        wanted = [each for name, each in there.items() if not _is_here(copy / name, each, known.get(name))]
        with _bar(f"fetching {printable(path.name)}", sum(each.size for each in wanted)) as tell:
            for start in range(0, len(wanted), AT_ONCE):
                some = wanted[start : start + AT_ONCE]
                _get(path, copy, some)
                known |= {each.name: each.tag for each in some}
                _write_whole(notes, json.dumps(known))
                tell(sum(each.size for each in some))
    return copy


def put(file: Path, target: Path) -> None:
    """Copy a file to a place."""
    if not remote(target):
        shutil.copyfile(file, target)
        return
    with _told(target):
        _system(target).put_file(os.fspath(file), os.fspath(target))


def put_folder(folder: Path, target: Path) -> None:
    """Copy a folder to a bucket, last what says that it is complete; nothing stays of a failure."""
    files = sorted(
        (path for path in folder.rglob("*") if path.is_file()),
        key=lambda path: (path.name in LAST, -len(path.parts), path),
    )
    try:
        with _bar(f"putting {printable(target.name)}", sum(path.stat().st_size for path in files)) as tell:
            for path in files:
                put(path, target / path.relative_to(folder).as_posix())
                tell(path.stat().st_size)
    except BaseException:
        with contextlib.suppress(Exception):
            remove(target)
        raise


def remove(folder: Path) -> None:
    """Remove a folder, if it is there."""
    if remote(folder):
        folder.rmtree(missing_ok=True)  # type: ignore[attr-defined]
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder on this disk that goes at the end."""
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        yield Path(folder)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to write into, for what writes to disks alone: for a bucket one on this disk, put there at the end."""
    if not remote(folder):
        yield folder
        return
    with scratch() as here:
        yield here
        Mirror(here, folder).put()


class Mirror:
    """Files that grow, in a folder on this disk, and their copies on a bucket."""

    def __init__(self, here: Path, there: Path):
        self.here, self._there, self._put = here, there, {}

    def bring(self, names: Iterable[str]) -> None:
        """Begin with what the bucket has of these files, and when they were written."""
        for name in names:
            with _told(self._there / name):
                if (there := self._there / name).exists():
                    (self.here / name).write_bytes(there.read_bytes())
                    os.utime(self.here / name, (there.stat().mtime,) * 2)  # type: ignore[attr-defined]
                    self._put[self.here / name] = _state(self.here / name)

    def put(self) -> None:
        """Put what has changed."""
        for file in sorted(path for path in self.here.rglob("*") if path.is_file()):
            if self._put.get(file) != (state := _state(file)):
                put(file, self._there / file.relative_to(self.here).as_posix())
                self._put[file] = state


def _state(file: Path) -> tuple[int, int]:
    """Changes whenever a file does."""
    return file.stat().st_size, file.stat().st_mtime_ns


class _Object(NamedTuple):
    """An object below a folder of a bucket."""

    name: str  # from the folder; empty where the path names an object
    size: int
    tag: str  # changes whenever the object does
    md5: str | None


def _objects(path: Path) -> dict[str, _Object]:
    """All of them by name. Raises: InputError for a name that would lead out of the copy."""
    system, found = _system(path), {}
    base = system._strip_protocol(os.fspath(path))
    system.invalidate_cache()
    for key, about in system.find(base, detail=True).items():
        name = key[len(base) :].lstrip("/")
        if key.endswith("/"):  # what some tools leave to show a folder
            continue
        if ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
            raise InputError(f"{printable(path)}: holds '{printable(name)}', which leads out of it; remove that object")
        sum_ = about.get("md5Hash")
        tag = sum_ or about.get("etag") or about.get("ETag") or about.get("mtime") or about.get("LastModified")
        found[name] = _Object(name, int(about["size"]), str(tag), sum_)
    return found


def _is_here(file: Path, wanted: _Object, tag: str | None) -> bool:
    return tag == wanted.tag and file.is_file() and file.stat().st_size == wanted.size


def _get(path: Path, copy: Path, some: list[_Object]) -> None:
    """Fetch objects beside their places, hold them against size and sum, and rename them."""
    targets = [copy / each.name for each in some]
    parts = [target.with_name(f"{target.name}.{os.getpid()}.part") for target in targets]
    for folder in {part.parent for part in parts}:
        folder.mkdir(parents=True, exist_ok=True)
    names = [os.fspath(path / each.name) if each.name else os.fspath(path) for each in some]
    try:
        _system(path).get(names, [os.fspath(part) for part in parts])
        for each, name, part, target in zip(some, names, parts, targets, strict=True):
            with part.open("rb") as file:
                sum_ = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).digest()
            if part.stat().st_size != each.size or (each.md5 and base64.b64encode(sum_).decode() != each.md5):
                raise InputError(f"{printable(name)}: came with another size or sum than the bucket tells; try again")
            os.replace(part, target)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _drop_others(copy: Path, wanted: dict[str, Any]) -> None:
    """Remove from a copy what is no longer on the bucket."""
    for file in copy.rglob("*") if copy.is_dir() else ():
        if file.is_file() and file.relative_to(copy).as_posix() not in wanted and file.suffix != ".part":
            file.unlink()


def _write_whole(file: Path, text: str) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(text, "utf-8")
    os.replace(part, file)


def _system(path: Path) -> Any:
    """What fsspec knows of a bucket."""
    import fsspec

    return fsspec.filesystem(os.fspath(path).partition("://")[0])


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Tell what goes wrong with a bucket in one line; what goes wrong with the disk is told elsewhere."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{printable(path)}: no such file or folder on the bucket; check the path") from None
    except Exception as problem:  # of many kinds: of the network, of rights, of credentials
        if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        line = f"{printable(path)}: cannot be reached ({one_line(problem)})"
        if _passes(path, problem):
            raise StorageError(f"{line}; try again later") from problem
        raise InputError(f"{line}; check the path, the network and your rights to the bucket") from problem


def _passes(path: Path, problem: Exception) -> bool:
    """Whether it is the network's or the bucket's own, and may be over the next time."""
    if is_gs(path):
        from gcsfs import retry

        if retry.is_retriable(problem):
            return True
    return isinstance(problem, ConnectionError | TimeoutError)


@contextlib.contextmanager
def _bar(description: str, total: int) -> Iterator[Any]:
    """A progress bar where there is something to wait for; gives a function to be told of bytes."""
    from rich.console import Console  # only here, for every command imports this module
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not total) as bar:
        task = bar.add_task(description, total=total)
        yield lambda size: bar.update(task, advance=size)
