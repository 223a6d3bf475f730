"""Data set folders to frames with their questions, and their splits.

A folder that tensorflow-datasets prepared is read by prepared.py, one with records.jsonl or records.csv by
recordfile.py. Any other is one of the published sets, in the
folder named or in one below it such as `Train_Data`; `label/` may be missing, and the name of a label file may end
in `_QAL`, `_QA` or neither:

    seq_2/left_frames/frame000.png         seq_2/vqla/label/frame000_QAL.txt       (EndoVis-18)
    left_frames/seq2_frame000.jpg          vqla/label/seq2_frame000.txt            (EndoVis-17)
"""

import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from surgery_r1_jax import places, prepared, recordfile, vocabulary
from surgery_r1_jax.errors import InputError, printable
from surgery_r1_jax.frames import Frame, Report, image_size, natural, require_file
from surgery_r1_jax.labels import REPEATED, Box, Problem, Record, Refused, parse_line

__all__ = ("REPEATED", "Box", "Frame", "Record")  # what those who read records also need

# The sequences of the published evaluation. They are reported and select nothing.
VAL_SEQUENCES = ("seq_1", "seq_5", "seq_16")

# Training sequences held out for every choice that is made on data. Sequences 2, 4, 7 and 14 hold all there
# is of some instrument or state, and sequence 3 holds 12 of the 13 Cauterization answers: they stay. Of the
# other six, 6 and 12 together show the most instruments (bipolar and prograsp forceps, scissors, suction).
# Training keeps 1,285 of 1,560 frames with all 8 instruments and all 13 states.
DEV_SEQUENCES = ("seq_6", "seq_12")

_MAX_FILE = 1 << 20  # bytes of a label file
_MAX_DEPTH = 3  # folders between the root and a `vqla` folder
_FLAT_STEM = re.compile(r"(seq[0-9]{1,6})_(.{1,200})")


def read(
    root: str | Path,
    *,
    strict: bool = False,
    classes: tuple[str, ...] | None = None,
    boxes: str | None = None,
    on_problem: Report | None = None,
) -> list[Frame]:
    """All frames below `root`, sequences and frames in natural order (seq_2 before seq_10).

    `classes` are the answers, by default those that the data set declares, or else the 18 of EndoVis-18-VQLA.
    `boxes` is a key of recordfile.BOXES, for a folder that declares none.

    A box that leaves its image is clipped with a warning; `strict` makes it an error. `on_problem` is given
    every problem, and what an error costs is left out; without it the first error raises InputError and the
    warnings are logged as one line. Of images only the headers are read.
    """
    warned: list[Problem] = []

    def stop_at_errors(problem: Problem) -> None:
        if problem.severity == "error":
            remedy = f"mend it; `surgery-r1 data check {printable(root)}` lists all problems"
            raise InputError(f"{problem}; {remedy}")
        warned.append(problem)

    report = on_problem or stop_at_errors
    root = places.fetched(root)
    inside = root.resolve()
    if root.is_dir() and (folder := prepared.find(root)):
        frames = prepared.read(folder)
    elif root.is_dir() and (table := recordfile.find(root)):
        frames = recordfile.read(table, inside, report, classes=classes, boxes=boxes, strict=strict)
    else:
        classes = classes or recordfile.declared(root).get("classes", vocabulary.CLASSES)
        frames = _read_published(root, inside, report, classes, strict)
    if warned:
        logger = logging.getLogger(__name__)
        logger.warning("%s: %d warnings, the first: %s", printable(root), len(warned), warned[0])
    return frames


def split_of(sequence: str, dev_sequences: Iterable[str] = DEV_SEQUENCES) -> str:
    """The one split a sequence belongs to: val, dev, train, or external for EndoVis-17."""
    if not sequence.startswith("seq_"):
        return "external"
    if sequence in VAL_SEQUENCES:
        return "val"
    return "dev" if sequence in dev_sequences else "train"


