"""What a model family is to the rest of the program, and how its configuration is read."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from surgery_r1_jax import decoder, model, vision, weights
from surgery_r1_jax.codec import BoxCodec

MOST = 1 << 20  # of any size; more is a slip
# Sizes that are called and mean the same in every family's text_config and vision_config.
TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
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
        config = model.Config(
            family=self.model_type,
            image_token_id=whole.image_token_id,
            tie_word_embeddings=bool(whole.tie_word_embeddings),
            text=self.text(whole.text_config),
            vision=self.tower(whole.vision_config),
        )
        _check(config)
        return config


def same(source: Any, names: tuple[str, ...]) -> dict[str, int]:
    """Sizes by their names. Raises ValueError for what is none."""
    return {name: size(name, getattr(source, name)) for name in names}


def size(name: str, value: Any) -> int:
    """The value, which must be a whole number from 1 to MOST. Raises ValueError."""
    if type(value) is not int or not 1 <= value <= MOST:
        raise ValueError(f"{name} {value} must be a whole number from 1 to {MOST}; copy the file from the checkpoint")
    return value


def text_sizes(text: Any) -> dict[str, Any]:
    """The fields that every family's decoder has in common. Raises ValueError."""
    found = same(text, TEXT)
    head_dim = getattr(text, "head_dim", None) or found["hidden_size"] // found["num_attention_heads"]
    more = dict(rms_norm_eps=text.rms_norm_eps, rope_theta=_rope(text).get("rope_theta"))
    for name, value in more.items():
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} {value} must be a number above 0; copy the file from the checkpoint")
    return found | {name: float(value) for name, value in more.items()} | dict(head_dim=size("head_dim", head_dim))


def whole_image(tower: Any) -> dict[str, Any]:
    """Fields of a tower all of whose layers see the whole image: a window is one merged unit."""
    return dict(
        window_size=tower.patch_size * tower.spatial_merge_size, fullatt_block_indexes=tuple(range(tower.depth))
    )


def supported(what: str, found: Any, only: Any) -> None:
    """Raises ValueError where a configuration asks for what would be computed wrongly."""
    if found != only:
        raise ValueError(f"{what} {found} is not supported, only {only}; take a released model")


def sections(text: Any) -> list[int]:
    """How many rotary frequencies time, row and column turn. Raises ValueError."""
    rope = _rope(text)
    if "mrope_section" not in rope:
        raise ValueError("no mrope_section in rope_scaling or rope_parameters; copy the file from the checkpoint")
    if (kind := rope.get("rope_type", "default")) not in ("default", "mrope"):
        raise ValueError(f"rope_type {kind} is not supported, only default; take a released model")
    found = rope["mrope_section"]
    if not isinstance(found, list) or len(found) != 3 or not all(type(n) is int and 0 <= n <= MOST for n in found):
        raise ValueError(f"mrope_section {found} must be three whole numbers; copy the file from the checkpoint")
    return found


def _rope(text: Any) -> dict:
    """The rotary settings. Raises ValueError."""
    if not isinstance(rope := text.rope_parameters, dict):
        raise ValueError(f"rope_parameters {rope} must be an object; copy the file from the checkpoint")
    return rope


def _check(config: model.Config) -> None:
    """Raises ValueError where sizes do not fit each other."""
    text, tower = config.text, config.vision
    heads, kv_heads, half = text.num_attention_heads, text.num_key_value_heads, len(text.rope_axes)
    unit, image = tower.patch_size * tower.spatial_merge_size, config.image_token_id
    supported("vision_config.in_channels", tower.in_channels, 3)
    rules = {
        f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}": heads % kv_heads == 0,
        f"mrope_section must sum to half of a head's width {text.head_dim}, not to {half}": 2 * half == text.head_dim,
        f"vision_config: width {tower.hidden_size} must be a multiple of 4 x num_heads {tower.num_heads}": (
            tower.hidden_size % (4 * tower.num_heads) == 0
        ),
        f"vision_config: its vectors are {tower.out_hidden_size} wide, the decoder's {text.hidden_size}": (
            tower.out_hidden_size == text.hidden_size
        ),
        f"vision_config.window_size {tower.window_size} is below a unit of {unit} pixels": tower.window_size >= unit,
        f"image_token_id {image} is not in a vocabulary of {text.vocab_size}": (
            type(image) is int and 0 <= image < text.vocab_size
        ),
    }
    for rule, kept in rules.items():
        if not kept:
            raise ValueError(f"{rule}; copy the file from the checkpoint")
