"""Image files to patch rows: a careful reader and Qwen-VL's preprocessing, bit for bit.

Reading rule, the same for every file: PNG or JPEG with one picture in it; the EXIF orientation is applied, so
boxes refer to the upright picture; 16-bit grey is divided by 257; CMYK is converted; transparent pixels are
laid on black.

Source of the preprocessing: transformers:models/qwen2_vl/image_processing_pil_qwen2_vl.py.
"""

import json
import math
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from surgery_r1_jax.errors import InputError, one_line, printable
from surgery_r1_jax.prepared import Stored

MAX_PIXELS = 4096 * 4096  # refused from the header above this; a 1280x1024 frame is a twelfth of it
MAX_ASPECT = 200

# EXIF tag 0x0112: what undoes each orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_NAMED = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}

# Preprocessing steps that a file may switch; the values supported, which are also the defaults.
_STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}


def load(path: str | Path | Stored, *, root: str | Path | None = None) -> Image.Image:
    """Read one picture as upright 8-bit RGB.

    With `root`, a relative path starts there and the file, links followed, must lie inside.
    Raises: InputError `PATH: reason; remedy` for anything that is not a whole, plain PNG or JPEG.
    """
    return read(path, root=root)[0]


def read(path: str | Path | Stored, *, root: str | Path | None = None) -> tuple[Image.Image, list[str]]:
    """As `load`, and in words what the reading rule had to change about the picture; most often nothing."""
    name = printable(path)
    stored = isinstance(path, Stored)
    file = path if stored else _regular_file(path, root)
    try:
        with Image.open(file.open() if stored else file, formats=("PNG", "JPEG")) as image:  # reads the header only
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(f"{name}: {width}x{height} is over {MAX_PIXELS} pixels; scale it down first")
            if (pictures := getattr(image, "n_frames", 1)) > 1:
                raise InputError(f"{name}: holds {pictures} pictures; save the one meant alone")
            deep = ";16" in str(image.tile[0].args)  # as the header says; decoding may already cut it to 8
            image.load()
            changes = list(_changes(image, file, deep))
            picture = _rgb(_upright(image))
            picture.info.clear()  # comments and profiles stay in the file, whatever is made of the picture
            return picture, changes
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
        raise InputError(f"{name}: not a whole PNG or JPEG ({one_line(error)}); replace the file") from error


def blank(width: int, height: int) -> Image.Image:
    """A grey picture: what does the model know without looking?"""
    return Image.new("RGB", (width, height), (128, 128, 128))


def _regular_file(path: str | Path, root: str | Path | None) -> Path:
    """The resolved path of an ordinary file, inside `root` where one is given; opens nothing."""
    name = printable(path)
    try:
        file = (Path(path) if root is None else Path(root) / path).resolve()
        if root is not None and not file.is_relative_to(Path(root).resolve()):
            raise InputError(f"{name}: leads outside of {root}; put the file under that folder")
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe or a device would block or never end
            raise InputError(f"{name}: not an ordinary file; point to a PNG or JPEG file")
    except (OSError, ValueError, RuntimeError) as error:  # missing, too long, NUL in it, links in a circle
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{name}: cannot be opened ({reason}); check the path") from error
    return file


def _upright(image: Image.Image) -> Image.Image:
    """Undo the EXIF orientation; a value outside of 1..8 means upright."""
    method = _UPRIGHT.get(image.getexif().get(0x0112, 1))
    return image if method is None else image.transpose(method)


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode a PNG or JPEG decodes to, as RGB."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        grey = (np.asarray(image, np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _changes(image: Image.Image, file: Path | Stored, deep: bool) -> Iterator[str]:
    """What `_upright` and `_rgb` change about a decoded picture; `deep` says that it had 16 bits a channel."""
    if image.format != _NAMED.get(file.suffix.lower()):
        yield f"{image.format} data under the name {file.suffix or 'of no kind'}; read as what it is"
    if (orientation := image.getexif().get(0x0112, 1)) in _UPRIGHT:
        yield f"EXIF orientation {orientation}; turned upright, and boxes refer to that"
    if deep:
        yield "16 bits a channel; scaled to 8"
    if image.mode == "CMYK":
        yield "CMYK; made RGB"
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        yield "transparent pixels; laid on black"


class Kept:
    """Decoded pictures by their files, until they hold `gib` GiB; sent to another process it starts there empty."""

    def __init__(self, gib: float = 0.375):
        self.gib = gib
        self._pictures: dict[Path | Stored, Image.Image] = {}
        self._room = int(gib * 2**30)
        self._adding = threading.Lock()

    def __reduce__(self):
        return Kept, (self.gib,)

    def get(self, file: Path | Stored) -> Image.Image | None:
        """The picture, if it is here."""
        return self._pictures.get(file)

    def add(self, file: Path | Stored, picture: Image.Image) -> None:
        """Keep an RGB picture if there is room."""
        size = 3 * picture.width * picture.height
        with self._adding:
            if size <= self._room and file not in self._pictures:
                self._pictures[file] = picture
                self._room -= size


