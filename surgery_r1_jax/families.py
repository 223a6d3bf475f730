"""The model families that are supported; a new one is a file like `qwen2_vl.py` and a row here."""

from surgery_r1_jax import model, qwen2_5_vl, qwen2_vl, qwen3_vl, qwen3_vl_moe
from surgery_r1_jax.family import Family

FAMILIES: dict[str, Family] = {
    each.FAMILY.model_type: each.FAMILY for each in (qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe)
}


def of(config: model.Config) -> Family:
    """The family of an architecture."""
    return FAMILIES[config.family]
