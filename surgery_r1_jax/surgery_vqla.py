"""The data sets as tensorflow-datasets: `surgery_vqla/endovis18`, `/endovis17`, `/extended` and `/custom`.

    import tensorflow_datasets as tfds
    import surgery_r1_jax.surgery_vqla  # makes the names known

    builder = tfds.builder("surgery_vqla/custom", data_dir="prepared")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir="data/mine"))
    source = builder.as_data_source(split="train")

An example is a frame with all its records, so that an image is stored once, as the bytes of its file. The shards are
ArrayRecord files; neither preparing nor reading them needs TensorFlow. Nothing is downloaded.
"""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from PIL import Image

from surgery_r1_jax import images, prepared, records, vocabulary
from surgery_r1_jax.answer import WANT
from surgery_r1_jax.errors import InputError
from surgery_r1_jax.frames import Frame

_VQLA = """@inproceedings{bai2023surgicalvqla,
  title={Surgical-{VQLA}: Transformer with Gated Vision-Language Embedding for Visual Question Localized-Answering in
         Robotic Surgery},
  author={Bai, Long and Islam, Mobarakol and Seenivasan, Lalithkumar and Ren, Hongliang},
  booktitle={IEEE International Conference on Robotics and Automation (ICRA)}, year={2023}}"""
_FRAMES_18 = """@article{allan2020endovis18,
  title={2018 Robotic Scene Segmentation Challenge}, author={Allan, Max and others},
  journal={arXiv:2001.11190}, year={2020}}"""
_FRAMES_17 = """@article{allan2019endovis17,
  title={2017 Robotic Instrument Segmentation Challenge}, author={Allan, Max and others},
  journal={arXiv:1902.06426}, year={2019}}"""
_LICENCE = (
    "Frames: terms of the MICCAI EndoVis challenges, by registration with them. Labels: terms of their authors. "
    "Neither is part of surgery_r1_jax or handed on by it."
)


@dataclasses.dataclass(eq=False, kw_only=True)
class Config(tfds.core.BuilderConfig):
    """A data set: the folders of it that lie in the manual directory (none: that directory itself), and its answers."""

    folders: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None  # None: as the data set says
    citation: str = ""
    licence: str = _LICENCE


class SurgeryVqla(tfds.core.GeneratorBasedBuilder):
    """Frames of robotic surgery with questions, answers, and the boxes that show the answers."""

    code_path = Path(__file__)  # what is inherited needs a package that tensorflow-datasets does not install
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Lay into the manual directory: EndoVis-18-VQLA for endovis18, EndoVis-17-VQLA for endovis17, "
        "EndoVis-18-VQLA-Extended and EndoVis-17-VQLA-Extended for extended, each as it is published; for custom the "
        "contents of a data set folder, such as records.csv, data.json and the images."
    )
    BUILDER_CONFIGS = [  # noqa: RUF012
        Config(
            name="endovis18",
            description="EndoVis-18-VQLA: 18 answers; splits train, dev and val by sequence.",
            folders=("EndoVis-18-VQLA",),
            classes=vocabulary.CLASSES,
            citation=f"{_VQLA}\n{_FRAMES_18}",
        ),
        Config(
            name="endovis17",
            description="EndoVis-17-VQLA: 18 answers; one split, external, for tests alone.",
            folders=("EndoVis-17-VQLA",),
            classes=vocabulary.CLASSES,
            citation=f"{_VQLA}\n{_FRAMES_17}",
        ),
        Config(
            name="extended",
            description="Both with questions about instruments: 26 answers; splits train, dev, val and external.",
            folders=("EndoVis-18-VQLA-Extended", "EndoVis-17-VQLA-Extended"),
            classes=vocabulary.EXTENDED_CLASSES,
            citation=f"{_VQLA}\n{_FRAMES_18}\n{_FRAMES_17}",
        ),
        Config(
            name="custom",
            description="A data set folder of one's own, with its own answers.",
            licence="That of the data set it was prepared from.",
        ),
    ]

    def __init__(self, *, file_format: str = "array_record", **options):
        super().__init__(file_format=file_format, **options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.__doc__} {self.builder_config.description}",
            features=prepared.features(),
            metadata=tfds.core.MetadataDict(),
            citation=self.builder_config.citation,
            license=self.builder_config.licence,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        frames = _read(Path(dl_manager.manual_dir), self.builder_config)
        self.info.metadata["classes"] = list(frames[0].classes)
        return {name: self._generate_examples(members) for name, members in records.by_split(frames).items()}

    def _generate_examples(self, frames: list[Frame]) -> Iterator[tuple[str, dict]]:
        for frame in frames:
            yield frame.id, _example(frame)


def _read(manual: Path, config: Config) -> list[Frame]:
    """The frames of a configuration. Raises: InputError where its folders are not there, or hold a mistake."""
    roots = [manual / name for name in config.folders if (manual / name).is_dir()] if config.folders else [manual]
    frames = [frame for root in roots for frame in records.read(root, classes=config.classes)]
    if not frames:
        raise InputError(f"{manual}: holds no {' or '.join(config.folders) or 'records'}; lay it there")
    return frames


def _example(frame: Frame) -> dict:
    """A frame as the builder's features have it."""
    asked = [
        {
            "question": record.question,
            "answer": record.answer,
            "bbox": tfds.features.BBox(*(record.box[i] for i in (1, 0, 3, 2))),
            "kind": record.kind,
            "instrument": record.tool or "",
            "reasoning": record.think or "",
            "want": len(WANT) if record.want is None else record.want,
        }
        for record in frame.records
    ]
    return {"id": frame.id, "sequence": frame.sequence, "image": _image(frame.image), "records": asked}


def _image(path: Path) -> io.BytesIO:
    """The bytes of an image file or, where decoding these is not all there is to it, of the same picture as PNG."""
    picture = images.load(path)
    with Image.open(path) as stored:
        plain = stored.mode == "RGB" and stored.getexif().get(0x0112, 1) == 1
    if plain and not stored.info.get("transparency"):
        return io.BytesIO(path.read_bytes())
    out = io.BytesIO()
    picture.save(out, "PNG")
    out.seek(0)
    return out
