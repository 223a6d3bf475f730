"""images.py against transformers' own processor, and against files that should never reach training."""

import dataclasses
import io
import json
import os
import random
import resource
import struct
import sys
import time
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from surgery_r1_jax import images
from surgery_r1_jax.errors import InputError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
QWEN2 = images.Preprocessor(14, 2, 2, 4 * 784, 40 * 784, MEAN, STD)
QWEN3 = images.Preprocessor(16, 2, 2, 4096, 65536, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SIZES = [(1280, 1024), (320, 256), (180, 240), (30, 20), (1, 1), (3, 500), (199, 1), (112, 140), (29, 400)]


def noise(width, height, channels=3):
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, channels), dtype=np.uint8))


def png_bytes(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def jpeg_bytes(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def write(folder, name, data):
    (folder / name).write_bytes(data)
    return folder / name


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(bytes(99)))
    return b"\x89PNG\r\n\x1a\n" + head + body + png_chunk(b"IEND", b"")


# -- preprocessing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("preprocessor", [QWEN2, QWEN3], ids=["patch14", "patch16"])
def test_patches_equal_transformers_to_the_last_bit(preprocessor, size, tmp_path):
    preprocessor.to_folder(tmp_path)
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(images=[noise(*size)], return_tensors="np")
    rows, grid = preprocessor.patches(noise(*size))
    assert rows.dtype == np.float32 and rows.tobytes() == theirs["pixel_values"].tobytes()
    assert (1, *grid) == tuple(theirs["image_grid_thw"][0])


@settings(deadline=None, max_examples=300)
@example(1280, 1024, 1_003_520)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(3136, 3_000_000))
def test_the_resized_size_is_the_one_of_transformers(width, height, max_pixels):
    preprocessor = dataclasses.replace(QWEN2, max_pixels=max_pixels)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(InputError, match="200 to 1; crop"):
            preprocessor.resized(width, height)
    else:
        h, w = smart_resize(height, width, 28, preprocessor.min_pixels, max_pixels)
        assert preprocessor.resized(width, height) == (w, h)


@pytest.mark.parametrize(
    "patch, max_pixels, expected",
    [
        (14, 1_003_520, (1120, 896)),
        (14, 12_845_056, (1288, 1036)),
        (14, 1_000_000, (1092, 868)),
        (14, 401_408, (700, 560)),
        (16, 262_144, (544, 448)),
    ],
)
def test_the_endovis_frame_gets_the_sizes_worked_out_by_hand(patch, max_pixels, expected):
    preprocessor = dataclasses.replace(QWEN2, patch_size=patch, max_pixels=max_pixels)
    assert preprocessor.resized(1280, 1024) == expected


def test_extreme_and_empty_sizes_are_refused():
    for size in ((201, 1), (1, 201), (0, 5), (5, 0)):
        with pytest.raises(InputError, match="image of"):
            QWEN2.resized(*size)


def test_old_new_and_nested_configuration_files_mean_the_same(tmp_path):
    common = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": MEAN,
        "image_std": STD,
    }
    size = {"shortest_edge": QWEN2.min_pixels, "longest_edge": QWEN2.max_pixels}
    old = {**common, "min_pixels": QWEN2.min_pixels, "max_pixels": QWEN2.max_pixels}
    files = {
        "old": ("preprocessor_config.json", old),
        "new": ("preprocessor_config.json", {**common, "size": size, "min_pixels": None}),
        "both": ("preprocessor_config.json", {**old, "size": {"shortest_edge": 1, "longest_edge": 2}}),
        "nested": ("processor_config.json", {"image_processor": {**common, "size": size}}),
    }
    for name, (file, entries) in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(entries))
        assert images.Preprocessor.from_folder(tmp_path / name) == QWEN2, name


