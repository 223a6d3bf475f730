"""What a model family is to the rest of the program, and how its configuration is read."""

from collections.abc import Callable
from typing import Any, NamedTuple

from surgery_r1_jax import decoder, model, vision, weights
from surgery_r1_jax.codec import BoxCodec

# What is called and means the same in every family's text_config and vision_config.
TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
)
TOWER = ("depth", "num_heads", "patch_size", "temporal_patch_size", "spatial_merge_size", "in_channels")


class Family(NamedTuple):
    """A family of checkpoints: all that differs from the others is a value or a module named here."""

    model_type: str  # in config.json
    title: str
    names: weights.Names
    codec: BoxCodec
    text: Callable[[Any], decoder.Config]  # of transformers' text_config; raises ValueError
    tower: Callable[[Any], vision.Config]  # of its vision_config; raises ValueError

    def architecture(self, whole: Any) -> model.Config:
        """Ours of a transformers configuration. Raises ValueError for a variant that would be computed wrongly."""
        return model.Config(
            family=self.model_type,
            image_token_id=whole.image_token_id,
            tie_word_embeddings=bool(whole.tie_word_embeddings),
            text=self.text(whole.text_config),
            vision=self.tower(whole.vision_config),
        )


def same(source: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Attributes by their names."""
    return {name: getattr(source, name) for name in names}


def whole_image(tower: Any) -> dict[str, Any]:
    """Fields of a tower all of whose layers see the whole image: a window is one merged unit."""
    return dict(
        window_size=tower.patch_size * tower.spatial_merge_size, fullatt_block_indexes=tuple(range(tower.depth))
    )


def head_dim(text: Any) -> int:
    """Width of an attention head."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def supported(what: str, found: Any, only: Any) -> None:
    """Raises ValueError where a configuration asks for what would be computed wrongly."""
    if found != only:
        raise ValueError(f"{what} {found} is not supported, only {only}; take a released model")


def sections(text: Any) -> list[int]:
    """How many rotary frequencies time, row and column turn. Raises ValueError."""
    rope = text.rope_parameters
    if "mrope_section" not in rope:
        raise ValueError("no mrope_section in rope_scaling or rope_parameters; copy the file from the checkpoint")
    if (kind := rope.get("rope_type", "default")) not in ("default", "mrope"):
        raise ValueError(f"rope_type {kind} is not supported, only default; take a released model")
    return list(rope["mrope_section"])
