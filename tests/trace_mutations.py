"""Lies for the checker of reasoning: one word or one box of a text made wrong, by other code than the package's."""

import random
import re

from surgery_r1_jax import vocabulary

NAMES = {
    "instrument": vocabulary.TOOLS,
    "state": vocabulary.STATES,
    "location": vocabulary.LOCATIONS,
}
_BOX = re.compile(r"\[[^\]]*\]")


def mutate(text: str, what: str, rng: random.Random) -> str | None:
    """The text with one instrument, state, location or box changed; None where it has none."""
    if what == "box":
        hits = list(_BOX.finditer(text))
    else:
        hits = list(re.finditer(r"\b(?:" + "|".join(NAMES[what]) + r")\b", text))
    if not hits:
        return None
    hit = rng.choice(hits)
    return (
        text[: hit.start()]
        + (_moved(hit[0], rng) if what == "box" else _another(hit[0], what, rng))
        + text[hit.end() :]
    )


def _another(name: str, what: str, rng: random.Random) -> str:
    return rng.choice([other for other in NAMES[what] if other != name])


def _moved(box: str, rng: random.Random) -> str:
    """One edge somewhere else, or all of them by a little."""
    edges = [float(edge) for edge in box.strip("[]").split(",")]
    if rng.random() < 0.5:
        at = rng.randrange(4)
        step = rng.choice((-1, 1)) * rng.randint(2, 60)
        edges[at] += step if edges[at] + step >= 0 else -step
    else:
        edges = [edge + rng.randint(1, 9) for edge in edges]
    return f"[{', '.join(f'{edge:g}' for edge in edges)}]"


def skeleton(sentence: str) -> str:
    """A sentence without its names, numbers and boxes."""
    sentence = _BOX.sub("BOX", sentence)
    sentence = re.sub("|".join(sorted(vocabulary.EXTENDED_CLASSES, key=len, reverse=True)), "NAME", sentence)
    return re.sub(r"\b(one|two|three|four|single|[0-9]+)\b", "N", sentence, flags=re.IGNORECASE)


def sentences(text: str) -> list[str]:
    """What stands between full stops."""
    return re.split(r"(?<=\.) ", text)