def test_what_is_written_is_read_back(tmp_path):
    for preprocessor in (QWEN2, QWEN3):
        preprocessor.to_folder(tmp_path)
        assert images.Preprocessor.from_folder(tmp_path) == preprocessor


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"resample": 2}, "resample is 2"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"patch_size": 14.0}, "patch_size is 14.0"),
        ({"image_std": [1, 1, 0]}, "std is"),
        ({"image_mean": [1, 1]}, "mean is"),
        ({"image_mean": None}, "preprocessor_config.json"),
        ({"max_pixels": 5}, "min_pixels 3136 is above"),
        ({"merge_size": True}, "merge_size is True"),
    ],
)
def test_an_unsupported_configuration_is_refused_by_file_and_key(tmp_path, change, complaint):
    file = QWEN2.to_folder(tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=complaint) as caught:
        images.Preprocessor.from_folder(tmp_path)
    assert str(file) in str(caught.value)


def test_a_missing_key_and_a_broken_file_are_refused(tmp_path):
    file = QWEN2.to_folder(tmp_path)
    entries = json.loads(file.read_text())
    for content in ("{", "[]", json.dumps({k: v for k, v in entries.items() if k != "image_std"})):
        file.write_text(content)
        with pytest.raises(InputError, match=r"preprocessor_config\.json"):
            images.Preprocessor.from_folder(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match=r"preprocessor_config\.json"):
        images.Preprocessor.from_folder(tmp_path)


# -- reading files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_every_exif_orientation_is_applied(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(24, 16).save(tmp_path / "frame", kind, exif=exif)
    with Image.open(tmp_path / "frame") as stored:
        expected = ImageOps.exif_transpose(stored)
    loaded = images.load(tmp_path / "frame")
    assert loaded.size == ((24, 16) if orientation < 5 else (16, 24))
    assert loaded.mode == "RGB" and loaded.tobytes() == expected.tobytes()


def test_an_orientation_outside_the_standard_means_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 77
    noise(24, 16).save(tmp_path / "frame.png", exif=exif)
    assert images.load(tmp_path / "frame.png").tobytes() == noise(24, 16).tobytes()


