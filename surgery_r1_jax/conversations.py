"""`data export`: a data set as the conversations that other trainers read, with boxes as a model family writes them.

    OUT/train.jsonl, ...     a line for each record of a split; image paths start at OUT
    OUT/images/              the frames in the size the model sees them in
    OUT/dataset_info.json    how LLaMA-Factory reads it (format sharegpt)
    OUT/export.json          model family, units of the boxes, pixel limits, answers, counts

Boxes of Qwen2.5-VL are pixels of the resized image. A trainer that resizes otherwise makes them wrong without a word,
so the images are resized here: any pixel limits that allow their size leave them as they are.
"""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import track

from surgery_r1_jax import answer, checkpoint, examples, families, files, hf, images, records
from surgery_r1_jax.errors import InputError
from surgery_r1_jax.examples import Encoder
from surgery_r1_jax.frames import Frame
from surgery_r1_jax.labels import Record

MEDIA = ("<image>", "<video>", "<audio>")  # what trainers replace in a text


def run(
    source: str | Path,
    out: str | Path,
    *,
    model: str | Path,
    form: str = "messages",
    boxes: str | None = None,
    strict: bool = False,
) -> int:
    """Write the data set for the model in a Hugging Face or run folder; `form` is a key of FORMS.

    Raises: InputError where `out` holds files, and for what cannot be written so that every trainer reads it alike.
    """
    out = files.vacant(out)
    frames, folder = records.read(source, strict=strict, boxes=boxes), checkpoint.folder_of(model)
    architecture = hf.read_config(folder)
    encoder = hf.encoder_of(folder, architecture, frames[0].classes if frames else None)
    records.split(frames, "all")  # refuses a data set without frames
    with files.new_folder(out) as part:
        counts = _write_lines(part, frames, encoder, FORMS[form])
        bar = Console(stderr=True)
        with ThreadPoolExecutor() as pool:
            jobs = pool.map(lambda frame: _write_image(part, frame, encoder), frames)
            for _ in track(jobs, "writing images", len(frames), console=bar, disable=not bar.is_terminal):
                pass
        if form == "sharegpt":
            files.write_json(part / "dataset_info.json", _dataset_info(out.name, counts))
        limits = {name: getattr(encoder.preprocessor, name) for name in ("min_pixels", "max_pixels")}
        about = dict(model_type=families.of(architecture).model_type, boxes=encoder.codec.units, **limits)
        files.write_json(part / "export.json", about | dict(classes=encoder.classes, records=counts))
    told = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    print(f"{told} records written to {out}; their boxes are {encoder.codec.units}")
    return 0


def messages(system: str, question: str, reply: str, image: str) -> dict:
    """A conversation as TRL and ms-swift read it."""
    text = lambda words: {"type": "text", "text": words}  # noqa: E731
    turns = {"system": [text(system)], "user": [{"type": "image"}, text(question)], "assistant": [text(reply)]}
    return {"messages": [{"role": role, "content": parts} for role, parts in turns.items()], "images": [image]}


def sharegpt(system: str, question: str, reply: str, image: str) -> dict:
    """A conversation as LLaMA-Factory and ms-swift read it."""
    turns = [{"from": "human", "value": f"<image>{question}"}, {"from": "gpt", "value": reply}]
    return {"conversations": turns, "system": system, "images": [image]}


FORMS: dict[str, Callable[[str, str, str, str], dict]] = {"messages": messages, "sharegpt": sharegpt}


def conversation(frame: Frame, record: Record, encoder: Encoder) -> tuple[str, str]:
    """What is asked and answered: as the record wants it or, where it does not say, in full and with its reasoning.

    Raises: InputError naming the record where a trainer would take its text for an image.
    """
    want = examples.wanted(record)
    question = answer.prompt(record.question, want)
    reply = encoder.completion(frame, record, think=True, want=want)
    if marks := [mark for mark in MEDIA if mark in question + reply]:
        raise InputError(f"{record.source}: its text holds {marks[0]}, which trainers replace; take it out")
    return question, reply


def _write_lines(out: Path, frames: Iterable[Frame], encoder: Encoder, form: Callable) -> dict[str, int]:
    """The files of lines, one for each split; how many there are in each."""
    lines: dict[str, list[str]] = {}
    for frame in frames:
        of_split = lines.setdefault(records.split_of_frame(frame), [])
        for record in frame.records:
            said = form(encoder.system, *conversation(frame, record, encoder), _image_name(frame))
            of_split.append(json.dumps(said) + "\n")
    for split, of_split in lines.items():
        (out / f"{split}.jsonl").write_text("".join(of_split), "utf-8")
    return {split: len(of_split) for split, of_split in lines.items()}


def _image_name(frame: Frame) -> str:
    return f"images/{frame.id.removesuffix('.png')}.png"


def _write_image(out: Path, frame: Frame, encoder: Encoder) -> None:
    """The frame as the model sees it; one so narrow that this is resized once more stays as it is."""
    picture, size = images.load(frame.image), encoder.resized(frame)
    if encoder.preprocessor.resized(*size) == size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    file = out / _image_name(frame)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file, "PNG", compress_level=1)


def _dataset_info(name: str, splits: Iterable[str]) -> dict:
    """The entries of LLaMA-Factory's table of data sets."""
    columns = {"messages": "conversations", "system": "system", "images": "images"}
    return {
        f"{name}_{split}": {"file_name": f"{split}.jsonl", "formatting": "sharegpt", "columns": columns}
        for split in splits
    }
