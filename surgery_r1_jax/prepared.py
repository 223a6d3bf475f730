"""Data sets that tensorflow-datasets prepared (`surgery_vqla.py`) to frames, without TensorFlow.

A prepared folder holds dataset_info.json, metadata.json and a file of ArrayRecord for each shard of a split. Of these
the names and the classes are taken; what an example holds is known here, so nothing is imported by its name.
"""

import functools
import io
import json
from pathlib import Path
from typing import NamedTuple

from surgery_r1_jax import vocabulary
from surgery_r1_jax.answer import WANT
from surgery_r1_jax.errors import InputError, one_line, printable
from surgery_r1_jax.frames import Frame, image_size, natural
from surgery_r1_jax.labels import Record, Refused

INFO = "dataset_info.json"
LEVELS = 3  # below the folder that was prepared into: surgery_vqla/custom/1.0.0
SPLITS = ("train", "dev", "val", "external")


class Stored(NamedTuple):
    """An image inside a prepared data set."""

    folder: Path
    split: str
    number: int

    def __str__(self) -> str:
        return f"{self.folder}/{self.split}[{self.number}]"

    @property
    def suffix(self) -> str:
        """What its file would end in."""
        return ".png" if self.read_bytes().startswith(b"\x89PNG") else ".jpg"

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Its file, to be read as bytes."""
        return io.BytesIO(self.read_bytes())

    def read_bytes(self) -> bytes:
        """The bytes of its file."""
        return _decoded(_shards(self.folder, self.split)[self.number])["image"]


def features():
    """What an example is: a frame with all its records, in the terms of tensorflow-datasets."""
    import tensorflow_datasets as tfds

    features = tfds.features
    record = {
        "question": features.Text(),
        "answer": features.Text(),  # one of the classes in the metadata
        "bbox": features.BBoxFeature(),  # ymin, xmin, ymax, xmax in [0, 1], as everywhere in tensorflow-datasets
        "kind": features.ClassLabel(names=vocabulary.KINDS),
        "instrument": features.Text(),  # the one asked about, or nothing
        "reasoning": features.Text(),  # as the data set gives it, or nothing
        "want": features.ClassLabel(names=(*WANT, "any")),  # what a prompt asks for; any: the data set does not say
    }
    frame = {
        "id": features.Text(),
        "sequence": features.Text(),
        "image": features.Image(shape=(None, None, 3), encoding_format=None),
        "records": features.Sequence(record),
    }
    return features.FeaturesDict(frame)


def find(root: Path) -> Path | None:
    """The prepared folder that `root` is, or the one below it. Raises: InputError where there are several."""
    patterns = ["/".join(["*"] * level + [INFO]) for level in range(LEVELS + 1)]
    found = next((files for pattern in patterns if (files := sorted(root.glob(pattern)))), [])
    if len(found) > 1:
        names = ", ".join(printable(file.parent.relative_to(root)) for file in found)
        raise InputError(f"{printable(root)}: holds {len(found)} prepared data sets; give one of {names}")
    return found[0].parent if found else None


def read(folder: Path) -> list[Frame]:
    """The frames of all splits, in natural order of sequences and frames.

    Raises: InputError naming the file, for a folder that another builder wrote or that is not whole.
    """
    about, more = _entries(folder / INFO), _entries(folder / "metadata.json")
    classes, name = tuple(map(str, more.get("classes") or ())), about.get("name")
    if name != "surgery_vqla" or about.get("fileFormat") != "array_record" or not classes:
        raise InputError(
            f"{folder / INFO}: not prepared by surgery_vqla into ArrayRecord files; README.md says how to do it"
        )
    held = {split.get("name") for split in about.get("splits") or ()}
    frames = []
    for split in filter(held.__contains__, SPLITS):
        shards = _shards(folder, split)
        frames += [_frame(shards[n], Stored(folder, split, n), classes) for n in range(len(shards))]
    return sorted(frames, key=lambda frame: (natural(frame.sequence), natural(frame.id)))


def _entries(file: Path) -> dict:
    try:
        found = json.loads(file.read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{printable(file)}: cannot be read ({one_line(error)}); prepare the data set anew") from None


@functools.cache
def _shards(folder: Path, split: str):
    """The examples of a split as bytes, by number."""
    from grain.sources import ArrayRecordDataSource

    files = sorted(folder.glob(f"surgery_vqla-{split}.array_record-*"))
    count = int(files[0].name.rpartition("-of-")[2]) if files else 0
    if not files or len(files) != count:
        raise InputError(
            f"{printable(folder)}: {len(files)} of {count or 'the'} shards of split {split} are here; prepare it anew"
        )
    return ArrayRecordDataSource([str(file) for file in files])


@functools.cache
def _parser():
    import tensorflow_datasets as tfds

    return functools.partial(features().deserialize_example_np, decoders={"image": tfds.decode.SkipDecoding()})


def _decoded(example: bytes) -> dict:
    return _parser()(example)


def _frame(example: bytes, image: Stored, classes: tuple[str, ...]) -> Frame:
    """Raises: InputError for an image that is none."""
    found = _decoded(example)
    told = found["records"]
    try:
        width, height = image_size(io.BytesIO(found["image"]), str(image))
    except Refused as refusal:
        raise InputError(f"{refusal.problem}; prepare the data set anew") from None
    records = tuple(
        Record(
            question=told["question"][i].decode(),
            answer=told["answer"][i].decode(),
            box=tuple(
                _edge(told["bbox"][i][edge], side) for edge, side in zip((1, 0, 3, 2), (width, height) * 2, strict=True)
            ),
            kind=int(told["kind"][i]),
            tool=told["instrument"][i].decode() or None,
            source=f"{image}:{i + 1}",
            # A record that says what it wants is taken as it stands: without reasoning it has none.
            think=told["reasoning"][i].decode() or (None if told["want"][i] == len(WANT) else ""),
            want=None if told["want"][i] == len(WANT) else int(told["want"][i]),
        )
        for i in range(len(told["question"]))
    )
    name, sequence = found["id"].decode(), found["sequence"].decode()
    return Frame(name, sequence, image, width, height, records, image.split, classes)


def _edge(stored: float, side: int) -> float:
    """A box's edge in [0, 1]; float32 is what is stored, and what was a whole pixel is one again."""
    pixels = round(float(stored) * side)
    return pixels / side if abs(pixels - float(stored) * side) < 1e-3 else float(stored)
