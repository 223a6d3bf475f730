"""How many tokens each question takes with its frame and its answer, and how many a model was made for."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from surgery_r1_jax.errors import InputError
from surgery_r1_jax.examples import Encoder
from surgery_r1_jax.records import Frame, Record


class Length(NamedTuple):
    """Tokens of one question: instruction and image, the question itself, and its true answer with reasoning."""

    frame: Frame
    record: Record
    prefix: int
    prompt: int
    completion: int

    @property
    def total(self) -> int:
        """Tokens from the start to the stop token."""
        return self.prefix + self.prompt + self.completion


def measure(frames: Iterable[Frame], encoder: Encoder) -> list[Length]:
    """The lengths of all questions, as the model will be given them.

    Raises: InputError for a frame whose sides no model takes.
    """
    prefixes: dict[tuple[int, int], int] = {}
    found = []
    for frame in frames:
        grid = encoder.patch_grid(frame)
        if grid not in prefixes:
            prefixes[grid] = len(encoder.prefix_ids([grid]))
        for record in frame.records:
            branch = encoder.branch(frame, record, think=True)
            found.append(Length(frame, record, prefixes[grid], len(branch.prompt), len(branch.completion)))
    return found


def most_tokens(folder: Path) -> int | None:
    """How many positions the model of a Hugging Face folder was made for; None where config.json does not say."""
    file = folder / "config.json"
    try:
        written = json.loads(file.read_text("utf-8"))
        most = written.get("text_config", {}).get("max_position_embeddings") or written.get("max_position_embeddings")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: cannot be used ({error}); take the one of the checkpoint") from None
    return most if isinstance(most, int) and most > 0 else None
