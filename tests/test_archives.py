"""`data unpack`: 30 archives that would hurt are refused in one line and leave nothing; sound ones come out whole."""

import gzip
import io
import os
import random
import resource
import stat
import struct
import tarfile
import time
import zipfile
import zlib

import numpy as np
import pytest

from surgery_r1_jax import archives, cli
from surgery_r1_jax.errors import InputError

GOOD = {
    "data/seq_2/left_frames/frame000.png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 3000,
    "data/seq_2/vqla/label/frame000_QAL.txt": b"What organ is being operated?|kidney|1,1,61,41\n",
    "data/empty.txt": b"",
    "data/\u00fcber sicht.txt": b"x",
}
ZEROS = 10_000_000_000  # bytes that a bomb unpacks to


def tar_of(*members, mode="w", **options):
    """A tar of (name, bytes) pairs and of ready TarInfos."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                archive.addfile(tar_info(member[0], size=len(member[1])), io.BytesIO(member[1]))
    return buffer.getvalue()


def tar_info(name, **fields):
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def zip_of(*members, **options):
    """A zip of (name, bytes) pairs; a name may be a ready ZipInfo."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def zip_info(name, mode):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def patched(raw, old, new):
    assert old in raw and len(old) == len(new)
    return raw.replace(old, new)


def encrypted():
    raw = bytearray(zip_of(("a.txt", b"secret")))
    raw[6] |= 1
    raw[raw.index(b"PK\1\2") + 8] |= 1
    return bytes(raw)


