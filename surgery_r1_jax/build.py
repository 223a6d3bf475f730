"""`data build`: every question of a data set as six records, each wanting something else of the answer.

    vqa_direct         the answer                     vqa_cot         reasoning, then the answer
    grounding_direct   the box                        grounding_cot   reasoning, then the box
    vqla_direct        both                           vqla_cot        reasoning, then both

Surgery-R1-54k has six times as many records as EndoVis-18-VQLA has training questions (9,014); what they are was never
published, and these six are our reading. What is made is a folder:

    records.jsonl     a record a line: image, question, answer, bbox, want, kind, reasoning, sequence, split, id
    data.json         what boxes are written in (pixels, edges from 0), the classes, what locations are relative to
    stats.json        how many records there are of what kind, where reasoning came from and why some was refused
    frames/           the images: linked where the file system can, else copied
    dialogues.jsonl   by choice: the questions of a frame as one conversation

No reasoning gets in that `tracecheck` does not find borne out by the labels. The same arguments write the same bytes.
"""

import dataclasses
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from surgery_r1_jax import answer, files, labellist, location, places, records, teacher, tracecheck, traces, vocabulary
from surgery_r1_jax.errors import InputError, printable
from surgery_r1_jax.recordfile import FORMS
from surgery_r1_jax.records import Box, Frame, Record

MOST = 100  # records of one kind from one question


class Item(NamedTuple):
    """A record to be made."""

    frame: Frame
    number: int  # of the question in its frame
    form: str
    copy: int  # of several records of one kind

    @property
    def id(self) -> str:
        """Names it in the whole set."""
        return "/".join((self.frame.id, str(self.number), self.form, *([str(self.copy)] if self.copy else [])))

    @property
    def record(self) -> Record:
        """The question."""
        return self.frame.records[self.number]

    @property
    def want(self) -> int:
        """What its prompt asks for, as an index into answer.WANT."""
        return FORMS[self.form][0]

    @property
    def reasoned(self) -> bool:
        """Whether reasoning stands in front."""
        return FORMS[self.form][1]


def run(
    source: str | Path,
    out: str | Path,
    *,
    kinds: Mapping[str, float] | None = None,
    split: str = "all",
    seed: int = 0,
    size: tuple[int, int] = labellist.SIZE,
    dialogues: bool = False,
    ask: teacher.Teacher | None = None,
) -> dict:
    """Make the training set `out` of a data set folder or a list of labels; print and return its statistics.

    `kinds` gives the number of records of each kind that a question becomes, all 1 by default; of 0.5 every other
    question is drawn by lot. `size` is (width, height) of the frames of a list. `ask` is who writes the reasoning
    in place of `traces`. `out` is there whole or not at all. Raises: InputError.
    """
    source, out, kinds = places.fetched(source), files.vacant(out), _checked(kinds or dict.fromkeys(FORMS, 1.0))
    frames, with_images = read(source, size)
    if ask and not with_images:
        raise InputError(f"{printable(source)}: a list of labels has no frames for a teacher to look at; name a folder")
    if any(record.want is not None for frame in frames for record in frame.records):
        raise InputError(f"{printable(source)}: its records are told what to ask for already; build from their source")
    rule, *_ = location.fit(frames)
    frames = records.split(frames, split)
    items = list(plan(frames, kinds, seed))
    if not items:
        raise InputError("no record is left; choose kinds with higher weights")
    reasoned = [item for item in items if item.reasoned]
    questions = [teacher.Question(item.frame, item.record, item.want, item.copy, rule.reference) for item in reasoned]
    taught = teacher.write(ask, questions) if ask else [None] * len(questions)
    texts = dict(zip((item.id for item in reasoned), taught, strict=True))

    try:
        with files.new_folder(out) as part:
            stats = _write(part, items, texts, rule.reference, seed, dialogues)
            if with_images:
                for frame in _bar(frames, "linking frames"):
                    _link(frame.image, part / _image(frame))
            about = {
                "name": out.name,
                "boxes": "pixel",
                "classes": frames[0].classes,
                "location": dataclasses.asdict(rule),
            }
            if not with_images:
                about |= {"images": False, "size": size}
            stats = {"frames": len(frames), "questions": sum(len(frame.records) for frame in frames)} | stats
            stats |= {"seed": seed, "weights": kinds}
            files.write_json(part / "data.json", about)
            files.write_json(part / "stats.json", stats)
    except OSError as error:
        raise InputError(f"{printable(out)}: cannot be written ({error.strerror or error}); make room there") from error
    _print(stats, out)
    return stats


def read(source: Path, size: tuple[int, int] = labellist.SIZE) -> tuple[list[Frame], bool]:
    """The frames of a data set folder or of a list of labels, and whether their images are there."""
    if source.is_file():
        return labellist.read(source, size), False
    return records.read(source), True


def plan(frames: Sequence[Frame], kinds: Mapping[str, float], seed: int) -> Iterator[Item]:
    """The records to be made, frame by frame and question by question."""
    for frame in frames:
        for number in range(len(frame.records)):
            for form, weight in kinds.items():
                whole, rest = divmod(weight, 1)
                more = rest > 0 and random.Random(f"{seed}/{frame.id}/{number}/{form}").random() < rest
                yield from (Item(frame, number, form, copy) for copy in range(int(whole) + more))


