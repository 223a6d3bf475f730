"""`data unpack`: a zip, tar or tar.gz file as a new folder, whole or not at all.

The archive is read twice. The first time every member is vetted and nothing is written; the second time the files
are written beside the target, and take its name when the last one is whole. Only plain files and folders are taken:
no links, devices or holes, no name that leaves the folder or that stands for two files on some file system, no archive
inside the archive, and nothing that swells beyond the limits. What Python's own tar filter (PEP 706) and `zipfile`
refuse is refused besides.
"""

import contextlib
import errno
import gzip
import os
import shutil
import stat
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from surgery_r1_jax import files
from surgery_r1_jax.errors import InputError, one_line, printable

_CHUNK = 1 << 18  # bytes copied at once
_MEMBERS = 200_000  # files and folders
_RATIO, _SMALL = 200, 1 << 24  # bytes out for each byte in; what unpacks to less than _SMALL is no bomb
_HEADERS = 1 << 20  # bytes of a tar between the data of two members
_DIRECTORY = 1 << 24  # bytes of a zip that are read at once: only its directory is longer than a few
_NAME, _PART = 1024, 255  # bytes of a member's path, and of what stands between two slashes

# How archives begin: a member that does is an archive inside the archive.
_MAGIC = (b"PK\3\4", b"PK\5\6", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"7z\xbc\xaf\x27\x1c", b"Rar!", b"\x28\xb5\x2f\xfd")
_TAR = slice(257, 262)  # where a tar says "ustar"

