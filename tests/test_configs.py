"""Every configuration that we hand out loads, survives a round trip, and refuses a mistyped key with its line."""

from pathlib import Path

import pytest
import yaml

from surgery_r1_jax import config, options
from surgery_r1_jax.errors import InputError

FILES = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


def program(path):
    return options.GRPO if path.stem.startswith("grpo") else options.SFT


def keys(tree, prefix=()):
    for key, value in tree.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from keys(value, (*prefix, key))


def line_of(text, path):
    """Number of the line that holds a key, by the nesting of two spaces."""
    number = -1
    lines = text.splitlines()
    for depth, key in enumerate(path):
        number = next(n for n in range(number + 1, len(lines)) if lines[n].startswith(f"{'  ' * depth}{key}:"))
    return number


def test_there_are_configurations_for_every_size_and_program():
    assert {path.stem for path in FILES} >= {
        f"{kind}_{size}" for kind in ("sft", "grpo") for size in ("3b", "7b", "tiny", "3b_lora")
    }


def test_the_presets_of_adapters_have_the_figures_of_their_sources():
    """VLM-R1's LoRA script, and S2Can, a medical model."""
    home = Path(__file__).resolve().parents[1] / "configs"
    for name, *figures in (
        ("sft_3b_lora", 64, 128, 0.05, 1e-4),
        ("grpo_3b_lora", 64, 128, 0.05, 1e-5),
        ("sft_3b_lora_small", 8, 32, 0.1, 2e-5),
    ):
        settings = options.load(home / f"{name}.yaml")
        lora = settings.lora
        assert [lora.rank, lora.alpha, lora.dropout, settings.optimizer.learning_rate] == figures
        assert lora.targets == ("decoder",) and not lora.rslora


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_loads_and_survives_a_round_trip(path):
    settings = config.load(program(path), path)
    assert config.parse(program(path), config.dump(settings), "again.yaml") == settings
    assert hash(settings) == hash(config.load(program(path), path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_mistyped_key_is_refused_with_its_line(path):
    text = path.read_text()
    for key in keys(yaml.safe_load(text)):
        lines = text.splitlines(keepends=True)
        number = line_of(text, key)
        lines[number] = lines[number].replace(f"{key[-1]}:", f"{key[-1]}{key[-1][-1]}:", 1)
        with pytest.raises(InputError) as refusal:
            config.parse(program(path), "".join(lines), path.name)
        place = f"{path.name}:{number + 1}: unknown key '{'.'.join(key)}{key[-1][-1]}"
        assert any(line.startswith(place) for line in str(refusal.value).splitlines()), (key, str(refusal.value))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_one_program_refuses_what_only_the_other_knows(path):
    other = options.SFT if program(path) is options.GRPO else options.GRPO
    with pytest.raises(InputError, match="unknown key"):
        config.load(other, path)


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_grpo_starts_from_what_sft_leaves_and_sees_the_same_data(size):
    folder = FILES[0].parent
    first = config.load(options.SFT, folder / f"sft_{size}.yaml")
    second = config.load(options.GRPO, folder / f"grpo_{size}.yaml")
    assert second.model == f"runs/sft_{size}"
    assert (first.data.root, first.data.split) == (second.data.root, second.data.split)
    assert first.evaluation.split == second.evaluation.split == "dev"
