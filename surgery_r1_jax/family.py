"""What a model family is to the rest of the program, and how its configuration is checked."""

from collections.abc import Callable
from typing import Any, NamedTuple

from surgery_r1_jax import model, weights
from surgery_r1_jax.codec import BoxCodec


class Family(NamedTuple):
    """A family of checkpoints: all that differs from the others is a value or a module named here."""

    model_type: str  # in config.json
    title: str
    names: weights.Names
    codec: BoxCodec
    read_config: Callable[[Any], model.Config]  # of a transformers configuration; raises ValueError


def supported(what: str, found: Any, only: Any) -> None:
    """Raises ValueError where a configuration asks for what would be computed wrongly."""
    if found != only:
        raise ValueError(f"{what} {found} is not supported, only {only}; take a released model")


def sections(rope: dict) -> list[int]:
    """How many rotary frequencies time, row and column turn. Raises ValueError."""
    if "mrope_section" not in rope:
        raise ValueError("no mrope_section in rope_scaling or rope_parameters; copy the file from the checkpoint")
    if (kind := rope.get("rope_type", "default")) not in ("default", "mrope"):
        raise ValueError(f"rope_type {kind} is not supported, only default; take a released model")
    return list(rope["mrope_section"])
