"""The released sizes of every family, as their configurations: for what can be told of a model without its files.

Source: config.json on the model cards, huggingface.co/Qwen/Qwen2-VL-*-Instruct, Qwen2.5-VL-*-Instruct and
Qwen3-VL-*-Instruct.
"""

from typing import Any

from surgery_r1_jax import families, model


def _text(width, layers, heads, kv_heads, mlp, vocabulary, **more) -> dict:
    sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads)
    return sizes | dict(intermediate_size=mlp, vocab_size=vocabulary) | more


_SECTIONS = dict(rope_parameters=dict(rope_type="default", mrope_section=[16, 24, 24], rope_theta=1e6))
_INTERLEAVED = dict(
    head_dim=128,
    rope_parameters=dict(rope_type="default", mrope_section=[24, 20, 20], mrope_interleaved=True, rope_theta=5e6),
)
_EXPERTS = dict(num_experts=128, num_experts_per_tok=8, decoder_sparse_step=1, mlp_only_layers=[], **_INTERLEAVED)


def _qwen2(tied, *text) -> tuple:
    tower = dict(depth=32, embed_dim=1280, mlp_ratio=4, num_heads=16, hidden_size=text[0])
    return "qwen2_vl", _text(*text, **_SECTIONS), tower, tied


def _qwen2_5(tied, mlp, *text) -> tuple:
    tower = dict(depth=32, hidden_size=1280, intermediate_size=mlp, num_heads=16, out_hidden_size=text[0])
    tower |= dict(window_size=112, fullatt_block_indexes=[7, 15, 23, 31])
    return "qwen2_5_vl", _text(*text, **_SECTIONS), tower, tied


_SMALL = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])
_LARGE = dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])


def _qwen3(tied, tower, *text) -> tuple:
    tower = tower | dict(num_heads=16, out_hidden_size=text[0], num_position_embeddings=2304)
    return "qwen3_vl", _text(*text, **_INTERLEAVED), tower, tied


def _qwen3_moe(expert, *text) -> tuple:
    _, _, tower, tied = _qwen3(False, _LARGE, *text)
    return "qwen3_vl_moe", _text(*text, moe_intermediate_size=expert, **_EXPERTS), tower, tied


# Family, text_config, vision_config, whether embedding and head are one. The figures of a row are, from the right:
# vocabulary, MLP, key and value heads, heads, layers and width of the decoder; before them what is the tower's.
RELEASED: dict[str, tuple[str, dict, dict, bool]] = {
    "Qwen2-VL-2B": _qwen2(True, 1536, 28, 12, 2, 8960, 151936),
    "Qwen2-VL-7B": _qwen2(False, 3584, 28, 28, 4, 18944, 152064),
    "Qwen2-VL-72B": _qwen2(False, 8192, 80, 64, 8, 29568, 152064),
    "Qwen2.5-VL-3B": _qwen2_5(True, 3420, 2048, 36, 16, 2, 11008, 151936),
    "Qwen2.5-VL-7B": _qwen2_5(False, 3420, 3584, 28, 28, 4, 18944, 152064),
    "Qwen2.5-VL-32B": _qwen2_5(False, 3456, 5120, 64, 40, 8, 27648, 152064),
    "Qwen2.5-VL-72B": _qwen2_5(False, 3456, 8192, 80, 64, 8, 29568, 152064),
    "Qwen3-VL-2B": _qwen3(True, _SMALL, 2048, 28, 16, 8, 6144, 151936),
    "Qwen3-VL-4B": _qwen3(True, _SMALL, 2560, 36, 32, 8, 9728, 151936),
    "Qwen3-VL-8B": _qwen3(False, _LARGE, 4096, 36, 32, 8, 12288, 151936),
    "Qwen3-VL-32B": _qwen3(False, _LARGE, 5120, 64, 64, 8, 25600, 151936),
    "Qwen3-VL-30B-A3B": _qwen3_moe(768, 2048, 48, 32, 4, 6144, 151936),
    "Qwen3-VL-235B-A22B": _qwen3_moe(1536, 4096, 94, 64, 4, 12288, 151936),
}


def transformers_config(name: str, **more: Any) -> Any:
    """The configuration of a released size as transformers has it; `more` goes beside its sections."""
    import transformers

    family, text, tower, tied = RELEASED[name]
    sections = dict(text_config=text, vision_config=tower, tie_word_embeddings=tied)
    return transformers.AutoConfig.for_model(family, **sections, **more)


def architecture(name: str) -> model.Config:
    """The architecture of a released size."""
    return families.FAMILIES[RELEASED[name][0]].architecture(transformers_config(name))
