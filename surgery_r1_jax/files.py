"""Files and folders that are whole or not there: written so, and not believed otherwise."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery_r1_jax import places
from surgery_r1_jax.errors import InputError, naming, printable

POINTER = b"version https://git-lfs.github.com/spec/"
MOST_LIST_BYTES = 1 << 20
# As sha256sum writes it, plainly or with --tag; or the sum alone, in FILE.sha256.
_SUM = re.compile(
    r"\\?(?P<sum>[0-9a-fA-F]{64})(?: [ *](?P<name>.+))?|SHA256 \((?P<tagged>.+)\) = (?P<tag>[0-9a-fA-F]{64})"
)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text beside the path and rename it, so that a killed program leaves no half file."""
    path = places.place(path)
    if places.remote(path):
        with places.scratch() as folder:
            (folder / path.name).write_text(text, encoding="utf-8", newline="\n")
            places.put(folder / path.name, path)
        return
    part = path.with_name(path.name + ".part")
    with naming(path):
        part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)


def write_json(path: str | Path, value: object) -> None:
    """As `write_text`, of a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def vacant(out: str | Path) -> Path:
    """The place of a new folder. Raises: InputError where it holds files already, or its bucket does not answer."""
    out = places.reached(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{printable(out)}: already exists and is not an empty folder; give a new one")
    return out


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to fill beside `out`, which takes its name at the end; nothing is left of it after an error.

    One for a bucket is filled on this disk and put there. Raises: InputError where `out` is not `vacant`.
    """
    out = vacant(out)
    if places.remote(out):
        with places.scratch() as folder:
            yield folder
            places.put_folder(folder, out)
        return
    part = out.with_name(f".{out.name}.part")  # nobody else's: what a killed command left there may go
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
    except FileExistsError:
        raise InputError(f"{printable(part)}: is in the way; remove it") from None
    try:
        yield part
        if out.exists():
            out.rmdir()
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def check_fetched(path: Path) -> None:
    """Refuse what git leaves in place of a large file that was not fetched. Raises: InputError."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise InputError(f"{path}: this is a git-lfs pointer, not the file; run git lfs pull in {path.parent}")


def check_sums(folder: Path, paths: Iterable[Path]) -> None:
    """Hold files of a folder against its lists of SHA-256 sums, SHA256SUMS or *.sha256, where they name any of them.

    Raises: InputError naming the file whose bytes are others or which alone is in no list, or a list's line.
    """
    wanted: dict[str, list[tuple[str, str]]] = {path.name: [] for path in paths}
    for listed in sorted(filter(_is_list, folder.iterdir())):
        for name, where, given in _sums(listed):
            if Path(name).name in wanted and Path(name).parent.name in ("", folder.name):
                wanted[Path(name).name].append((where, given))
    if not any(wanted.values()):
        return
    for name, lines in wanted.items():
        path = folder / name
        if not lines:
            raise InputError(f"{path}: in no list of SHA-256 sums, though others are; complete the list or remove it")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        for where, given in lines:
            if found != given:
                raise InputError(f"{path}: its SHA-256 is not the one in {where}; copy the file again")


def _is_list(path: Path) -> bool:
    name = path.name.lower().removesuffix(".txt")
    return path.is_file() and (name in ("sha256sum", "sha256sums") or name.endswith((".sha256", ".sha256sum")))


def _sums(path: Path) -> Iterator[tuple[str, str, str]]:
    """Of each line of a list the file's name, where the line stands, and the sum."""
    if path.stat().st_size > MOST_LIST_BYTES:
        raise InputError(f"{path}: too long for a list of SHA-256 sums; remove it")
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if not (found := _SUM.fullmatch(line.rstrip())):
            reason = "not a line as sha256sum writes it; mend it, or remove the list"
            raise InputError(f"{printable(path)}:{number}: {reason}")
        name = found["name"] or found["tagged"] or path.stem
        yield name, f"{path.name}:{number}", (found["sum"] or found["tag"]).lower()
