"""A configuration mistake is refused at once, with its place and the right key."""

import importlib
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pydantic
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field

from surgery_r1_jax import config
from surgery_r1_jax.errors import InputError


class Source(config.Config):
    path: Path
    weight: float = Field(1.0, gt=0)


class Data(config.Config):
    root: Path = Path("data")
    sources: tuple[Source, ...] = ()
    questions_per_frame: int = Field(2, ge=1)
    shuffle: bool = True
    workers: int = Field(0, ge=0)


class Optim(config.Config):
    learning_rate: float = Field(1e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(10, ge=0)
    clip_norm: float = Field(1.0, gt=0)


class Rollout(config.Config):
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    samples: int = Field(8, ge=2)
    max_completion: int = Field(256, ge=1)


class Rewards(config.Config):
    format: float = Field(1.0, ge=0)
    accuracy: float = Field(1.0, ge=0)
    iou: float = Field(1.0, ge=0)
    coherence: float = Field(0.5, ge=0)


class Run(config.Config):
    seed: int = Field(0, ge=0)
    steps: int = Field(100, ge=1)
    name: str = "run"
    kl: float = Field(0.04, ge=0)
    loss: Literal["grpo", "dr_grpo"] = "grpo"
    budget: int | float | None = None
    data: Data = Data()
    optim: Optim = Optim()
    rollout: Rollout = Rollout()
    rewards: Rewards = Rewards()
    reference: Rollout | None = None

    @pydantic.model_validator(mode="after")
    def _warmup_fits(self):
        if self.optim.warmup_steps > self.steps:
            raise ValueError("warm-up is longer than the run; lower optim.warmup_steps")
        return self


SECTIONS = ("data", "optim", "rollout", "rewards")
KEYS = [key for key in config.keys(Run) if not key.startswith("data.sources.") and key not in SECTIONS]


def refusal(text, *overrides):
    with pytest.raises(InputError) as caught:
        config.parse(Run, text, "run.yaml", overrides)
    return str(caught.value)


def as_yaml(key, value):
    """One key as a file whose key stands on the last line."""
    *sections, leaf = key.split(".")
    lines = ["# a comment"] + [f"{'  ' * i}{section}:" for i, section in enumerate(sections)]
    return "\n".join([*lines, f"{'  ' * len(sections)}{leaf}: {value}"]), len(lines) + 1


def misspellings(key):
    """Every dropped, doubled and swapped letter, and every hyphen, of a key's last name."""
    section, dot, leaf = key.rpartition(".")
    wrong = set()
    for i in range(len(leaf)):
        wrong |= {leaf[:i] + leaf[i + 1 :], leaf[:i] + leaf[i] + leaf[i:]}
        wrong.add(leaf[:i] + leaf[i : i + 2][::-1] + leaf[i + 2 :])
    wrong.add(leaf.replace("_", "-"))
    return sorted(section + dot + name for name in wrong - {"", leaf} if section + dot + name not in KEYS)


def displaced(key):
    """The key in every section that is not its own, and at the top."""
    own, _, leaf = key.rpartition(".")
    return [f"{section}.{leaf}".lstrip(".") for section in ("", *SECTIONS) if section != own]


def suggestions(message):
    return message.partition("did you mean ")[2].split("'")[1::2]


def test_every_misspelt_or_misplaced_key_is_refused_and_the_right_one_suggested():
    tried, right = 0, 0
    for key in KEYS:
        if key == "reference":
            continue
        for wrong in misspellings(key) + [other for other in displaced(key) if other not in KEYS]:
            text, line = as_yaml(wrong, 1)
            message = refusal(text)
            # the only key of a section is named at the section's line when the section is the mistake
            assert message.startswith(f"run.yaml:{line}: unknown key '{wrong}'; did you mean '"), message
            assert len(suggestions(message)) <= config.MAX_SUGGESTIONS
            tried += 1
            right += key in suggestions(message)
    assert tried > 500
    assert right >= 0.95 * tried, f"{right} of {tried}"


def test_a_flag_is_refused_as_a_file_is():
    rng = random.Random(0)
    for key in KEYS:
        wrong = rng.choice(misspellings(key))
        message = refusal("", f"--{wrong}=1")
        assert message.startswith(f"--{wrong}: unknown key '{wrong}'; did you mean '")
        assert key in suggestions(message)


def test_habits_of_case_and_hyphens_are_understood_but_refused():
    for wrong in ("OPTIM.LEARNING-RATE", "Optim.LearningRate", "optim.LEARNING_RATE"):
        assert "did you mean 'optim.learning_rate'?" in refusal("", f"--{wrong}=1")


def test_a_misspelt_section_is_named_with_the_whole_key():
    assert (
        refusal("", "--optm.learning_rate=1")
    ) == "--optm.learning_rate: unknown key 'optm.learning_rate'; did you mean 'optim.learning_rate'?"
    message = refusal("optm:\n  learning_rate: 1\n  betas: [0.9, 0.99]\n")
    assert message.startswith("run.yaml:1: unknown key 'optm'; did you mean 'optim'")


def test_every_wrong_type_is_refused_with_line_expectation_and_value():
    for key in KEYS:
        value = Run(reference=Rollout()).model_dump(mode="json")
        for part in key.split("."):
            value = value[part]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        for bad in ["{a: 1}", "[[]]", "true" if number or value is None else "1.5"]:
            text, line = as_yaml(key, bad)
            message = refusal(text)
            assert message.startswith(f"run.yaml:{line}: "), message
            assert re.search("expected a|expected '|unknown key '|tuple should|missing key", message), message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optim.learning_rate", 0, "greater than 0"),
        ("optim.learning_rate", ".inf", "a finite number"),
        ("optim.learning_rate", "1e999", "a finite number"),
        ("optim.learning_rate", ".nan", "a finite number"),
        ("rollout.temperature", 3, "less than or equal to 2"),
        ("rollout.samples", 1, "greater than or equal to 2"),
        ("seed", -1, "greater than or equal to 0"),
        ("loss", "ppo", "'grpo' or 'dr_grpo'"),
    ],
)
def test_a_value_out_of_range_is_refused_in_a_file_and_in_a_flag(key, value, expected):
    text, line = as_yaml(key, value)
    assert refusal(text).startswith(f"run.yaml:{line}: '{key}': expected {expected}, given ")
    assert refusal("", f"--{key}={value}").startswith(f"--{key}: '{key}': expected {expected}, given ")