def test_sixteen_bit_grey_is_divided_by_257(tmp_path):
    values = np.array([[0, 128, 129, 257, 514, 32768, 65406, 65407, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    grey = np.asarray(images.load(tmp_path / "grey.png"))
    assert grey[0].tolist() == [[v] * 3 for v in (0, 0, 1, 1, 2, 128, 254, 255, 255)]


def test_eight_bit_grey_and_bilevel_become_rgb(tmp_path):
    Image.fromarray(np.array([[0, 7, 255]], np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert np.asarray(images.load(tmp_path / "grey.png"))[0].tolist() == [[0] * 3, [7] * 3, [255] * 3]
    assert np.asarray(images.load(tmp_path / "bits.png"))[0].tolist() == [[255] * 3, [0] * 3]


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=100)
    red = np.asarray(images.load(tmp_path / "red.jpg"))[4, 4].astype(int)
    assert red[0] > 240 and red[1:].max() < 15


def test_transparency_is_laid_on_black(tmp_path):
    pixels = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 51]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    assert np.asarray(images.load(tmp_path / "alpha.png"))[0].tolist() == [
        [200, 100, 50],
        [0, 0, 0],
        [40, 20, 10],
    ]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([9, 8, 7, 60, 70, 80])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.asarray(images.load(tmp_path / "palette.png"))[0].tolist() == [[0, 0, 0], [60, 70, 80]]


@pytest.mark.parametrize("data", [png_bytes(noise(60, 40)), jpeg_bytes(noise(60, 40))], ids=["png", "jpeg"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, data):
    for percent in range(0, 100, 5):
        file = write(tmp_path, "cut.png", data[: len(data) * percent // 100])
        with pytest.raises(InputError, match=r"cut\.png: .*; replace the file"):
            images.load(file)


def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, monkeypatch):
    def no_decoding(*_):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", no_decoding)
    for width, height in ((50_000, 50_000), (9_000, 9_000), (4097, 4096), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(InputError, match=r"bomb\.png: .*(is over|exceeds limit)"):
            images.load(write(tmp_path, "bomb.png", png_header(width, height)))


def test_a_text_chunk_that_unpacks_without_end_is_refused(tmp_path):
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10_000_000)))
    file = write(tmp_path, "text.png", png_header(8, 8)[:33] + text + png_header(8, 8)[33:])
    with pytest.raises(InputError, match=r"text\.png: .* too large"):
        images.load(file)


def test_other_formats_are_refused_under_any_name(tmp_path):
    others = {"GIF": noise(8, 8).convert("P"), "BMP": noise(8, 8), "TIFF": noise(8, 8), "WEBP": noise(8, 8)}
    for kind, image in others.items():
        image.save(tmp_path / "frame.png", kind)
        with pytest.raises(InputError, match="not a whole PNG or JPEG"):
            images.load(tmp_path / "frame.png")
    for data in (b"", b"<svg/>", b"%!PS-Adobe", b"<html>", bytes(100), b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(InputError, match="not a whole PNG or JPEG"):
            images.load(write(tmp_path, "frame.png", data))


def test_a_file_with_several_pictures_is_refused(tmp_path):
    noise(8, 8).save(tmp_path / "moving.png", save_all=True, append_images=[noise(8, 8, 3).rotate(90)])
    with pytest.raises(InputError, match="holds 2 pictures"):
        images.load(tmp_path / "moving.png")


@pytest.mark.parametrize("count", [400, pytest.param(5_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("data", [png_bytes(noise(40, 30)), jpeg_bytes(noise(40, 30))], ids=["png", "jpeg"])
def test_damaged_bytes_give_a_picture_or_one_clear_line(tmp_path, data, count):
    rng, refused, before = random.Random(0), 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(len(damaged)) if rng.random() < 0.5 else rng.randrange(64)] = rng.randrange(256)
        file, since = write(tmp_path, "damaged", bytes(damaged)), time.process_time()
        try:
            image = images.load(file)
            assert image.mode == "RGB" and image.width * image.height <= images.MAX_PIXELS
        except InputError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error)
        assert time.process_time() - since < 5.0
    assert count / 8 < refused < count
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 <= 256 << 20


# -- paths -----------------------------------------------------------------------------------------


def test_a_path_inside_the_root_is_read_relative_and_absolute(tmp_path):
    file = write(tmp_path, "frame.png", png_bytes(noise(8, 8)))
    (tmp_path / "link.png").symlink_to(file)
    for path in ("frame.png", file, "./frame.png", "x/../frame.png", "link.png"):
        assert images.load(path, root=tmp_path).tobytes() == noise(8, 8).tobytes()


def test_no_path_leads_out_of_the_root_or_blocks(tmp_path):
    data = png_bytes(noise(8, 8))
    outside, root = tmp_path / "outside", tmp_path / "root"
    (outside / "deep").mkdir(parents=True)
    (root / "seq").mkdir(parents=True)
    secret = write(outside, "secret.png", data)
    (tmp_path / "root2").mkdir()
    write(tmp_path / "root2", "frame.png", data)
    (root / "file_link.png").symlink_to(secret)
    (root / "chain.png").symlink_to(root / "file_link.png")
    (root / "folder_link").symlink_to(outside)
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    (root / "device.png").symlink_to("/dev/zero")
    paths = (
        *(
            "../outside/secret.png",
            "seq/../../outside/secret.png",
            secret,
            "/etc/passwd",
            "../root2/frame.png",
        ),
        *("file_link.png", "chain.png", "folder_link/secret.png", "loop.png", "device.png", "/dev/stdin"),
        *(
            "pipe.png",
            "seq",
            ".",
            "",
            "missing.png",
            "frame\0.png",
            "http://host/frame.png",
            "file:///etc/passwd",
        ),
        *("x" * 300 + ".png", "a/" * 3000, "new\nline.png", "\udc80.png", "~/secret.png"),
        *("..\\outside\\secret.png", "%2e%2e/outside/secret.png", "C:/secret.png", "FRAME.PNG", "data:,x", "seq/.."),
    )
    assert len(paths) >= 30
    opened = []
    watching = [True]
    sys.addaudithook(lambda event, args: opened.append(args[0]) if watching[0] and event == "open" else None)
    for path in paths:
        with pytest.raises(InputError) as caught:
            images.load(path, root=root)
        assert "\n" not in str(caught.value) and ";" in str(caught.value), path
    watching[0] = False
    assert not [name for name in opened if isinstance(name, str) and not name.startswith(str(root))]
