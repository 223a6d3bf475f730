"""A folder of one's own frames: one table of records beside the images, with columns of fixed names.

    ROOT/records.jsonl   a JSON object a line, or ROOT/records.csv with a line of column names
    ROOT/data.json       {"boxes": "pixel", "classes": ["open", "closed"]}

    image       path below ROOT of a PNG or JPEG          reasoning   text before the answer
    question    any text                                  sequence    the video; without it the image's folder
    answer      one of the classes                        split       train, dev, val or external
    bbox        x0 y0 x1 y1, or a JSON list               want, kind  what the prompt asks for: answer.WANT, FORMS

Boxes are edges, counted from 0 at the left and the top: the whole of a 640x480 frame is 0 0 640 480 in pixels, 0 0 1 1
in units, 0 0 1000 1000 in thousandths. Which of them is declared once, in data.json or by who reads; never guessed.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from surgery_r1_jax import answer, places, vocabulary
from surgery_r1_jax.errors import InputError, one_line, printable
from surgery_r1_jax.frames import Frame, Report, image_size, natural, require_file
from surgery_r1_jax.labels import MAX_LINE, REPEATED, Box, Problem, Record, Refused, unit_box

FILES = ("records.jsonl", "records.csv")
REQUIRED = ("image", "question", "answer", "bbox")
OPTIONAL = ("reasoning", "sequence", "split", "id", "kind", "want")
BOXES = {"pixel": None, "unit": 1, "thousand": 1000}  # length of a side in what boxes are written in; None: its pixels
SPLITS = ("train", "dev", "val", "external")
FORMS = {  # of a training set in the manner of Surgery-R1-54k: what is wanted, and whether it is reasoned first
    f"{name}_{how}": (want, how == "cot")
    for want, name in enumerate(("vqa", "grounding", "vqla"))
    for how in ("direct", "cot")
}

MAX_CLASSES = 512  # more different answers are free text
_MAX_FILE = 1 << 30  # bytes
_MAX_TEXT = 20_000  # characters of the reasoning
_PLACES = ("frames", "images", "left_frames")  # folders that name no sequence
_NOT_IN_CLASSES = set('"\\<>')  # the output grammar has no escape for them

Row = tuple[str, Mapping[str, object]]  # "path:line", and the columns


@dataclasses.dataclass
class _Gathered:
    """A frame while its records are read."""

    image: Path
    size: tuple[int, int]
    sequence: str
    split: str | None
    records: list[Record] = dataclasses.field(default_factory=list)
    first: dict[tuple, str] = dataclasses.field(default_factory=dict)  # where a question was asked first


def find(root: Path) -> Path | None:
    """The table of records in a folder, if there is one. Raises: InputError where there are two."""
    found = [root / name for name in FILES if (root / name).exists()]
    if len(found) > 1:
        raise InputError(f"{printable(root)}: holds {' and '.join(FILES)}; keep one of them")
    return found[0] if found else None


def declared(root: Path) -> dict:
    """The entries of data.json; none where there is no such file. Raises: InputError for what cannot be read."""
    file = root / "data.json"
    if not file.exists():
        return {}
    try:
        require_file(file, root.resolve(), str(file))
        entries = json.loads(file.read_text("utf-8-sig"))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{printable(file)}: not JSON in UTF-8 ({one_line(error)}); mend it") from None
    if not isinstance(entries, dict):
        raise InputError(f'{printable(file)}: not a JSON object; write {{"boxes": "pixel"}}')
    if "classes" in entries:
        names = entries["classes"]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise InputError(f'{printable(file)}: "classes" must be a list of names')
        entries["classes"] = _checked(names, str(file))
    return entries


def space(root: str | Path, given: str | None = None) -> str:
    """The key of BOXES that a folder's boxes are read in."""
    return declared(places.fetched(root)).get("boxes", given) or "pixel"