def test_a_union_is_refused_in_one_line():
    assert refusal("budget: []") == "run.yaml:1: 'budget': expected a valid integer or a valid number, given []"


def test_a_rule_of_the_class_is_refused_with_its_own_words():
    assert refusal("steps: 5") == "run.yaml: warm-up is longer than the run; lower optim.warmup_steps"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: 1\noptim:\n  clip_norm: 1\nseed: 2",
            "run.yaml:4: duplicate key 'seed', already given at run.yaml:1",
        ),
        ("optim:\n  clip_norm: 1\noptim:\n  betas: [1, 1]", "run.yaml:3: duplicate key 'optim'"),
        ("data:\n  sources:\n  - weight: 2\n", "run.yaml:3: missing key 'data.sources.0.path'"),
        (
            "data:\n  sources:\n  - path: a\n  - path: b\n    weigth: 2\n",
            "run.yaml:5: unknown key 'data.sources.1.weigth'",
        ),
        ("optim: 3", "run.yaml:1: 'optim': expected a section with keys of its own, given 3"),
        ("optim:", "run.yaml:1: 'optim': expected a section with keys of its own, given null"),
        ("1: 2", "run.yaml:1: a key must be a plain name"),
        ("seed: 1\nsteps: [1", "run.yaml:2: not valid YAML"),
        ("seed: 1\n\tsteps: 1", "run.yaml:2: not valid YAML"),
        ("seed: &a 1\nsteps: *a", "run.yaml:1: not valid YAML: anchors"),
        (
            "name: !!python/object:os.system x",
            "run.yaml:1: not valid YAML: anchors (&), aliases (*) and tags",
        ),
        ("seed: 1\n---\nseed: 2", "run.yaml:2: not valid YAML: expected a single document"),
        ("- seed", "run.yaml: expected 'key: value' lines"),
        ("[" * 5_000, "run.yaml: not a configuration: nested too deeply"),
        (b"\xff\xfe\x00", "run.yaml: not valid YAML"),
        ("qqq: 1", "run.yaml:1: unknown key 'qqq'; known keys: seed, steps"),
        ("seed: 007", "run.yaml:1: 'seed': expected a valid integer, given \"007\""),
        ("data: {shuffle: yes}", "run.yaml:1: 'data.shuffle': expected a valid boolean, given \"yes\""),
    ],
)
def test_a_broken_file_is_refused_with_its_line(text, message):
    assert refusal(text).startswith(message)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--seed", "--seed: a value is missing; write --seed=VALUE"),
        ("--optim.betas=[1, 2", "--optim.betas: not valid YAML"),
        ("--optim.betas=[1, 2]]", "--optim.betas: not valid YAML"),
        ("--name.first=x", "--name.first: 'name': expected a valid string"),
        ("--optim=fast", "--optim: 'optim': expected a section"),
        ("--=3", "--: unknown key ''"),
    ],
)
def test_a_broken_flag_is_refused(flag, message):
    assert refusal("", flag).startswith(message)


def test_a_flag_cannot_hide_a_mistake_of_the_file():
    assert refusal("optim: 3", "--optim.clip_norm=1").startswith("--optim.clip_norm: 'optim' holds 3")


