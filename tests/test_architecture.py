"""The package keeps its promises of form: reading order, import order, a host that knows no JAX, small files."""

import ast
import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import surgery_r1_jax
from surgery_r1_jax import cli, config, options

HOME = Path(__file__).resolve().parents[1]
PACKAGE = HOME / "surgery_r1_jax"
README = (HOME / "README.md").read_text("utf-8")
MOST_LINES = 420
FORBIDDEN_NAMES = {"utils", "util", "common", "misc", "helpers", "base"}
DEVICE_PACKAGES = {"jax", "jaxlib", "flax", "optax", "orbax"}


def table_rows(text):
    """Names of files in the first column of tables."""
    return re.findall(r"^\| `([a-z0-9_]+\.[a-z.]+)` \|", text, re.MULTILINE)


def reading_order():
    return [name.removesuffix(".py") for name in table_rows(README) if name.endswith(".py")]


def host_modules():
    """Those of the tables whose heading says host."""
    parts = re.split(r"^\*\*.*\*\*(.*)$", README, flags=re.MULTILINE)[1:]
    texts = [text for about, text in zip(parts[::2], parts[1::2], strict=True) if "host" in about]
    return [name.removesuffix(".py") for text in texts for name in table_rows(text)]


def imports(module):
    """Modules of the package, and packages from elsewhere, that a module's source imports anywhere in it."""
    ours, theirs = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text("utf-8"))):
        match node:
            case ast.ImportFrom(module="surgery_r1_jax", names=names):
                ours |= {name.name for name in names if name.name != "__version__"}
            case ast.ImportFrom(module=str(name), level=0) if name.startswith("surgery_r1_jax."):
                ours.add(name.split(".")[1])
            case ast.ImportFrom(module=str(name), level=0):
                theirs.add(name.split(".")[0])
            case ast.Import(names=names):
                theirs |= {name.name.split(".")[0] for name in names}
    return ours, theirs


def commands():
    """Every call of the program in the README, in the configurations and in the scripts, with its file."""
    found = [("README.md", line) for line in README.splitlines() if line.startswith("surgery-r1 ")]
    for path in sorted((HOME / "configs").glob("*.yaml")):
        lines = (line.lstrip("# ") for line in path.read_text("utf-8").splitlines() if line.startswith("#"))
        found += [(path.name, line) for line in lines if line.startswith("surgery-r1 ")]
    return found


def test_the_readme_lists_exactly_the_files_of_the_package():
    listed = table_rows(README)
    assert len(set(listed)) == len(listed)
    assert set(listed) == {path.name for path in PACKAGE.iterdir() if path.is_file()} - {"__init__.py"}


def test_the_package_docstring_gives_the_same_reading_order():
    lines = re.findall(r"^ {4}(.{25})(.*)$", surgery_r1_jax.__doc__.partition("The name of an array")[0], re.MULTILINE)
    assert " ".join(names for _, names in lines).split() == reading_order()


@pytest.mark.parametrize("module", reading_order())
def test_a_module_imports_only_modules_above_it(module):
    order = reading_order()
    ours, _ = imports(module)
    assert ours <= set(order[: order.index(module)])


def test_the_host_reaches_no_jax_in_its_sources():
    seen, waiting = set(), host_modules()
    assert {"errors", "records", "answer", "synth", "batch", "examples"} <= set(waiting)
    while waiting:
        module = waiting.pop()
        ours, theirs = imports(module)
        assert not theirs & DEVICE_PACKAGES, module
        waiting += ours - seen
        seen |= ours


def test_reading_and_encoding_frames_loads_no_jax():
    names = [name for name in host_modules() if name not in ("stream", "pipeline")]  # Grain loads it itself
    code = f"from surgery_r1_jax import {', '.join(names)}; import sys; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("module", ["__init__", *reading_order()])
def test_a_module_is_small_documented_and_knows_no_torch(module):
    text = (PACKAGE / f"{module}.py").read_text("utf-8")
    assert len(text.splitlines()) < MOST_LINES
    assert ast.get_docstring(ast.parse(text))
    assert text.isascii()
    assert module not in FORBIDDEN_NAMES
    assert not imports(module)[1] & {"torch", "torchvision", "tensorflow"}


def test_there_are_no_packages_inside_the_package():
    assert [path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"] == []


@pytest.mark.parametrize(("file", "line"), commands(), ids=lambda text: text[:60])
def test_every_command_we_write_down_is_one_that_the_program_takes(monkeypatch, file, line):
    taken, table = [], cli.commands()
    for parser in table.values():
        parser.set_defaults(handler=taken.append)
    monkeypatch.setattr(cli, "commands", lambda: table)
    assert cli.main(shlex.split(line)[1:]) == 0
    (args,) = taken
    if path := getattr(args, "config", None):
        assert path.is_relative_to("configs")
        programs = {"sft": options.SFT, "grpo": options.GRPO}
        program = programs.get(line.split()[1])
        load = functools.partial(config.load, program) if program else options.load
        load(HOME / path, args.overrides)


def test_every_key_in_the_readme_exists():
    known = {*config.keys(options.SFT), *config.keys(options.GRPO)}
    sections = {key.split(".")[0] for key in known if "." in key}
    keys = {key for key in re.findall(r"`([a-z_]+\.[a-z_.]+)`", README) if key.split(".")[0] in sections}
    keys -= {key for key in keys if (PACKAGE / key).exists() or key.endswith((".json", ".jsonl", ".yaml"))}
    assert len(keys) > 8
    assert keys <= known


def test_scripts_and_configurations_that_the_readme_names_exist():
    for path in set(re.findall(r"\b((?:scripts|configs)/[a-z0-9_]+\.[a-z]+)", README)):
        assert (HOME / path).is_file(), path