def read(
    file: Path, inside: Path, report: Report, *, classes: tuple[str, ...] | None, boxes: str | None, strict: bool
) -> list[Frame]:
    """The frames of a table, sequences and frames in natural order; every problem is reported.

    Raises: InputError for what costs the whole table.
    """
    about = declared(file.parent)
    side = _side(file.parent, about, boxes)
    rows = list(_rows(file, inside, report))
    classes = classes or about.get("classes") or _seen(rows, str(file))
    gathered: dict[str, _Gathered | None] = {}  # None: its image is refused, which is told once
    for source, row in rows:
        try:
            _add(source, row, gathered, file.parent, inside, report, classes, side, strict)
        except Refused as refusal:
            about = gathered.get(str(_path(row)))
            report(dataclasses.replace(refusal.problem, image=str(about.image)) if about else refusal.problem)
    frames = [
        Frame(name, one.sequence, one.image, *one.size, tuple(one.records), one.split, classes)
        for name, one in gathered.items()
        if one and one.records
    ]
    frames.sort(key=lambda frame: (natural(frame.sequence), natural(frame.id)))
    return _split(frames, file, report)


def _side(root: Path, about: dict, given: str | None) -> float | None:
    """The length of a side in the units of the boxes; None for that of the image in pixels."""
    units = about.get("boxes", given)
    if units is None:
        raise InputError(
            f"{printable(root)}: what are its boxes written in? Say so once: write "
            '{"boxes": "pixel"} (or "unit", "thousand") into its data.json, or give --boxes or data.boxes'
        )
    if units not in tuple(BOXES):
        raise InputError(f"{printable(root)}: boxes in {str(units)!r:.40}; take pixel, unit or thousand")
    if given and units != given:
        raise InputError(f"{printable(root)}: data.json declares boxes in {units}, not in {given}; drop one of them")
    return BOXES[units]


def _rows(file: Path, inside: Path, report: Report) -> Iterator[Row]:
    """The lines that are in order, with the columns that are known and not empty; the others are reported."""
    require_file(file, inside, f"{file}:1")
    if file.stat().st_size > _MAX_FILE:
        raise InputError(f"{printable(file)}: more than {_MAX_FILE} bytes; split the data set")
    lines = _json_lines(file) if file.suffix == ".jsonl" else _csv_lines(file)
    unknown: dict[str, str] = {}
    found = False
    for source, row in lines:
        found = True
        if isinstance(row, str):
            report(Problem("error", source, row))
            continue
        for name in row.keys() - {*REQUIRED, *OPTIONAL} - unknown.keys():
            unknown[name] = source
            report(Problem("warning", source, f"column {name!r:.40} is none of those known and is left out"))
        row = {name: value.strip() if isinstance(value, str) else value for name, value in row.items()}
        row = {name: value for name, value in row.items() if value not in (None, "")}
        if missing := [name for name in REQUIRED if name not in row]:
            report(Problem("error", source, f"no {', no '.join(missing)}"))
        elif wrong := [name for name in (*REQUIRED[:3], *OPTIONAL) if not isinstance(row.get(name, ""), str)]:
            report(Problem("error", source, f"{wrong[0]} is not a text"))
        else:
            yield source, row
    if not found:
        raise InputError(f"{printable(file)}: holds no record; write one a line, with {', '.join(REQUIRED)}")