def test_several_mistakes_are_listed_in_the_order_of_the_file_and_capped():
    message = refusal("setps: 3\noptim:\n  clip_norm: -1\n  beta: 1\nseed: x\n", "--kll=1")
    places = [line.partition(": ")[0] for line in message.splitlines()]
    assert places == ["run.yaml:1", "run.yaml:3", "run.yaml:4", "run.yaml:5", "--kll"]
    many = refusal("\n".join(f"qqq{i}: 1" for i in range(30))).splitlines()
    assert len(many) == config.MAX_PROBLEMS + 1
    assert many[-1] == "run.yaml: and 10 more problems"


def test_a_misspelt_key_is_not_also_reported_as_missing():
    class Needy(config.Config):
        model: Path
        seed: int

    with pytest.raises(InputError) as caught:
        config.parse(Needy, "modle: x", "run.yaml")
    assert str(caught.value).splitlines() == [
        "run.yaml: missing key 'seed', which has no default",
        "run.yaml:1: unknown key 'modle'; did you mean 'model'?",
    ]


def test_numbers_are_read_as_people_write_them():
    run = config.parse(Run, "optim: {learning_rate: 1e-5, betas: [.9, 1.]}\nname: yes\nkl: 1", "run.yaml")
    assert run.optim == Optim(learning_rate=1e-5, betas=(0.9, 1.0))
    assert (run.name, run.kl, type(run.kl)) == ("yes", 1.0, float)


def test_overrides_win_in_order_and_take_shell_text_as_it_is():
    run = config.parse(
        Run,
        "optim: {learning_rate: 1}\nreference: null",
        "run.yaml",
        [
            *("--optim.learning_rate=2", "optim.learning_rate=3e-4", "--name=*.png # a: b", "--budget=null"),
            *("--reference.top_p=.5", '--data.root="1e-5"', "--data.sources=[]", "--optim.betas=[0, 1]"),
        ],
    )
    assert run.optim == Optim(learning_rate=3e-4, betas=(0, 1))
    assert run.name == "*.png # a: b"
    assert run.reference == Rollout(top_p=0.5)
    assert run.data == Data(root=Path("1e-5"))


def test_a_configuration_is_frozen_and_hashable():
    run = Run()
    with pytest.raises(pydantic.ValidationError):
        run.seed = 3
    assert hash(run) == hash(Run())


def test_an_impossible_default_is_found():
    class Broken(config.Config):
        rate: float = Field(0.0, gt=0)

    with pytest.raises(InputError, match="'rate': expected greater than 0, given 0"):
        config.parse(Broken, "", "run.yaml")


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=150)
@given(
    name=st.text(),
    root=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
    seed=st.integers(0, 2**64),
    kl=finite.filter(lambda value: value >= 0),
    betas=st.tuples(finite, finite),
    budget=st.none() | st.integers(-5, 5) | finite.filter(lambda value: not value.is_integer()),
)
@example(name="1e-5", root="yes", seed=2**64, kl=1e-5, betas=(-0.0, 5e-324), budget=1)
@example(name="\x85", root="\x85", seed=0, kl=0.0, betas=(0.0, 0.0), budget=None)
@example(name="010", root="~", seed=0, kl=1e300, betas=(0.1, 0.2), budget=1e16)
def test_dump_and_parse_are_inverse(name, root, seed, kl, betas, budget):
    run = Run(name=name, seed=seed, kl=kl, budget=budget, data=Data(root=Path(root)), optim=Optim(betas=betas))
    again = config.parse(Run, config.dump(run), "run.yaml")
    assert again == run
    assert math.copysign(1, again.optim.betas[0]) == math.copysign(1, betas[0])
    yaml.safe_load(config.dump(run))  # other programs can read it too


@settings(deadline=None, max_examples=150)
@given(text=st.text() | st.binary() | st.text("[]{}:,-#&*!|>'\"%@ \n\t0aseed.", max_size=40), flag=st.text())
def test_any_text_is_a_configuration_or_an_input_error(text, flag):
    for overrides in ([], [flag]):
        try:
            assert isinstance(config.parse(Run, text, "run.yaml", overrides), Run)
        except InputError as error:
            assert str(error)


def test_files_are_saved_whole_and_loaded_back(tmp_path):
    path = tmp_path / "config.yaml"
    run = Run(seed=3, reference=Rollout(samples=4))
    config.save(run, path)
    assert config.load(Run, path) == run
    assert config.load(Run, str(path), ["--seed=4"]).seed == 4
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: no such configuration file"):
        config.load(Run, tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot read the configuration: Is a directory"):
        config.load(Run, tmp_path)


def test_the_module_stands_alone():
    code = "import sys; import surgery_r1_jax.config; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in modules if name.startswith("surgery_r1_jax.")} == {
        "surgery_r1_jax.config",
        "surgery_r1_jax.errors",
        "surgery_r1_jax.files",
        "surgery_r1_jax.places",
    }
    assert not {"jax", "numpy", "transformers"} & set(modules)
    assert importlib.import_module("surgery_r1_jax.config") is config
