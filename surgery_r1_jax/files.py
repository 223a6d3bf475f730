"""Files and folders that are whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery_r1_jax.errors import InputError


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text beside the path and rename it, so that a killed program leaves no half file."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to fill beside `out`, which takes its name at the end; nothing is left of it after an error.

    Raises: InputError where `out` holds files already.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: already exists and is not an empty folder; give a new one")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if out.exists():
            out.rmdir()
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