_ODD = {stat.S_IFLNK: "a link", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe"}
_BY_HAND = "unpack it by hand if you trust it"
_PLAIN = "pack the files themselves"


class _Refused(Exception):
    """Why the archive is not unpacked, and what to do."""


@dataclass(frozen=True)
class _Member:
    """A plain file or a folder; `path` is what its name comes to, "" for the top folder itself."""

    path: str
    size: int
    folder: bool
    open: Callable[[], IO[bytes]]


def unpack(
    archive: str | Path,
    folder: str | Path,
    max_bytes: int = 200 * 10**9,
    *,
    tell: Callable[[str, int, int], None] = lambda path, done, total: None,
) -> int:
    """Unpack into `folder`, which must not exist yet, at most `max_bytes`; the number of files.

    `tell` is told of each file, and how many bytes of how many are done.
    Raises: InputError `ARCHIVE: member: reason; remedy`. Nothing of a refused archive is left behind.
    """
    archive, folder = Path(archive), Path(folder)
    if os.path.lexists(folder):
        raise InputError(printable(f"{folder}: is there already; name a new folder"))
    with _one_line(archive):
        with _opened(archive, max_bytes) as members:
            sizes = _vetted(members, min(max_bytes, _most(archive.stat().st_size)))
        total = sum(sizes.values())
        folder.parent.mkdir(parents=True, exist_ok=True)
        if total > (free := shutil.disk_usage(folder.parent).free):
            raise _Refused(f"unpacks to {total:,} bytes, {free:,} are free; make room")
        done = 0
        with files.new_folder(folder) as part, _opened(archive, max_bytes) as members:
            for member in members:
                _write(member, part, sizes)
                tell(member.path, done := done + member.size, total)
    return len(sizes)


@contextlib.contextmanager
def _one_line(archive: Path) -> Iterator[None]:
    """Turns what may go wrong with an archive into an InputError."""
    try:
        yield
    except _Refused as refused:
        raise InputError(printable(f"{archive}: {refused}")) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = error.strerror or f"damaged ({one_line(error)})"
        raise InputError(printable(f"{error.filename or archive}: {reason}; check the path and the file")) from None
    except MemoryError:
        raise
    except Exception as error:  # the readers of archives raise a dozen kinds on damaged ones
        raise InputError(printable(f"{archive}: damaged ({one_line(error)}); fetch it again")) from None


@contextlib.contextmanager
def _opened(archive: Path, max_bytes: int) -> Iterator[Iterator[_Member]]:
    """The members of a zip, tar or tar.gz file, told apart by how it begins."""
    if not stat.S_ISREG(archive.stat().st_mode):
        raise _Refused("is not an ordinary file; name a zip, tar or tar.gz file")
    with archive.open("rb") as file:
        start = file.read(512)
        file.seek(0)
        if start.startswith((b"PK\3\4", b"PK\5\6")):
            yield _zip_members(_Bounded(file, once=_DIRECTORY))
        elif start.startswith(b"\x1f\x8b"):
            with gzip.open(file) as unpacked:
                most = min(max_bytes, _most(archive.stat().st_size)) + _HEADERS
                yield _tar_members(_Bounded(unpacked, most))
        elif start[_TAR] == b"ustar":
            yield _tar_members(_Bounded(file, archive.stat().st_size))
        else:
            raise _Refused("is no zip, tar or tar.gz file; pack the folder as one of these")


def _zip_members(file: "_Bounded") -> Iterator[_Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name, kind = info.orig_filename, stat.S_IFMT(info.external_attr >> 16)
            path = _path(name)
            if info.flag_bits & 0x1:
                raise _Refused(f"{name}: is encrypted; decrypt it first")
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _Refused(f"{name}: is {_ODD.get(kind, 'no plain file')}; {_PLAIN}")
            if info.file_size > _most(info.compress_size):
                raise _Refused(f"{name}: {info.compress_size:,} bytes unpack to {info.file_size:,}; {_BY_HAND}")
            yield _Member(path, info.file_size, info.is_dir(), lambda info=info: archive.open(info))


def _tar_members(file: "_Bounded") -> Iterator[_Member]:
    # As a stream: every byte is read once and in order, so that a bomb is counted while it unpacks.
    file.until = _HEADERS
    with tarfile.open(fileobj=file, mode="r|", tarinfo=_Header) as archive:
        while (info := archive.next()) is not None:
            path = _path(info.name)
            if not (info.isreg() or info.isdir()):
                kind = "a link" if info.issym() or info.islnk() else "a device or a pipe"
                raise _Refused(f"{info.name}: is {kind}; {_PLAIN} (tar --dereference)")
            if info.issparse():
                raise _Refused(f"{info.name}: has holes; pack it without --sparse")
            tarfile.data_filter(info, ".")
            file.until = file.given + info.size + _HEADERS
            yield _Member(path, info.size, info.isdir(), lambda info=info: archive.extractfile(info))
            archive.members.clear()  # else it remembers them all
        while block := archive.fileobj.read(_CHUNK):
            if block.strip(b"\0"):
                raise _Refused("goes on behind its end; it is damaged or hides something, fetch it again")
            file.until = file.given + _HEADERS


class _Header(tarfile.TarInfo):
    """A header of a tar. `tarfile` takes a damaged one, and no end at all, for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise _Refused(f"is cut short or damaged ({one_line(error)}); fetch it again") from None


class _Bounded:
    """A file that refuses to be read beyond bounds: `most` bytes in all, `once` at once, and none after `until`."""

    def __init__(self, file: IO[bytes], most: int | None = None, once: int | None = None):
        self._file, self._most, self._once = file, most, once
        self.given, self.until = 0, None
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, file.close

    def read(self, size: int = -1) -> bytes:
        if self._once is not None and size > self._once:
            raise _Refused(f"has a directory of {size:,} bytes, far over {_MEMBERS:,} members; {_BY_HAND}")
        if self.until is not None and self.given > self.until:
            raise _Refused(f"has a header of more than {_HEADERS:,} bytes; {_BY_HAND}")
        block = self._file.read(size)
        self.given += len(block)
        if self._most is not None and self.given > self._most:
            raise _Refused(f"unpacks to more than {self._most:,} bytes; {_BY_HAND}")
        return block


def _most(packed: int) -> int:
    """What so many packed bytes may unpack to."""
    return max(_SMALL, _RATIO * packed)


def _path(name: str) -> str:
    """The path that a member's name comes to; refuses what is not plainly one inside of the folder."""
    parts = name.removesuffix("/").split("/")
    if parts[0] == ".":  # tar writes ./seq_2/..., and the folder itself as .
        parts = parts[1:]
    if name.startswith("/") or name[1:2] == ":":
        raise _Refused(f"{name}: is an absolute path; pack it relative to the folder")
    if ".." in parts or "\\" in name:
        raise _Refused(f"{name}: leads out of the folder; pack it relative to the folder")
    if not name.isprintable() or "" in parts or "." in parts:
        raise _Refused(f"{name!r}: is no plain name; rename it and pack again")
    if len(name.encode()) > _NAME or any(len(part.encode()) > _PART for part in parts):
        raise _Refused(f"{name[:60]}...: the name is too long; shorten it and pack again")
    return "/".join(parts)


def _vetted(members: Iterable[_Member], most: int) -> dict[str, int]:
    """The size of each file by its path; refuses more than the limits, and names that may meet on a disk."""
    sizes: dict[str, int] = {}
    spelt: dict[str, tuple[str, bool]] = {}  # path and whether it is a folder, by what a file system may make of it
    total = 0
    for number, member in enumerate(members, 1):
        if number > _MEMBERS:
            raise _Refused(f"{member.path}: is one of more than {_MEMBERS:,} members; {_BY_HAND}")
        if (total := total + member.size) > most:
            raise _Refused(f"{member.path}: with it more than {most:,} bytes are unpacked; {_BY_HAND}")
        for path, folder in _with_parents(member):
            before, was_folder = spelt.setdefault(unicodedata.normalize("NFKC", path).casefold(), (path, folder))
            if before != path:
                raise _Refused(f"{path}: is the same as {before} to some file systems; rename one and pack again")
            if folder != was_folder or path in sizes:
                raise _Refused(f"{path}: is there twice; remove one and pack again")
        if not member.folder:
            sizes[member.path] = member.size
    if not sizes:
        raise _Refused("holds no file; fetch it again")
    return sizes


def _with_parents(member: _Member) -> Iterator[tuple[str, bool]]:
    """The member's path and those of the folders it lies in, outermost first, and whether each is a folder."""
    parts = member.path.split("/") if member.path else []
    for length in range(1, len(parts) + 1):
        yield "/".join(parts[:length]), member.folder or length < len(parts)


def _write(member: _Member, part: Path, sizes: dict[str, int]) -> None:
    """Write one member below `part`; its data must be what was vetted, and no archive."""
    target = part / member.path
    if member.folder:
        target.mkdir(parents=True, exist_ok=True)
        return
    if sizes.get(member.path) != member.size:
        raise _Refused(f"{member.path}: has changed since it was vetted; unpack again")
    target.parent.mkdir(parents=True, exist_ok=True)
    left = member.size
    with member.open() as source, target.open("xb") as file:
        while block := source.read(_CHUNK):
            if left == member.size and (block.startswith(_MAGIC) or block[_TAR] == b"ustar"):
                raise _Refused(f"{member.path}: is an archive itself; unpack it, and pack without it")
            file.write(block)
            left -= len(block)
    if left:
        raise _Refused(f"{member.path}: is cut short; fetch the archive again")