@dataclass(frozen=True)
class Preprocessor:
    """The picture side of a checkpoint: preprocessor_config.json and what it does.

    `min_pixels` and `max_pixels` bound the area of the resized picture; `mean` and `std` are per RGB channel.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self):
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise InputError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.min_pixels > self.max_pixels:
            raise InputError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}; swap them")
        if len(self.mean) != 3 or not all(map(math.isfinite, self.mean)):
            raise InputError(f"mean is {self.mean!r}; it must be three finite numbers")
        if len(self.std) != 3 or not all(math.isfinite(value) and value > 0 for value in self.std):
            raise InputError(f"std is {self.std!r}; it must be three finite numbers above 0")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Preprocessor":
        """Read preprocessor_config.json, or the image part of processor_config.json where only that exists.

        Raises: InputError naming the file, for a missing key or for a step that this class does not take.
        """
        file = Path(folder) / "preprocessor_config.json"
        nested = Path(folder) / "processor_config.json"
        if not file.exists() and nested.exists():
            file = nested
        try:
            entries = json.loads(file.read_text("utf-8"))
            entries = entries["image_processor"] if file is nested else entries
            size = entries.get("size") or {}
            for key, wanted in (
                ("do_resize", True),
                ("do_rescale", True),
                ("do_normalize", True),
                ("resample", 3),
            ):
                if entries.get(key, wanted) != wanted:
                    raise ValueError(f"{key} is {entries[key]!r}, only {wanted} is supported")
            if not math.isclose(entries.get("rescale_factor", 1 / 255), 1 / 255):
                raise ValueError(f"rescale_factor is {entries['rescale_factor']}, only 1/255 is supported")
            return cls(
                patch_size=entries["patch_size"],
                temporal_patch_size=entries["temporal_patch_size"],
                merge_size=entries["merge_size"],
                min_pixels=entries.get("min_pixels") or size["shortest_edge"],
                max_pixels=entries.get("max_pixels") or size["longest_edge"],
                mean=tuple(float(value) for value in entries["image_mean"]),
                std=tuple(float(value) for value in entries["image_std"]),
            )
        except KeyError as error:
            raise InputError(f"{file}: no entry {error}; take the file of the original checkpoint") from error
        except OSError as error:
            raise InputError(f"{file}: {error.strerror}; take the file of the original checkpoint") from error
        except (ValueError, TypeError, AttributeError, RecursionError, InputError) as error:
            raise InputError(f"{file}: {one_line(error)}; take the file of the original checkpoint") from error

    def to_folder(self, folder: str | Path) -> Path:
        """Write preprocessor_config.json, with the pixel bounds in the old and in the new spelling."""
        entries = {
            **_STEPS,
            "image_mean": list(self.mean),
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_std": list(self.std),
            "max_pixels": self.max_pixels,
            "merge_size": self.merge_size,
            "min_pixels": self.min_pixels,
            "patch_size": self.patch_size,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": self.max_pixels, "shortest_edge": self.min_pixels},
            "temporal_patch_size": self.temporal_patch_size,
        }
        file = Path(folder) / "preprocessor_config.json"
        file.write_text(json.dumps(entries, indent=2) + "\n", "utf-8")
        return file

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """The size a picture is given to the model in: whole merge units, area within the pixel bounds.

        Python floats on purpose: for 1280x1024 and 1,003,520 pixels the quotient is exactly 32 in double
        precision and just below it in single, which would lose a row of units.
        Raises: InputError for a side below 1 or sides more than 200 to 1.
        """
        if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
            raise InputError(f"image of {width}x{height}: sides differ over {MAX_ASPECT} to 1; crop or drop it")
        unit = self.patch_size * self.merge_size
        new_width, new_height = round(width / unit) * unit, round(height / unit) * unit
        if new_width * new_height > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            new_width = max(unit, math.floor(width / shrink / unit) * unit)
            new_height = max(unit, math.floor(height / shrink / unit) * unit)
        elif new_width * new_height < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            new_width = math.ceil(width * grow / unit) * unit
            new_height = math.ceil(height * grow / unit) * unit
        return new_width, new_height

    def patches(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Resize an RGB picture and cut it: float32 rows [gh * gw, C] and the patch grid (gh, gw).

        Rows run through the merge units in raster order, and through the patches within each unit; C holds
        channel, time (the still picture repeated), row, column. The arithmetic is in the order of the source.
        """
        size = self.resized(*image.size)
        bytes_HW3 = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        grey = (np.arange(256) * (1 / 255)).astype(np.float32)  # a byte has 256 values: normalise those
        levels_3 = [(grey - np.float32(m)) / np.float32(s) for m, s in zip(self.mean, self.std, strict=True)]
        planes_3HW = np.stack([level[bytes_HW3[..., c]] for c, level in enumerate(levels_3)])
        p, m = self.patch_size, self.merge_size
        gw, gh = size[0] // p, size[1] // p
        cells = planes_3HW.reshape(3, gh // m, m, p, gw // m, m, p).transpose(1, 4, 2, 5, 0, 3, 6)
        shape = (*cells.shape[:5], self.temporal_patch_size, p, p)
        return np.broadcast_to(cells[:, :, :, :, :, None], shape).reshape(gh * gw, -1), (gh, gw)
