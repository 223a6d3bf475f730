"""YAML files to typed, frozen configurations, and back.

`options.py` holds the classes; a program's nests those of its parts as sections. Every mistake is refused with its
place and a remedy:

    configs/sft.yaml:7: unknown key 'optim.leraning_rate'; did you mean 'optim.learning_rate'?

Relative paths in a configuration are relative to the working directory, not to the file.
Scalars are read by the YAML 1.2 core schema: `1e-5` is a number; `yes`, `off`, `010` and `1:30` are strings.
"""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic
import yaml

from surgery_r1_jax import files
from surgery_r1_jax.errors import InputError

C = TypeVar("C", bound="Config")
KeyPath = tuple[str | int, ...]  # ("optim", "betas", 0)
Places = dict[KeyPath, str]  # where each key was given: "configs/sft.yaml:7" or "--optim.betas"

MAX_PROBLEMS = 20  # listed in one message
MAX_GIVEN = 60  # characters of a refused value that are shown
MAX_SUGGESTIONS = 3


class Config(pydantic.BaseModel):
    """A section of keys: frozen, none unknown, finite floats, exact types (only an int may pass for a float).

    A rule that a field cannot state goes into a pydantic validator that raises ValueError with one sentence.
    Use tuples, not lists, so that a configuration stays hashable.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def load(cls: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """The configuration in a YAML file, with overrides `--section.key=value` laid over it.

    Raises InputError that lists every mistake, one per line, each with its file and line or its flag.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the configuration: {error.strerror}") from None
    return parse(cls, data, str(path), overrides)


def parse(cls: type[C], text: str | bytes, name: str, overrides: Sequence[str] = ()) -> C:
    """As `load`, for YAML text; `name` stands for the file in messages."""
    places: Places = {}
    problems: list[str] = []
    tree = _read(text, name, places, problems)
    for flag in overrides:
        _override(tree, flag, places, problems)
    try:
        # Through JSON, because its strict mode still lets a list become a tuple and a string a path.
        tree = cls.model_validate_json(json.dumps(tree)).model_dump(mode="json")
        config = cls.model_validate_json(json.dumps(tree))  # once more, now that the defaults are in it
    except pydantic.ValidationError as error:
        problems += _explain(cls, tree, error, name, places)
    if problems:
        rest = len(problems) - MAX_PROBLEMS
        more = [f"{name}: and {rest} more problems"] if rest > 0 else []
        raise InputError("\n".join(problems[:MAX_PROBLEMS] + more))
    return config


def dump(config: Config) -> str:
    """YAML text from which `parse` makes an equal configuration; every key is written, defaults too."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def save(config: Config, path: str | Path) -> None:
    """Write `dump(config)` to a file, whole or not at all."""
    files.write_text(path, dump(config))


def keys(cls: type[Config], prefix: str = "") -> Iterator[str]:
    """Every key of a configuration class and of its sections, dotted: 'optim', 'optim.learning_rate', ..."""
    for name, field in cls.model_fields.items():
        yield prefix + name
        for section in _sections(field.annotation):
            yield from keys(section, f"{prefix}{name}.")


# Reading: text -> plain tree of dict, list and scalars, with the place of every key


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and without anchors, aliases and tags."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - filled below

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or getattr(event, "tag", None):
            raise yaml.composer.ComposerError(
                None,
                None,
                "anchors (&), aliases (*) and tags (!) are not allowed; quote a text",
                event.start_mark,
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes the strings which `_Loader` would read as something else."""


_EXPONENT = r"[eE][-+]?[0-9]+"
_FLOAT = rf"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:{_EXPONENT})?|[0-9]+{_EXPONENT}|\.(?:inf|Inf|INF))"
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,38})", list("-+0123456789")),
    ("float", rf"{_FLOAT}|\.(?:nan|NaN|NAN)", list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _read(text: str | bytes, name: str, places: Places, problems: list[str]) -> dict[str, Any]:
    """The tree of a YAML document; an empty one is {}."""
    try:
        node = _Loader(text).get_single_node()
        tree = {} if node is None else _plain(node, (), name, places, problems)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{name}:{mark.line + 1 if mark else 1}: not valid YAML: {reason}") from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise InputError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{name}: not a configuration: nested too deeply") from None
    if not isinstance(tree, dict):
        raise InputError(f"{name}: expected 'key: value' lines, given {_given(tree)}")
    return tree


def _plain(node: yaml.Node, path: KeyPath, name: str, places: Places, problems: list[str]) -> Any:
    """A YAML node as dict, list or scalar; notes the place of every key and keys wrong in themselves."""
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node.tag, node.value)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for i, item in enumerate(node.value):
            places[(*path, i)] = f"{name}:{item.start_mark.line + 1}"
            items.append(_plain(item, (*path, i), name, places, problems))
        return items
    section: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith(":str"):
            problems.append(f"{place}: a key must be a plain name, given {_given(key_node.value)}")
            continue
        here = (*path, key_node.value)
        if here in places:
            problems.append(f"{place}: duplicate key '{_dotted(here)}', already given at {places[here]}; remove one")
            continue
        places[here] = place
        section[key_node.value] = _plain(value_node, here, name, places, problems)
    return section


