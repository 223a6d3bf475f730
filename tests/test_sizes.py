"""Every released size as an abstract model: part by part as many parameters as transformers makes of its figures.

The figures are those of config.json on the model cards, huggingface.co/Qwen/Qwen2-VL-*-Instruct, Qwen2.5-VL-*-Instruct
and Qwen3-VL-*-Instruct. No weight is ever allocated.
"""

import math

import pytest
from flax import nnx
from randomised import CLASSES

from surgery_r1_jax import families, model, weights

torch = pytest.importorskip("torch", reason="transformers counts with PyTorch's meta device")


def text(width, layers, heads, kv_heads, mlp, vocabulary, **more):
    return dict(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        **more,
    )


SECTIONS = dict(rope_parameters=dict(rope_type="default", mrope_section=[16, 24, 24], rope_theta=1e6))
INTERLEAVED = dict(
    head_dim=128,
    rope_parameters=dict(rope_type="default", mrope_section=[24, 20, 20], mrope_interleaved=True, rope_theta=5e6),
)
EXPERTS = dict(num_experts=128, num_experts_per_tok=8, decoder_sparse_step=1, mlp_only_layers=[], **INTERLEAVED)


def qwen2_tower(out):
    return dict(depth=32, embed_dim=1280, mlp_ratio=4, num_heads=16, hidden_size=out)


def qwen2_5_tower(out, mlp):
    tower = dict(depth=32, hidden_size=1280, intermediate_size=mlp, num_heads=16, out_hidden_size=out)
    return tower | dict(window_size=112, fullatt_block_indexes=[7, 15, 23, 31])


def qwen3_tower(out, *, large):
    small = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])
    big = dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])
    return (big if large else small) | dict(num_heads=16, out_hidden_size=out, num_position_embeddings=2304)


# Size: family, text_config, vision_config, tied head, parameters in billions on the model card.
SIZES = {
    "Qwen2-VL-2B": ("qwen2_vl", text(1536, 28, 12, 2, 8960, 151936, **SECTIONS), qwen2_tower(1536), True, 2.21),
    "Qwen2-VL-7B": ("qwen2_vl", text(3584, 28, 28, 4, 18944, 152064, **SECTIONS), qwen2_tower(3584), False, 8.29),
    "Qwen2-VL-72B": ("qwen2_vl", text(8192, 80, 64, 8, 29568, 152064, **SECTIONS), qwen2_tower(8192), False, 73.4),
    "Qwen2.5-VL-3B": (
        *("qwen2_5_vl", text(2048, 36, 16, 2, 11008, 151936, **SECTIONS), qwen2_5_tower(2048, 3420), True, 3.75),
    ),
    "Qwen2.5-VL-7B": (
        *("qwen2_5_vl", text(3584, 28, 28, 4, 18944, 152064, **SECTIONS), qwen2_5_tower(3584, 3420), False, 8.29),
    ),
    "Qwen2.5-VL-32B": (
        *("qwen2_5_vl", text(5120, 64, 40, 8, 27648, 152064, **SECTIONS), qwen2_5_tower(5120, 3456), False, 33.5),
    ),
    "Qwen2.5-VL-72B": (
        *("qwen2_5_vl", text(8192, 80, 64, 8, 29568, 152064, **SECTIONS), qwen2_5_tower(8192, 3456), False, 73.4),
    ),
    "Qwen3-VL-2B": (
        *("qwen3_vl", text(2048, 28, 16, 8, 6144, 151936, **INTERLEAVED), qwen3_tower(2048, large=False), True, 2.13),
    ),
    "Qwen3-VL-4B": (
        *("qwen3_vl", text(2560, 36, 32, 8, 9728, 151936, **INTERLEAVED), qwen3_tower(2560, large=False), True, 4.44),
    ),
    "Qwen3-VL-8B": (
        *("qwen3_vl", text(4096, 36, 32, 8, 12288, 151936, **INTERLEAVED), qwen3_tower(4096, large=True), False, 8.77),
    ),
    "Qwen3-VL-32B": (
        *("qwen3_vl", text(5120, 64, 64, 8, 25600, 151936, **INTERLEAVED), qwen3_tower(5120, large=True), False, 33.4),
    ),
    "Qwen3-VL-30B-A3B": (
        "qwen3_vl_moe",
        text(2048, 48, 32, 4, 6144, 151936, moe_intermediate_size=768, **EXPERTS),
        qwen3_tower(2048, large=True),
        False,
        31.1,
    ),
    "Qwen3-VL-235B-A22B": (
        "qwen3_vl_moe",
        text(4096, 94, 64, 4, 12288, 151936, moe_intermediate_size=1536, **EXPERTS),
        qwen3_tower(4096, large=True),
        False,
        235.7,
    ),
}


def part(name):
    """The part that a tensor of transformers belongs to, under our names."""
    name = weights.plain(name)
    if name.startswith("visual."):
        return "merger" if "merger" in name else "tower"
    return "decoder"


@pytest.mark.parametrize("size", SIZES)
def test_a_released_size_has_the_parameters_that_transformers_makes_of_it(size):
    import transformers

    family, words, tower, tied, published = SIZES[size]
    whole = getattr(transformers, f"{CLASSES[family]}Config")(
        text_config=words, vision_config=tower, tie_word_embeddings=tied
    )
    with torch.device("meta"):
        reference = getattr(transformers, f"{CLASSES[family]}ForConditionalGeneration")(whole)
    wanted = dict.fromkeys(model.PARTS, 0)
    for name, parameter in reference.named_parameters():
        wanted[part(name)] += parameter.numel()

    found = dict.fromkeys(model.PARTS, 0)
    _, abstract = model.build(families.FAMILIES[family].architecture(whole))
    for path, variable in nnx.to_flat_state(abstract):
        found[model.part_of(path)] += math.prod(variable.get_value().shape)
    assert found == wanted
    assert sum(found.values()) / 1e9 == pytest.approx(published, abs=0.006 * published)
