"""Arguments of the command line: a parser that tells mistakes in one line with their remedy, and readers of values."""

import argparse
import difflib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from surgery_r1_jax import places
from surgery_r1_jax.errors import InputError


class Parser(argparse.ArgumentParser):
    """A command's ArgumentParser, which knows its flags and raises InputError for a mistake."""

    def __init__(self, name: str, about: str, example: str, takes_overrides: bool):
        self.flags: list[str] = []
        self.takes_overrides = takes_overrides
        more = "\n\nany key of the configuration can be overridden: --section.key=value" if takes_overrides else ""
        super().__init__(
            prog=f"surgery-r1 {name}",
            description=about,
            epilog=f"example:\n  surgery-r1 {name} {example}{more}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """As argparse's; remembers the flag."""
        action = super().add_argument(*names, **options)
        self.flags += [name for name in action.option_strings if name.startswith("--")]
        return action

    def sort(self, words: list[str]) -> tuple[list[str], list[str]]:
        """The command's own words and the overrides `--section.key=value` among them; refuses unknown flags."""
        own, overrides = [], []
        for word in words:
            flag, equals, _ = word.partition("=")
            if not word.startswith("--") or flag in self.flags:
                own.append(word)
            elif not self.takes_overrides or difflib.get_close_matches(flag, self.flags, 1, 0.8):
                raise InputError(f"unknown flag '{flag}'; {nearest(flag, self.flags)}")
            elif not equals:
                raise InputError(f"unknown flag '{flag}'; to override a key of the configuration write {flag}=VALUE")
            else:
                overrides.append(word)
        return own, overrides

    def error(self, message: str) -> NoReturn:
        """Refuse instead of leaving the program."""
        raise InputError(f"{message}; see {self.prog} --help")


def nearest(wrong: str, names: Iterable[str]) -> str:
    """The remedy for a mistyped name."""
    near = difflib.get_close_matches(wrong, names, 1)
    return f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names)}"


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """Reads an int or a float within limits."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} {limits}, given '{text}'")
        return value

    return read


def byte_count(text: str) -> int:
    """Reads a number of bytes such as 500MB or 2GiB."""
    number = text.rstrip("BGMKTi")
    units = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    unit = text[len(number) :].removesuffix("B")
    if not (number.isdecimal() and len(number) < 16 and int(number) > 0 and unit.removesuffix("i") in units):
        raise argparse.ArgumentTypeError(f"expected a size as in 500MB or 2GB, given '{text}'")
    return int(number) * (1024 if unit.endswith("i") else 1000) ** units[unit.removesuffix("i")]


def on_disk(text: str) -> Path:
    """Reads the path of a file or folder on this machine."""
    if places.remote(text):
        raise argparse.ArgumentTypeError(f"expected a path on this machine, given '{text}'")
    return places.place(text)


def pixels(text: str) -> tuple[int, int]:
    """Reads WIDTHxHEIGHT."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and 0 < len(width) < 6 and 0 < len(height) < 6):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT as in 1280x1024, given '{text}'")
    return int(width), int(height)


def span(text: str) -> tuple[int, int]:
    """Reads FIRST:LAST, steps counted from 1."""
    ends = [int(end) if end.isdecimal() and len(end) < 16 else 0 for end in text.split(":")]
    if len(ends) != 2 or not 1 <= ends[0] <= ends[1]:
        raise argparse.ArgumentTypeError(f"expected FIRST:LAST as in 10:13, given '{text}'")
    return ends[0], ends[1]


def weights(text: str) -> dict[str, float]:
    """Reads names with a weight each, as in a,b=2,c=0.5; without one it is 1."""
    read = {}
    for part in text.split(","):
        name, given, weight = part.strip().partition("=")
        if not name or name in read:
            raise argparse.ArgumentTypeError(f"expected different names as in a,b=2,c=0.5, given '{text}'")
        read[name] = number(float, 0)(weight) if given else 1.0
    return read