def _write(
    folder: Path, items: Sequence[Item], texts: Mapping[str, str | None], reference: str, seed: int, dialogues: bool
) -> dict:
    """The records' files; their statistics."""
    count = {name: Counter() for name in ("kinds", "asked", "splits", "reasoning", "refused")}
    lengths, turns = [], {}
    with (folder / "records.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for item in _bar(items, "writing records"):
            row = _row(item)
            if item.reasoned:
                text, origin, refused = _reasoning(item, texts[item.id], reference, seed)
                count["refused"].update(f"{whose}: {reason}" for whose, reason in refused)
                if text is None:
                    continue
                row["reasoning"] = text
                count["reasoning"][origin] += 1
                lengths.append(len(text))
            count["kinds"][item.form] += 1
            count["asked"][vocabulary.KINDS[item.record.kind]] += 1
            count["splits"][row["split"]] += 1
            file.write(json.dumps(row) + "\n")
            if dialogues:
                turns.setdefault(item.frame.id, {}).setdefault(item.number, []).append(row)
    if dialogues:
        with (folder / "dialogues.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(_dialogue(name, rows, seed)) + "\n" for name, rows in turns.items())
    stats = {"records": count["kinds"].total(), **{name: dict(found) for name, found in count.items()}}
    stats["kinds"] = {form: count["kinds"][form] for form in FORMS if form in count["kinds"]}
    lengths.sort()
    at = {f"p{share}": lengths[len(lengths) * share // 100] for share in (10, 50, 90) if lengths}
    return stats | {"reasoning_characters": at}


def _row(item: Item) -> dict:
    """A record as its line says it, but for the reasoning."""
    frame, record = item.frame, item.record
    return {
        "id": item.id,
        "image": str(_image(frame)),
        "sequence": frame.sequence,
        "split": records.split_of_frame(frame),
        "kind": item.form,
        "want": answer.WANT[item.want],
        "question": record.question,
        "answer": record.answer,
        "bbox": pixels(record.box, frame),
    }


def pixels(box: Box, frame: Frame) -> list[float]:
    """A box in pixels of its frame: whole numbers where it lies on pixel edges."""
    edges = [round(edge * side, 6) for edge, side in zip(box, (frame.width, frame.height) * 2, strict=True)]
    return [int(edge) if edge.is_integer() else edge for edge in edges]


def _reasoning(
    item: Item, taught: str | None, reference: str, seed: int
) -> tuple[str | None, str, list[tuple[str, tracecheck.Reason]]]:
    """The first reasoning that the labels bear out and whose it is; and whose were refused, and why."""
    refused = []
    written = traces.write(item.frame, item.record, want=item.want, seed=f"{seed}/{item.id}", reference=reference)
    for whose, text in (("data set", item.record.think), ("teacher", taught), ("written", written)):
        if not text:
            continue
        reason = tracecheck.check(text, item.frame, item.record, want=item.want, reference=reference)
        if reason is tracecheck.Reason.OK:
            return text, whose, refused
        refused.append((whose, reason))
    return None, "", refused


def _dialogue(name: str, rows: Mapping[int, list[dict]], seed: int) -> dict:
    """All questions of a frame in an order drawn by lot, each once, in one of the kinds it was made into."""
    rng = random.Random(f"{seed}/{name}")
    asked = [rng.choice(several) for several in rows.values()]
    rng.shuffle(asked)
    shared = ("image", "sequence", "split")
    turns = [{key: value for key, value in row.items() if key not in shared} for row in asked]
    return {"id": name, **{key: asked[0][key] for key in shared}, "turns": turns}


# Files


def _image(frame: Frame) -> PurePosixPath:
    """Where a frame's image lies in what is made."""
    name = frame.id.removesuffix(frame.image.suffix).removeprefix("frames/")
    return PurePosixPath("frames", name + frame.image.suffix)


def _link(image: Path, target: Path) -> None:
    """The image's own bytes under another name, in no more room where the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(image, Path):
        target.write_bytes(image.read_bytes())
        return
    image = image.resolve()  # a link that is linked would still be a link
    try:
        os.link(image, target)
    except FileExistsError:
        raise InputError(f"{printable(image)}: a second image for {target.name}; rename one") from None
    except OSError:  # another disk, or none that can link
        shutil.copyfile(image, target)


def _checked(kinds: Mapping[str, float]) -> dict[str, float]:
    """The weights in the order of FORMS."""
    for name, weight in kinds.items():
        if name not in FORMS:
            raise InputError(f"unknown kind '{name}'; there are {', '.join(FORMS)}")
        if not 0 <= weight <= MOST:
            raise InputError(f"kind {name} has weight {weight}; take 0 to {MOST}")
    return {name: kinds[name] for name in FORMS if kinds.get(name)}


def _bar(items: Sequence, about: str) -> Iterator:
    bar = Console(stderr=True)
    return track(items, about, len(items), console=bar, transient=True, disable=not bar.is_terminal)


def _print(stats: dict, out: Path) -> None:
    """The statistics as a table."""
    table = Table()
    table.add_column("kind")
    table.add_column("records", justify="right")
    for name, number in stats["kinds"].items():
        table.add_row(name, f"{number:,}")
    console = Console()
    console.print(f"{stats['records']:,} records of {stats['questions']:,} questions", highlight=False)
    console.print(table)
    for whose, number in stats["reasoning"].items():
        console.print(f"reasoning, {whose}: {number:,}", highlight=False)
    for why, number in stats["refused"].items():
        console.print(f"refused, {why}: {number:,}", highlight=False)
    console.print(printable(out), markup=False, highlight=False, soft_wrap=True)