def split_of_frame(frame: Frame, dev_sequences: Iterable[str] = DEV_SEQUENCES) -> str:
    """The split that a frame's data set gives it or, where it gives none, that of its sequence."""
    return frame.split or split_of(frame.sequence, dev_sequences)


def by_split(frames: Iterable[Frame]) -> dict[str, list[Frame]]:
    """The frames of the splits that are not empty."""
    splits: dict[str, list[Frame]] = {name: [] for name in ("train", "dev", "val", "external")}
    for frame in frames:
        splits.setdefault(split_of_frame(frame), []).append(frame)
    return {name: members for name, members in splits.items() if members}


def split(frames: Iterable[Frame], name: str, *, dev_sequences: Iterable[str] = DEV_SEQUENCES) -> list[Frame]:
    """The frames of train, dev or val, or of all. EndoVis-17, an external test set, is only in all.

    Raises: InputError for another name, an empty split, or a dev sequence out of VAL_SEQUENCES.
    """
    frames, dev_sequences = list(frames), tuple(dev_sequences)
    if name not in ("train", "dev", "val", "all"):
        raise InputError(f"unknown split {name!r}; take train, dev, val or all")
    if reported := [sequence for sequence in VAL_SEQUENCES if sequence in dev_sequences]:
        raise InputError(f"dev sequence {reported[0]} is in val, which selects nothing; take another")
    chosen = [frame for frame in frames if name in ("all", split_of_frame(frame, dev_sequences))]
    if not chosen:
        found = ", ".join(sorted({frame.sequence for frame in frames}, key=natural)) or "none"
        raise InputError(f"split {name} is empty; the sequences found: {found}; take another split or data set")
    return chosen


def content_overlaps(frames_a: Iterable[Frame], frames_b: Iterable[Frame]) -> list[tuple[str, str]]:
    """Ids (of a, of b) of all pairs whose image files are equal byte for byte."""
    sized_a, sized_b = ([(_size(frame.image), frame) for frame in side] for side in (frames_a, frames_b))
    # Files of a size that only one side has need no hash, and image sizes hardly ever agree.
    shared = {size for size, _ in sized_a} & {size for size, _ in sized_b}
    ids_a: dict[str, list[str]] = {}
    for size, frame in sized_a:
        if size in shared:
            ids_a.setdefault(_sha256(frame.image), []).append(frame.id)
    return [
        (id_a, frame.id) for size, frame in sized_b if size in shared for id_a in ids_a.get(_sha256(frame.image), ())
    ]


def _read_published(root: Path, inside: Path, report: Report, classes: tuple[str, ...], strict: bool) -> list[Frame]:
    """The frames of EndoVis-18-VQLA or EndoVis-17-VQLA; every problem is reported."""
    frames: dict[str, Frame] = {}
    for home, labels in _label_files(root, inside, report):
        try:
            frame, problems = _read_frame(home, labels, inside, classes, strict)
            if frame.id in frames:
                raise Refused(f"{labels}:1", f"a second label file for frame {frame.id}; remove one")
        except Refused as refusal:
            report(refusal.problem)
            continue
        for problem in problems:
            report(problem)
        if frame.records:
            frames[frame.id] = frame
    return list(frames.values())


def _label_files(root: Path, inside: Path, report: Report) -> list[tuple[Path, Path]]:
    """Every label file with its home, the folder that holds `vqla` and `left_frames`, in natural order."""
    name = printable(root)
    if not root.is_dir():
        raise InputError(f"{name}: no such folder; name that of EndoVis-18-VQLA, EndoVis-17-VQLA or your own frames")
    homes = [vqla.parent for vqla in _vqla_folders(root, inside, _MAX_DEPTH, report)]
    if not homes:
        raise InputError(
            f"{name}: no labels; expected seq_N/vqla/label/*.txt or vqla/label/*.txt below it, or a "
            f"{' or '.join(recordfile.FILES)} in it"
        )
    flat = [home for home in homes if _sequence(home) is None]
    if flat and len(homes) > 1:
        raise InputError(f"{name}: more than one data set; name one, such as {printable(flat[0])}")
    files = []
    for home in homes:
        texts = _texts(home / "vqla" / "label") or _texts(home / "vqla")
        if not texts:
            report(Problem("error", str(home / "vqla"), "holds no label file"))
        files += [(home, text) for text in texts]
    return files


