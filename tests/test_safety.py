"""A gate over the source of the whole package: nothing in it can run code out of a file or a text."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "surgery_r1_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))

BUILTINS = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code", "runpy"}
LOADERS = {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.load", "os.system", "os.popen"}
# Readers of model text search for fixed strings only; a pattern can take more than linear time.
WITHOUT_PATTERNS = {"answer.py", "claims.py", "codec.py", "reasoning.py", "teacher.py"}


def offences(source, name="any.py"):
    """What a source file does that it must not, as (line, what)."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                imported = {alias.name.partition(".")[0] for alias in aliases}
            case ast.ImportFrom(module=str(module), names=aliases):
                imported = {module.partition(".")[0]}
                for alias in aliases:
                    if f"{module}.{alias.name}" in LOADERS:
                        yield node.lineno, f"{module}.{alias.name}"
            case ast.Name(id=called) if called in BUILTINS:
                yield node.lineno, called
                continue
            case ast.Attribute() if ast.unparse(node) in LOADERS | {f"builtins.{name}" for name in BUILTINS}:
                yield node.lineno, ast.unparse(node)
                continue
            case ast.keyword(arg="allow_pickle" | "trust_remote_code" | "shell" as option, value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield value.lineno, f"{option}={ast.unparse(value)}"
                continue
            case _:
                continue
        for module in imported & (MODULES | ({"re", "regex"} if name in WITHOUT_PATTERNS else set())):
            yield node.lineno, f"import of {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_module_can_run_code_from_data(path):
    assert list(offences(path.read_text(encoding="utf-8"), path.name)) == []


def test_the_gate_sees_the_whole_package():
    names = {path.name for path in SOURCES}
    assert names >= WITHOUT_PATTERNS | {"__init__.py", "records.py", "vocabulary.py"}


@pytest.mark.parametrize(
    "source",
    [
        *("eval(text)", "exec(text)", "compile(text, '', 'eval')", "__import__('os')", "f = eval"),
        *(
            "import pickle",
            "import pickle as p",
            "import os, marshal",
            "from pickle import loads",
            "import dill.source",
        ),
        *("import builtins\nbuiltins.eval(text)", "yaml.load(text)", "yaml.load(text, Loader=yaml.SafeLoader)"),
        *("from yaml import load", "yaml.unsafe_load(text)", "torch.load(path)", "from torch import load"),
        *("np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=flag)", "os.system('ls')"),
        *("AutoModel.from_pretrained(path, trust_remote_code=True)", "subprocess.run(text, shell=True)"),
        *("def f():\n    import pickle", "class A:\n    x = lambda s: eval(s)"),
    ],
)
def test_the_gate_catches(source):
    assert list(offences(source))


@pytest.mark.parametrize(
    "source",
    [
        *("import re", "lowered.compile()", "re.compile('a')", "yaml.safe_load(text)", "np.load(path)", "model.eval()"),
        *("np.load(path, allow_pickle=False)", "load(path, trust_remote_code=False)", "'eval(x)'", "# exec"),
    ],
)
def test_the_gate_lets_pass(source):
    assert not list(offences(source))


def test_the_reader_of_model_text_has_no_patterns():
    assert list(offences("import re", "answer.py"))
    assert list(offences("from re import compile", "answer.py"))