def _scalar(tag: str, text: str) -> Any:
    """The value of a scalar whose tag our own patterns chose."""
    match tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _override(tree: dict[str, Any], flag: str, places: Places, problems: list[str]) -> None:
    """Lay `--section.key=value` over the tree; the value is a scalar, a quoted text or a list in brackets."""
    key, equals, text = flag.removeprefix("--").partition("=")
    place, path, text = f"--{key}", tuple(key.split(".")), text.strip()
    if not equals:
        problems.append(f"{place}: a value is missing; write {place}=VALUE")
        return
    if text[:1] in ("[", '"', "'"):
        value = _plain_value(text, place, problems)
    else:  # not parsed, so that a glob or a '#' needs no quotes beyond those of the shell
        value = _scalar(_Loader("").resolve(yaml.ScalarNode, text, (True, False)), text)
    section = tree
    for depth in range(1, len(path)):
        below = section.get(path[depth - 1])
        if below is None:
            below = section[path[depth - 1]] = {}
            places[path[:depth]] = place
        if not isinstance(below, dict):
            problems.append(f"{place}: '{_dotted(path[:depth])}' holds {_given(below)}, which has no keys")
            return
        section = below
    section[path[-1]] = value
    places[path] = place


def _plain_value(text: str, place: str, problems: list[str]) -> Any:
    """The quoted text or the list of an override."""
    try:
        return _plain(_Loader(text).get_single_node(), (), place, {}, problems)
    except (yaml.YAMLError, RecursionError):
        problems.append(f"{place}: not valid YAML: {_given(text)}; check its quotes and brackets")
        return None


# Refusing: pydantic's errors -> one line each, with place, reason and remedy


def _explain(cls: type[Config], tree: Any, error: pydantic.ValidationError, name: str, places: Places) -> list[str]:
    """One line per mistaken key, in the order in which the keys were given."""
    mistakes: dict[KeyPath, list[Any]] = {}  # a union has one entry for each of its members
    for entry in error.errors(include_url=False):
        mistakes.setdefault(_given_path(tree, entry), []).append(entry)
    order = {path: i for i, path in enumerate(places)}

    def place(path: KeyPath) -> KeyPath:
        """The key itself where it was given, or else the nearest section around it."""
        while path and path not in places:
            path = path[:-1]
        return path

    reasons = {path: _reason(cls, path, entries) for path, entries in mistakes.items()}
    hints = " ".join(reason.partition("did you mean")[2] for reason in reasons.values())

    def misspelt(path: KeyPath) -> bool:
        """Whether a missing key was given under a wrong name, which is reported already."""
        return mistakes[path][0]["type"] == "missing" and f"'{_dotted(path)}'" in hints

    paths = [path for path in reasons if not misspelt(path)]
    paths.sort(key=lambda path: order.get(place(path), -1))
    return [f"{places.get(place(path), name)}: {reasons[path]}" for path in paths]


def _given_path(tree: Any, entry: Any) -> KeyPath:
    """The key that an error is about, without the names of union members, which nobody wrote."""
    path: KeyPath = ()
    for part in entry["loc"]:
        known = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
        if part in known:
            tree, path = tree[part], (*path, part)
    return (*path, entry["loc"][-1]) if entry["type"] == "missing" else path


def _reason(cls: type[Config], path: KeyPath, entries: list[Any]) -> str:
    """Why a key is refused, and the remedy."""
    kind, message, given = entries[0]["type"], entries[0]["msg"], entries[0]["input"]
    if kind == "extra_forbidden":
        while isinstance(given, dict) and len(given) == 1:  # name what stands in an unknown section
            ((key, given),) = given.items()
            path = (*path, key)
        return f"unknown key '{_dotted(path)}'; {_remedy(cls, path)}"
    if kind == "missing":
        return f"missing key '{_dotted(path)}', which has no default"
    subject = f"'{_dotted(path)}': " if path else ""
    if kind == "value_error":
        return f"{subject}{entries[0]['ctx']['error']}"
    wanted = [entry["msg"].removeprefix("Input should be ") for entry in entries]
    if kind == "model_type":
        wanted[0] = "a section with keys of its own"
    if message.startswith("Input should be "):
        return f"{subject}expected {' or '.join(dict.fromkeys(wanted))}, given {_given(given)}"
    return f"{subject}{message[:1].lower()}{message[1:]}, given {_given(given)}"


def _remedy(cls: type[Config], path: KeyPath) -> str:
    """What to write in place of an unknown key: the nearest keys of any section, else those of its own."""
    wrong = _normal(_dotted(part for part in path if not isinstance(part, int)))
    known = dict.fromkeys(keys(cls))

    def likeness(key: str) -> float:
        leaf = _ratio(key.rpartition(".")[2], wrong.rpartition(".")[2])
        return 0.6 * leaf + 0.4 * _ratio(key, wrong)

    scores = {key: likeness(_normal(key)) for key in known}
    best = sorted(known, key=scores.__getitem__, reverse=True)[:MAX_SUGGESTIONS]
    near = [key for key in best if scores[key] >= max(0.55, scores[best[0]] - 0.15)]
    if near:
        return f"did you mean {' or '.join(repr(key) for key in near)}?"
    own = [key for key in known if key.rpartition(".")[0] == wrong.rpartition(".")[0]] or list(cls.model_fields)
    return f"known keys: {', '.join(own)}"


def _ratio(a: str, b: str) -> float:
    """Likeness of two names in [0, 1]; 'lk' is like 'kl'."""
    if sorted(a) == sorted(b) and a != b:
        return 0.9
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def _normal(key: str) -> str:
    """A key without the differences that are mere habit: case and hyphens."""
    return key.lower().replace("-", "_")


def _sections(annotation: Any) -> list[type[Config]]:
    """The section classes in a field's annotation, also inside Optional, unions and tuples."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _dotted(path: Any) -> str:
    """A key as it is written in an override."""
    return ".".join(map(str, path))


def _given(value: Any) -> str:
    """A refused value as YAML would show it, on one line and not too long."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= MAX_GIVEN else text[: MAX_GIVEN - 3] + "..."
