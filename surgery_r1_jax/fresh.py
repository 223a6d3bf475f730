"""A tiny untrained model as a whole Hugging Face folder: what takes a released checkpoint's place on a laptop."""

import tempfile
from pathlib import Path

from surgery_r1_jax import hf, model, tiny


def write(folder: str | Path, *, seed: int = 0, sizes: tiny.Sizes | None = None) -> Path:
    """Write the folder with freshly drawn weights; the seed decides them. Raises InputError where it exists."""
    with tempfile.TemporaryDirectory() as bare:
        architecture = hf.read_config(tiny.write_folder(bare, sizes))
        return hf.write_folder(Path(folder), model.init(architecture, seed), architecture, Path(bare))