def _vqla_folders(folder: Path, inside: Path, depth: int, report: Report) -> Iterator[Path]:
    """The `vqla` folders below `folder`, found without following a link out of `inside`."""
    try:
        folders = [child.name for child in folder.iterdir() if child.is_dir()]
    except OSError as error:
        return report(Problem("error", str(folder), f"cannot be listed ({error.strerror})"))
    for name in sorted(folders, key=natural):
        child = folder / name
        if name == "left_frames" or name[0] in "._":  # the images, or what an archiver left behind
            continue
        if not child.resolve().is_relative_to(inside):
            report(Problem("error", str(child), "leads out of the data's folder; put the files themselves there"))
        elif name == "vqla":
            yield child
        elif depth:
            yield from _vqla_folders(child, inside, depth - 1, report)


def _texts(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.txt"), key=lambda file: natural(file.name))


def _sequence(home: Path) -> str | None:
    """The sequence a folder stands for; None for the flat EndoVis-17, whose file names tell it."""
    name = home.absolute().name
    return name if re.fullmatch("seq_[0-9]{1,6}", name) else None


def _read_frame(
    home: Path, labels: Path, inside: Path, classes: tuple[str, ...], strict: bool
) -> tuple[Frame, list[Problem]]:
    """One label file's frame with the records that are in order, and the problems of its lines."""
    stem = labels.stem.removesuffix("_QAL").removesuffix("_QA")
    sequence, name = _sequence(home), stem
    if sequence is None:
        flat = _FLAT_STEM.fullmatch(stem)
        if not flat:
            raise Refused(f"{labels}:1", "the name is not of the form seqN_frameNNN.txt")
        sequence, name = flat.groups()
    lines = _read_lines(labels, inside)
    image = _find_image(home / "left_frames" / stem, inside, f"{labels}:1")
    width, height = image_size(image, f"{labels}:1")

    records: list[Record] = []
    problems: list[Problem] = []
    first_line: dict[str, int] = {}
    for number, line in lines:
        source = f"{labels}:{number}"
        try:
            record, warning = parse_line(_decode(line, source), source, width, height, classes, strict)
        except Refused as refusal:
            problems.append(refusal.problem)
            continue
        records.append(record)
        if warning:
            problems.append(warning)
        if (first := first_line.setdefault(record.question, number)) != number:
            # Kept: the format has no way to tell two instruments of one name apart.
            problems.append(Problem("warning", source, f"{REPEATED}, first on line {first}; both are kept"))
    problems = [dataclasses.replace(problem, image=str(image)) for problem in problems]
    return Frame(f"{sequence}/{name}", sequence, image, width, height, tuple(records), None, classes), problems


def _read_lines(labels: Path, inside: Path) -> list[tuple[int, bytes]]:
    """The numbered lines that are not blank."""
    start = f"{labels}:1"
    require_file(labels, inside, start)
    try:
        with labels.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise Refused(start, f"cannot be read ({error.strerror})") from None
    if len(data) > _MAX_FILE:
        raise Refused(start, f"label file of more than {_MAX_FILE} bytes")
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    filled = [(number, line.removesuffix(b"\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise Refused(start, "label file without a question")
    return filled


def _decode(line: bytes, source: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"{source}:{error.start + 1}", "not UTF-8") from None


def _find_image(stem: Path, inside: Path, source: str) -> Path:
    for suffix in (".png", ".jpg"):
        image = stem.with_name(stem.name + suffix)
        if os.path.lexists(image):
            require_file(image, inside, source)
            return image
    raise Refused(source, f"its image {stem}.png (or .jpg) is missing")


def _size(image: Path | prepared.Stored) -> int:
    """Bytes of an image's file."""
    return image.stat().st_size if isinstance(image, Path) else len(image.read_bytes())


def _sha256(file: Path | prepared.Stored) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
