"""The errors that end a program with one clear line instead of a traceback, and their exit statuses."""

import contextlib
import errno
import os
from collections.abc import Iterator


class InputError(Exception):
    """Something the user can mend: a file, a line, a key, a box. The message says what, where and the remedy."""

    exit_status = 2


class NumericError(Exception):
    """Training met non-finite numbers too often to go on. The message says the step, and how to go on."""

    exit_status = 5


class StorageError(Exception):
    """A disk or a bucket did not do what it may do the next time. The message says what is lost and the remedy."""

    exit_status = 1


class Preempted(Exception):
    """The process was asked to stop; its state is saved and the same command with --resume goes on."""

    exit_status = 75


def printable(text: object) -> str:
    """Text on one line that cannot steer a terminal; names and paths may hold any character."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))


def one_line(problem: Exception) -> str:
    """What another library says of a problem, as one short line."""
    return printable(" ".join(str(problem).split())[:200]) or type(problem).__name__


def of_disk(problem: OSError) -> str | None:
    """What to tell of an error that a disk is the cause of, in one line; else None.

    A right may be missing for more than files: such an error has to name one.
    """
    match problem.errno:
        case errno.ENOSPC | errno.EDQUOT:
            remedy = "make room and start again with --resume"
        case errno.EIO:
            remedy = "see what the system's log says of this disk, and start again with --resume"
        case errno.EROFS | errno.EACCES | errno.EPERM if problem.filename:
            remedy = "get the right to it, or choose another place"
        case _:
            return None
    return f"{problem.filename}: {problem.strerror}; {remedy}" if problem.filename else f"{problem.strerror}; {remedy}"


@contextlib.contextmanager
def naming(file: str | os.PathLike) -> Iterator[None]:
    """The system does not tell in which file a write failed; its error gets this name."""
    try:
        yield
    except OSError as problem:
        problem.filename = problem.filename or os.fspath(file)
        raise


def of_storage(problem: Exception) -> str | None:
    """What the system says of a disk, where that is the cause, whichever library tells it; else None."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
    return next((text for text in map(os.strerror, numbers) if text in str(problem)), None)
