"""Every released size as an abstract model: part by part as many parameters as transformers makes of its figures."""

import math

import pytest
from flax import nnx
from randomised import CLASSES

from surgery_r1_jax import model, sizes, weights

torch = pytest.importorskip("torch", reason="transformers counts with PyTorch's meta device")

# Parameters in billions, as the model cards give them.
PUBLISHED = {
    "Qwen2-VL-2B": 2.21,
    "Qwen2-VL-7B": 8.29,
    "Qwen2-VL-72B": 73.4,
    "Qwen2.5-VL-3B": 3.75,
    "Qwen2.5-VL-7B": 8.29,
    "Qwen2.5-VL-32B": 33.5,
    "Qwen2.5-VL-72B": 73.4,
    "Qwen3-VL-2B": 2.13,
    "Qwen3-VL-4B": 4.44,
    "Qwen3-VL-8B": 8.77,
    "Qwen3-VL-32B": 33.4,
    "Qwen3-VL-30B-A3B": 31.1,
    "Qwen3-VL-235B-A22B": 235.7,
}


def test_every_released_size_is_held_against_its_card():
    assert PUBLISHED.keys() == sizes.RELEASED.keys()


def part(name):
    """The part that a tensor of transformers belongs to, under our names."""
    name = weights.plain(name)
    if name.startswith("visual."):
        return "merger" if "merger" in name else "tower"
    return "decoder"


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_released_size_has_the_parameters_that_transformers_makes_of_it(size):
    import transformers

    whole = sizes.transformers_config(size)
    with torch.device("meta"):
        reference = getattr(transformers, CLASSES[whole.model_type] + "ForConditionalGeneration")(whole)
    wanted = dict.fromkeys(model.PARTS, 0)
    for name, parameter in reference.named_parameters():
        wanted[part(name)] += parameter.numel()

    found = dict.fromkeys(model.PARTS, 0)
    _, abstract = model.build(sizes.architecture(size))
    for path, variable in nnx.to_flat_state(abstract):
        found[model.part_of(path)] += math.prod(variable.get_value().shape)
    assert found == wanted
    assert sum(found.values()) / 1e9 == pytest.approx(PUBLISHED[size], abs=0.006 * PUBLISHED[size])
