"""Files that are whole or not there."""

import os
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text beside the path and rename it, so that a killed program leaves no half file."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)
