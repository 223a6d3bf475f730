"""More than 80 kinds of images nobody should train on without knowing: `data check` names every one and survives all.

Each is refused (an error), changed by a written rule (a warning that names the rule), or read as it is.
"""

import io
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from surgery_r1_jax import survey

LABELS = "What organ is being operated?|kidney|1,1,2,2\n"
REFUSED, READ = "refused", "read"
WIDTH, HEIGHT = 48, 32


def noise(mode="RGB", size=(WIDTH, HEIGHT)):
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    values = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return Image.fromarray(values, mode)


def opaque(mode):
    image = noise(mode)
    image.putalpha(255)
    return image


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(noise(), kind, exif=exif)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width=4, height=4, depth=8, colour=2, extra=b"", data=None, end=True):
    """A PNG put together by hand."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = bytes((7 * i) % 256 for i in range(width * channels * depth // 8)) if width < 100 else b""
    packed = zlib.compress(b"".join(b"\0" + row for _ in range(height if height < 100 else 1)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", packed) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + header + extra + body + (chunk(b"IEND", b"") if end else b"")


def jpeg_header(width, height):
    """A JPEG that claims a size and holds nothing."""
    raw = bytearray(saved(noise(), "JPEG"))
    at = raw.index(b"\xff\xc0")
    raw[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(raw)


def palette(**options):
    image = noise("L").convert("P")
    return saved(image, **options)


def zip_bytes():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "b")
    return buffer.getvalue()


PNG, JPEG = saved(noise()), saved(noise(), "JPEG", quality=90)
FLIPPED = bytearray(PNG)
FLIPPED[60] ^= 0xFF

# name (its suffix is the file's): bytes, verdict
KINDS = {
    "empty.png": (b"", REFUSED),
    "empty.jpg": (b"", REFUSED),
    **{f"jpeg_cut_at_{p}.jpg": (JPEG[: len(JPEG) * p // 100], REFUSED) for p in range(5, 100, 5)},
    **{f"png_cut_at_{p}.png": (PNG[: len(PNG) * p // 100], REFUSED) for p in range(10, 100, 20)},
    "png_named.jpg": (PNG, "PNG data under the name .jpg"),
    "jpeg_named.png": (JPEG, "JPEG data under the name .png"),
    **{
        f"{k.lower()}_named.png": (saved(noise(), k), REFUSED)
        for k in ("GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM", "TGA")
    },
    "many_pages.png": (saved(noise(), "TIFF", save_all=True, append_images=[noise("L")]), REFUSED),
    "moving.png": (saved(noise(), save_all=True, append_images=[noise().rotate(180)]), REFUSED),
    "moving_gif.png": (saved(noise(), "GIF", save_all=True, append_images=[noise().rotate(180)]), REFUSED),
    "two_in_one.jpg": (saved(noise(), "MPO", save_all=True, append_images=[noise().rotate(180)]), REFUSED),
    "cmyk.jpg": (saved(noise("CMYK"), "JPEG"), "CMYK"),
    "grey.jpg": (saved(noise("L"), "JPEG"), READ),
    "progressive.jpg": (saved(noise(), "JPEG", progressive=True), READ),
    "grey.png": (saved(noise("L")), READ),
    "bilevel.png": (saved(noise("L").convert("1")), READ),
    "grey_16.png": (png(depth=16, colour=0), "16 bits"),
    "colour_16.png": (png(depth=16, colour=2), "16 bits"),
    "palette.png": (palette(), READ),
    "palette_with_holes.png": (palette(transparency=7), "transparent"),
    "holes.png": (saved(noise("RGBA")), "transparent"),
    "grey_holes.png": (saved(noise("LA")), "transparent"),
    "opaque.png": (saved(opaque("RGBA")), READ),
    "one_colour_see_through.png": (saved(Image.new("RGB", (9, 9), 5), transparency=(5, 0, 0)), "transparent"),
    "tall.png": (saved(noise(size=(1, 150))), READ),
    "too_tall.png": (saved(noise(size=(1, 300))), REFUSED),
    "too_wide.jpg": (saved(noise(size=(2010, 10)), "JPEG"), REFUSED),
    "one_pixel.png": (saved(noise(size=(1, 1))), READ),
    **{f"exif_{o}.png": (turned("PNG", o), READ if o == 1 else "EXIF orientation") for o in range(1, 9)},
    **{f"exif_{o}.jpg": (turned("JPEG", o), READ if o == 1 else "EXIF orientation") for o in range(1, 9)},
    "exif_77.png": (turned("PNG", 77), READ),
    "bomb_50000.png": (png(50_000, 50_000), REFUSED),
    "bomb_9000.png": (png(9_000, 9_000), REFUSED),
    "bomb_4097.png": (png(4097, 4096), REFUSED),
    "bomb_2_31.png": (png(2**31 - 1, 2**31 - 1), REFUSED),
    "bomb.jpg": (jpeg_header(65_500, 65_500), REFUSED),
    "text_bomb.png": (png(extra=chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(10_000_000)))), REFUSED),
    "profile_bomb.png": (png(extra=chunk(b"iCCP", b"c\0\0" + zlib.compress(bytes(100_000_000)))), REFUSED),
    "no_width.png": (png(0, 4), REFUSED),
    "odd_depth.png": (png(depth=8, data=b"").replace(b"\x08\x02\0\0\0", b"\x03\x02\0\0\0"), REFUSED),
    "no_pixels.png": (png(data=b""), REFUSED),
    "pixels_that_are_none.png": (png(data=chunk(b"IDAT", b"not zlib")), REFUSED),
    "too_few_pixels.png": (png(data=chunk(b"IDAT", zlib.compress(b"\0"))), REFUSED),
    "flipped_byte.png": (bytes(FLIPPED), REFUSED),
    "junk_behind.png": (PNG + zip_bytes(), READ),
    "only_a_signature.png": (PNG[:8], REFUSED),
    "page.png": (b"<html><body>404 not found</body></html>", REFUSED),
    "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', REFUSED),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", REFUSED),
    "document.png": (b"%PDF-1.7\n", REFUSED),
    "archive.png": (zip_bytes(), REFUSED),
    "program.jpg": (b"\x7fELF" + bytes(200), REFUSED),
    "pickle.jpg": (b"\x80\x04\x95" + bytes(200), REFUSED),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", REFUSED),
    "zeros.png": (bytes(5000), REFUSED),
}

CHILD = """
import json, resource, sys
from pathlib import Path
from surgery_r1_jax import check
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
def grown():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
check.inspect(sys.argv[1])
before = grown()
summary = check.inspect(sys.argv[2])
found = [[problem.severity, str(problem)] for problem in summary.problems]
print(json.dumps({"grown": grown() - before, "found": found, "changed": summary.changed_images}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a child that may take 4 GiB and a minute says of all kinds at once, after a sound data set."""
    sound, hostile = tmp_path_factory.mktemp("sound"), tmp_path_factory.mktemp("hostile")
    write(sound, "fine.png", PNG)
    for name, (data, _) in KINDS.items():
        write(hostile, name, data)
    command = [sys.executable, "-c", CHILD, str(sound), str(hostile)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"root": hostile}


def write(root, name, data):
    """A frame of its own for each kind: two may have one stem."""
    stem, suffix = name.split(".")
    stem = f"{stem}_{suffix}"
    for folder in ("left_frames", "vqla/label"):
        (root / "seq_2" / folder).mkdir(parents=True, exist_ok=True)
    (root / "seq_2" / "left_frames" / f"{stem}.{suffix}").write_bytes(data)
    (root / "seq_2" / "vqla" / "label" / f"{stem}_QA.txt").write_text(LABELS)
    return stem


def test_there_are_eighty_kinds():
    assert len(KINDS) >= 80


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_refused_or_changed_by_name_or_read(found, name):
    stem, suffix = name.split(".")
    said = [(severity, text) for severity, text in found["found"] if f"/{stem}_{suffix}" in text]
    verdict = KINDS[name][1]
    if verdict == READ:
        assert said == []
    elif verdict == REFUSED:
        assert len(said) == 1 and said[0][0] == "error"
    else:
        assert len(said) == 1 and said[0][0] == "warning" and verdict in said[0][1]
    assert all(text.isprintable() for _, text in said)


def test_nothing_is_held_in_memory_for_a_bomb(found):
    assert found["grown"] < 128 << 20


def test_changed_images_are_counted_by_what_changes(found):
    changed = [verdict for _, verdict in KINDS.values() if verdict not in (READ, REFUSED)]
    assert sum(found["changed"].values()) == len(changed) == 23
    assert found["changed"]["16 bits a channel"] == 2 and found["changed"]["CMYK"] == 1


def test_strict_refuses_what_would_be_changed(tmp_path, capsys):
    write(tmp_path, "cmyk.jpg", KINDS["cmyk.jpg"][0])
    assert survey.main(tmp_path) == 0
    assert "images that reading changes (frames): CMYK (1)" in capsys.readouterr().out
    assert survey.main(tmp_path, strict=True) == 1
