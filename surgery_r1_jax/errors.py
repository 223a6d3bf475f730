"""The errors that end a program with one clear line instead of a traceback, and their exit statuses."""

import errno
import os


class InputError(Exception):
    """Something the user can mend: a file, a line, a key, a box. The message says what, where and the remedy."""

    exit_status = 2


class NumericError(Exception):
    """Training met non-finite numbers too often to go on. The message says the step, and how to go on."""

    exit_status = 5


class StorageError(Exception):
    """A disk did not take what was to be kept. The message says what is lost, what is not, and the remedy."""

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


def of_storage(problem: Exception) -> str | None:
    """What the system says of a disk, where that is the cause, whichever library tells it; else None."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
    return next((text for text in map(os.strerror, numbers) if text in str(problem)), None)