def _json_lines(file: Path) -> Iterator[tuple[str, dict | str]]:
    """Each line with its object, or with why it is none."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                problem = None if isinstance(row, dict) else "not a JSON object"
            except UnicodeDecodeError:
                problem = "not UTF-8"
            except (ValueError, RecursionError) as error:
                problem = f"not a JSON object on one line ({one_line(error)})"
            yield f"{file}:{number}", problem or row


def _csv_lines(file: Path) -> Iterator[tuple[str, dict | str]]:
    """Each line with its columns, or with why it has none. Commas divide, or semicolons where the names have them."""
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{printable(file)}:{line}: not UTF-8; save the table as CSV in UTF-8") from None
    head = text.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=";" if ";" in head and "," not in head else ",")
    try:
        names = [name.strip() for name in next(reader, [])]
        if missing := [name for name in REQUIRED if name not in names]:
            raise InputError(
                f"{printable(file)}:1: no column {', '.join(missing)}; the first line names them: {', '.join(REQUIRED)}"
            )
        before = reader.line_num
        for cells in reader:
            source, before = f"{file}:{before + 1}", reader.line_num
            if not cells:
                continue
            if len(cells) != len(names):
                yield source, f"{len(cells)} fields where the first line has {len(names)}; put quotes around commas"
            else:
                yield source, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{printable(file)}:{reader.line_num}: not CSV ({error}); mend it") from None


def _seen(rows: Iterable[Row], source: str) -> tuple[str, ...]:
    """The classes of a table that declares none: the official ones where they hold its answers, else these answers."""
    answers = sorted({str(row["answer"]) for _, row in rows}, key=natural)
    for official in (vocabulary.CLASSES, vocabulary.EXTENDED_CLASSES):
        if all(vocabulary.class_index(answer, official) >= 0 for answer in answers):
            return official
    if len(answers) > MAX_CLASSES:
        raise InputError(f"{printable(source)}: {len(answers)} different answers; they must be classes, not free text")
    names: list[str] = []
    for name in answers:
        if vocabulary.class_index(name, names) < 0:  # another spelling of one that is there is no class
            names.append(name)
    return _checked(names, source)


def _checked(names: list[str], source: str) -> tuple[str, ...]:
    """Class names that can be written, read back and told apart. Raises: InputError for others."""
    for index, name in enumerate(names):
        if not (name.isascii() and name.isprintable() and name.strip() == name) or not 0 < len(name) <= 100:
            raise InputError(f"{printable(source)}: class {name!r:.60} must be 1 to 100 printable ASCII characters")
        if bad := sorted(_NOT_IN_CLASSES & set(name)):
            raise InputError(f"{printable(source)}: class {name!r} holds {bad[0]}, which an answer cannot; rename it")
        if vocabulary.class_index(name, names) != index:
            raise InputError(f"{printable(source)}: class {name!r} is there twice, give or take separators; drop one")
    return tuple(names)


def _add(
    source: str,
    row: Mapping[str, object],
    gathered: dict[str, _Gathered | None],
    root: Path,
    inside: Path,
    report: Report,
    classes: tuple[str, ...],
    side: float | None,
    strict: bool,
) -> None:
    """Put the record of a line to its frame. Raises: Refused."""
    path = _path(row)
    name = str(path)
    if name not in gathered:
        gathered[name] = None
        gathered[name] = _frame(path, row, root, inside, source)
    frame = gathered[name]
    if frame is None:
        return
    for column, kept in (("sequence", frame.sequence), ("split", frame.split)):
        if row.get(column, kept) != kept:
            raise Refused(source, f"{column} {row[column]!r:.40} where an earlier line about {name} has {kept!r}")

    index = vocabulary.class_index(row["answer"], classes)
    if index < 0:
        raise Refused(source, f"answer {row['answer']!r:.60} is none of the {len(classes)} classes")
    question, kind, tool = _question(row["question"], index, classes, source)
    box, warning = _box(row["bbox"], side, frame.size, source, strict)
    think, want = _form(row, source)
    think = think and _in_pixels(think, side, frame.size)
    record = Record(question, classes[index], box, kind, tool, source, think, want)
    frame.records.append(record)
    if warning:
        report(dataclasses.replace(warning, image=str(frame.image)))
    if (first := frame.first.setdefault((question, want, bool(think)), source)) != source:
        report(Problem("warning", source, f"{REPEATED}, first on line {first.rpartition(':')[2]}; both are kept"))


def _path(row: Mapping[str, object]) -> PurePosixPath:
    """Where a line says that its image lies."""
    return PurePosixPath(row["image"].replace("\\", "/"))


def _frame(path: PurePosixPath, row: Mapping[str, object], root: Path, inside: Path, source: str) -> _Gathered:
    """The frame that a line is the first about."""
    if path.is_absolute() or ".." in path.parts or not str(path).isprintable():
        raise Refused(source, f"image {str(path)!r:.80} must be a path below the data set's folder")
    image = root / path
    require_file(image, inside, source)
    split = row.get("split")
    if split is not None and split not in SPLITS:
        raise Refused(source, f"split {split!r:.40}; dev chooses the checkpoint, val is reported: {', '.join(SPLITS)}")
    folders = [part for part in path.parent.parts if part not in _PLACES]
    return _Gathered(image, image_size(image, source), row.get("sequence") or "/".join(folders) or "all", split)


def _question(text: str, index: int, classes: tuple[str, ...], source: str) -> tuple[str, int, str | None]:
    """The question, its kind and the instrument asked about; one of the published forms is put in its official words.

    The kind of any other question is that of its answer.
    """
    if len(text) > MAX_LINE or not text.isprintable():
        raise Refused(source, f"question of {len(text)} characters; it must be one line of at most {MAX_LINE}")
    kind, topic = vocabulary.question_kind(text)
    if kind < 0:
        return text, vocabulary.class_kind(index, classes), None
    return vocabulary.ask(kind, topic), kind, topic if kind in (vocabulary.STATE, vocabulary.LOCATION) else None


def _box(
    value: object, side: float | None, size: tuple[int, int], source: str, strict: bool
) -> tuple[Box, Problem | None]:
    """The box in [0, 1], and a warning where it had to be clipped."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.strip("[]() ")[:120]
    parts = text.replace(",", " ").split() if isinstance(value, str) else value
    try:
        edges = tuple(float(part) for part in parts)
        whole = len(edges) == 4 and all(map(math.isfinite, edges))
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise Refused(source, f"bbox {text!r:.60} is not a box of four numbers x0 y0 x1 y1")
    width, height = (side, side) if side else size
    if side == 1 and max(edges) > 2:
        raise Refused(source, f"bbox {text} is not in 0..1, as is declared; are the boxes in pixel or thousand?")
    # What another program's rounding puts beyond an edge is no mistake of the label.
    ends = zip(edges, (width, height) * 2, strict=True)
    edges = tuple(end if end < edge < end * (1 + 1e-6) else edge for edge, end in ends)
    return unit_box(edges, text, source, width, height, strict)