def gzip_bomb(size=ZEROS):
    """A tar.gz with one file of zeros, in pieces of gzip that repeat."""
    piece = 10_000_000
    head = tarfile.TarInfo("zeros.txt")
    head.size = size
    return gzip.compress(head.tobuf(tarfile.GNU_FORMAT)) + gzip.compress(bytes(piece)) * (size // piece)


def zip_bomb(size=ZEROS):
    """A zip with one file of zeros: one piece of deflate again and again."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = deflate.compress(bytes(10_000_000)) + deflate.flush(zlib.Z_FULL_FLUSH)
    data = piece * (size // 10_000_000)
    extra = struct.pack("<HHQQ", 1, 16, size, len(data))
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 8, 0, 33, 0, len(data), 2**32 - 1, 5, 0) + b"z.txt"
    fields = (b"PK\1\2", 45, 45, 0, 8, 0, 33, 0, 2**32 - 1, 2**32 - 1, 5, len(extra), 0, 0, 0, 0, 0)
    entry = struct.pack("<4s6H3L5H2L", *fields) + b"z.txt" + extra
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(entry), len(local) + len(data), 0)
    return local + data + entry + end


def zip_of_a_million():
    """A zip with a directory of 1,000,000 members that share their data."""
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, 0, 0, 0, 7, 0) + b"0000000"
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0) + b"0000000"
    rows = np.tile(np.frombuffer(entry, np.uint8), (1_000_000, 1))
    rows[:, -7:] = np.arange(1_000_000)[:, None] // 10 ** np.arange(6, -1, -1) % 10 + 48
    size = len(entry) * 1_000_000
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 10**6, 10**6, size, len(local))
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(local) + size, 1)
    return (
        local + rows.tobytes() + record + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, size, 30, 0)
    )


def tar_of_many(count):
    """A tar.gz of `count` empty files with names of their own."""
    block = np.frombuffer(tarfile.TarInfo("0000000.txt").tobuf(tarfile.GNU_FORMAT), np.uint8)
    base = int(block[:148].sum() + block[156:].sum()) + 8 * 32
    buffer = io.BytesIO()
    with gzip.open(buffer, "wb", compresslevel=1) as file:
        for start in range(0, count, 50_000):
            numbers = np.arange(start, min(start + 50_000, count))
            rows = np.tile(block, (len(numbers), 1))
            digits = numbers[:, None] // 10 ** np.arange(6, -1, -1) % 10
            rows[:, :7] = digits + 48
            sums = base + digits.sum(1)
            rows[:, 148:154] = sums[:, None] // 8 ** np.arange(5, -1, -1) % 8 + 48
            rows[:, 154:156] = (0, 32)
            file.write(rows.tobytes())
        file.write(bytes(1024))
    return buffer.getvalue()


FILE = ("a.txt", b"sound")
HOSTILE = {
    "zip slip": (lambda: zip_of(FILE, ("../out.txt", b"x")), "../out.txt: leads out"),
    "zip slip in the middle": (lambda: zip_of(FILE, ("a/../../out.txt", b"x")), "leads out"),
    "zip slip with back slashes": (lambda: zip_of(FILE, ("..\\out.txt", b"x")), "leads out"),
    "tar slip": (lambda: tar_of(FILE, ("../out.txt", b"x")), "../out.txt: leads out"),
    "zip with an absolute name": (lambda: zip_of(FILE, ("/tmp/out.txt", b"x")), "absolute"),
    "tar with an absolute name": (lambda: tar_of(FILE, ("/tmp/out.txt", b"x")), "absolute"),
    "a drive": (lambda: zip_of(FILE, ("C:/out.txt", b"x")), "absolute"),
    "tar link out": (lambda: tar_of(FILE, tar_info("l", type=tarfile.SYMTYPE, linkname="../../etc")), "l: is a link"),
    "tar link inside": (lambda: tar_of(FILE, tar_info("l", type=tarfile.SYMTYPE, linkname="a.txt")), "l: is a link"),
    "tar through a link": (
        lambda: tar_of(tar_info("d", type=tarfile.SYMTYPE, linkname="/tmp"), ("d/out.txt", b"x")),
        "d: is a link",
    ),
    "tar hard link": (lambda: tar_of(FILE, tar_info("h", type=tarfile.LNKTYPE, linkname="../b")), "h: is a link"),
    "zip link": (lambda: zip_of(FILE, (zip_info("l", stat.S_IFLNK | 0o777), b"/etc/passwd")), "l: is a link"),
    "tar device": (
        lambda: tar_of(FILE, tar_info("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)),
        "null: is a dev",
    ),
    "tar pipe": (lambda: tar_of(FILE, tar_info("pipe", type=tarfile.FIFOTYPE)), "pipe: is a dev"),
    "zip device": (lambda: zip_of(FILE, (zip_info("null", stat.S_IFCHR | 0o666), b"")), "null: is a device"),
    "10 GB of zeros in a tar.gz": (gzip_bomb, "zeros.txt: with it more than"),
    "10 GB of zeros in a zip": (zip_bomb, "unpack to 10,000,000,000"),
    "1,000 to 1": (lambda: zip_of(FILE, ("z.txt", bytes(1 << 25))), "z.txt: "),
    "many small bombs": (lambda: zip_of(*((f"{i}.txt", bytes(1 << 23)) for i in range(5))), ".txt: with it more"),
    "a zip of a million": (zip_of_a_million, "directory of 53"),
    "a tar of too many": (lambda: tar_of_many(1001), "is one of more than"),
    "a header of 20 MB": (
        lambda: tar_of(("a", b""), format=tarfile.PAX_FORMAT, pax_headers={"k": "v" * 20_000_000}),
        "header",
    ),
    "a zip in a zip": (lambda: zip_of(FILE, ("inner.dat", zip_of(FILE))), "inner.dat: is an archive"),
    "a tar in a tar.gz": (lambda: gzip.compress(tar_of(FILE, ("inner", tar_of(FILE)))), "inner: is an archive"),
    "one name twice": (lambda: tar_of(FILE, FILE), "a.txt: is there twice"),
    "one name in two cases": (lambda: zip_of(FILE, ("A.TXT", b"x")), "A.TXT: is the same as a.txt"),
    "folders in two cases": (lambda: zip_of(("seq/a", b"x"), ("SEQ/b", b"x")), "SEQ: is the same as seq"),
    "one name composed twice": (lambda: zip_of(("\u00e9", b"x"), ("e\u0301", b"x")), "is the same as"),
    "a file that is a folder": (lambda: tar_of(("a", b"x"), ("a/b", b"x")), "a: is there twice"),
    "encrypted": (encrypted, "a.txt: is encrypted"),
    "a name with a control character": (lambda: tar_of(("a\x1b[2Jb", b"x")), "no plain name"),
    "a name with NUL": (lambda: patched(zip_of(("aXb.txt", b"x")), b"aXb", b"a\0b"), "no plain name"),
    "a name of 300 characters": (lambda: tar_of(("n" * 300, b"x")), "too long"),
    "a name without end": (lambda: tar_of(("n/" * 2000 + "n", b"x")), "too long"),
    "a sparse file": (
        lambda: tar_of(FILE, tar_info("s", type=tarfile.GNUTYPE_SPARSE), format=tarfile.GNU_FORMAT),
        "s: has holes",
    ),
    "a second tar behind the end": (lambda: tar_of(FILE) + tar_of(FILE), "behind its end"),
    "a tar cut in its data": (lambda: tar_of(("a", bytes(5000)))[:3000], "damaged"),
    "a tar cut between members": (lambda: tar_of(FILE, ("b", b"x"))[:1024], "cut short"),
    "a tar with a damaged header": (lambda: patched(tar_of(FILE, ("b.txt", b"x")), b"b.txt", b"c.txt"), "damaged"),
    "a tar.gz cut short": (lambda: gzip.compress(tar_of(FILE, ("b", os.urandom(9000))))[:5000], "damaged"),
    "a zip cut short": (lambda: zip_of(FILE)[:-30], "damaged"),
    "a zip whose data is damaged": (
        lambda: patched(zip_of((zipfile.ZipInfo("r"), b"qqqq")), b"qqqq", b"qqqz"),
        "damaged",
    ),
    "a zip whose size lies": (lambda: zip_with_size(50), "damaged"),
    "two names for one file": (lambda: b"".join(zip_of(FILE).split(b"PK\1\2", 1)[:1]) + other_directory(), "damaged"),
    "nothing": (lambda: b"", "no zip, tar or tar.gz"),
    "a picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(600), "no zip, tar or tar.gz"),
    "a zip of no file": (lambda: zip_of(("folder/", b"")), "holds no file"),
}


def zip_with_size(size):
    """A zip that claims another size for its file than it has."""
    raw = bytearray(zip_of(("r", os.urandom(100))))
    at = raw.index(b"PK\1\2")
    raw[at + 24 : at + 28] = struct.pack("<L", size)
    return bytes(raw)


def other_directory():
    """The directory of a zip under another name than its local header has."""
    raw = patched(zip_of(FILE), b"a.txt", b"b.txt")
    return raw[raw.index(b"PK\1\2") :]


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_refused_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, kind):
    if kind == "a tar of too many":
        monkeypatch.setattr(archives, "_MEMBERS", 1000)
    make, reason = HOSTILE[kind]
    (tmp_path / "archive").write_bytes(make())
    before, since = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(InputError) as refused:
        archives.unpack(tmp_path / "archive", tmp_path / "new" / "data")
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'archive'}: ") and reason in message and "; " in message
    assert message.isprintable() and len(message) < 500
    assert set(everything(tmp_path)) <= {"archive", "new"}
    assert time.process_time() - since < 5
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 128 << 20


def test_there_are_enough_hostile_archives():
    assert len(HOSTILE) >= 25


@pytest.mark.slow
def test_a_tar_of_a_million_is_refused_by_the_limit_it_meets_in_use(tmp_path):
    (tmp_path / "archive").write_bytes(tar_of_many(1_000_000))
    since = time.process_time()
    with pytest.raises(InputError, match=r"one of more than 200,000 members|bytes are unpacked|unpacks to more"):
        archives.unpack(tmp_path / "archive", tmp_path / "data")
    assert everything(tmp_path) == ["archive"]
    assert time.process_time() - since < 60


def packed(kind, members=GOOD):
    if kind == "zip":
        return zip_of(*members.items())
    raw = tar_of(*members.items(), format=tarfile.PAX_FORMAT if "pax" in kind else tarfile.GNU_FORMAT)
    return gzip.compress(raw) if "gz" in kind else raw


def read(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar pax", "tar gz", "tar gz pax"])
def test_a_sound_archive_comes_out_whole(tmp_path, kind):
    (tmp_path / "archive").write_bytes(packed(kind))
    told = []
    count = archives.unpack(tmp_path / "archive", tmp_path / "out", tell=lambda *what: told.append(what))
    assert count == len(GOOD) and read(tmp_path / "out") == GOOD
    total = sum(map(len, GOOD.values()))
    assert told[-1][1:] == (total, total)
    assert not list(tmp_path.glob("*.part"))
    assert all(stat.S_IMODE(p.stat().st_mode) & 0o111 == 0 for p in (tmp_path / "out").rglob("*") if p.is_file())


def test_what_command_line_tools_write_is_read(tmp_path):
    """`tar -C folder .` writes ./ before each name and its top folder as a member."""
    for name, data in GOOD.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    assert os.system(f"tar -C {tmp_path}/in -czf {tmp_path}/a.tgz .") == 0
    archives.unpack(tmp_path / "a.tgz", tmp_path / "out")
    assert read(tmp_path / "out") == GOOD


@pytest.mark.parametrize("kind", ["zip", "tar", "tar gz"])
def test_damaged_archives_come_out_whole_or_not_at_all(tmp_path, kind):
    raw, rng, refused = packed(kind, {"a/b.txt": b"some text\n" * 50, "c.txt": os.urandom(300)}), random.Random(0), 0
    for number in range(80):
        damaged = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "archive").write_bytes(damaged)
        try:
            archives.unpack(tmp_path / "archive", tmp_path / "out" / str(number))
        except InputError as error:
            refused += 1
            assert str(error).isprintable() and not (tmp_path / "out" / str(number)).exists()
    assert refused > 15
    assert not list((tmp_path / "out").glob("*.part"))


def test_the_target_must_be_new_and_is_not_touched(tmp_path):
    (tmp_path / "archive.zip").write_bytes(packed("zip"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        archives.unpack(tmp_path / "archive.zip", tmp_path / "data")
    assert everything(tmp_path / "data") == ["mine.txt"]
    with pytest.raises(InputError, match="No such file"):
        archives.unpack(tmp_path / "missing.zip", tmp_path / "new")
    with pytest.raises(InputError, match="not an ordinary file"):
        archives.unpack(tmp_path / "data", tmp_path / "new")
    with pytest.raises(InputError, match="more than 1,000 bytes"):
        archives.unpack(tmp_path / "archive.zip", tmp_path / "new", 1000)
    assert not (tmp_path / "new").exists()


def test_an_interrupted_unpacking_leaves_nothing(tmp_path):
    (tmp_path / "archive.zip").write_bytes(packed("zip"))

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        archives.unpack(tmp_path / "archive.zip", tmp_path / "out", tell=interrupt)
    assert everything(tmp_path) == ["archive.zip"]


def test_the_command_unpacks_and_refuses(tmp_path, capsys):
    (tmp_path / "good.zip").write_bytes(packed("zip"))
    (tmp_path / "bad.zip").write_bytes(zip_of(("../x", b"")))
    assert cli.main(["data", "unpack", str(tmp_path / "good.zip"), str(tmp_path / "out")]) == 0
    assert "4 files" in capsys.readouterr().out
    assert cli.main(["data", "unpack", str(tmp_path / "bad.zip"), str(tmp_path / "out2")]) == 2
    assert f"error: {tmp_path / 'bad.zip'}: ../x: leads out" in capsys.readouterr().err