def _in_pixels(text: str, side: float | None, size: tuple[int, int]) -> str:
    """Reasoning whose boxes are written as those of the table, with boxes in pixels."""
    if side is None:
        return text
    scale = [length / side for length in size * 2]
    return answer.map_boxes(text, lambda box: [edge * by for edge, by in zip(box, scale, strict=True)])


def _form(row: Mapping[str, object], source: str) -> tuple[str | None, int | None]:
    """The reasoning and what is wanted, in the words of `Record`: a line that tells its form is taken as it stands."""
    think, want, kind = row.get("reasoning"), row.get("want"), row.get("kind")
    if think is not None and len(think) > _MAX_TEXT:
        raise Refused(source, f"reasoning of {len(think)} characters; {_MAX_TEXT} is the most")
    if want is not None and want not in answer.WANT:
        raise Refused(source, f"want {want!r:.40}; take {', '.join(answer.WANT)}")
    code = None if want is None else answer.WANT.index(want)
    if kind is not None:
        if kind not in FORMS:
            raise Refused(source, f"kind {kind!r:.40}; take {', '.join(FORMS)}")
        wanted, reasoned = FORMS[kind]
        if code not in (None, wanted) or reasoned != (think is not None):
            raise Refused(source, f"kind {kind} does not go with want {want} and {'a' if think else 'no'} reasoning")
        code = wanted
    return (think or "") if code is not None else think, code


def _split(frames: list[Frame], file: Path, report: Report) -> list[Frame]:
    """Frames with their splits: as the table says or, where it says nothing, by whole sequences, which is told.

    The published sequences keep their published splits. Of others the last tenth is val and the tenth before it dev.
    """
    names = list(dict.fromkeys(frame.sequence for frame in frames))
    unsaid = [frame for frame in frames if frame.split is None]
    if not unsaid:
        _tell_shared_sequences(frames, file, report)
        return frames
    if len(unsaid) < len(frames):
        raise InputError(f"{printable(file)}: {unsaid[0].id} has no split and others have; give it to all or to none")
    if all(name.removeprefix("seq").removeprefix("_").isdigit() for name in names):
        return frames
    held = max(1, len(names) // 10)
    val = names[-held:] if len(names) > 2 else []
    dev = names[-len(val) - held : len(names) - len(val)] if len(names) > 1 else []
    split_of = {name: "val" if name in val else "dev" if name in dev else "train" for name in names}
    told = "; ".join(
        f"{split}: {' '.join(name for name in names if split_of[name] == split) or 'none'}" for split in SPLITS[:3]
    )
    report(Problem("warning", f"{file}:1", f"no column split; by sequences, {told}"))
    return [dataclasses.replace(frame, split=split_of[frame.sequence]) for frame in frames]


def _tell_shared_sequences(frames: list[Frame], file: Path, report: Report) -> None:
    """Neighbouring frames of a video are nearly the same: say so where they are in two splits."""
    splits: dict[str, set[str]] = {}
    for frame in frames:
        splits.setdefault(frame.sequence, set()).add(frame.split)
    for name, several in splits.items():
        if len(several) > 1 and name != "all":
            both = " and ".join(sorted(several))
            report(Problem("warning", f"{file}:1", f"sequence {name} is in {both}; its frames are near copies"))
