"""What the C library's allocator does with the memory that this process frees.

GNU's C library has the switches, mallopt(3) and malloc_trim(3); with another one nothing happens.
"""

import contextlib
import ctypes


def keep() -> None:
    """Have this process keep what it frees, for the next array: fresh pages cost more than copying to them.

    For commands that pass a whole model through a few buffers.
    """
    arenas_max, mmap_max, trim_threshold = -8, -4, -1
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for switch, value in ((arenas_max, 1), (mmap_max, 0), (trim_threshold, -1)):
            mallopt(switch, value)


def give_back() -> None:
    """Hand free pages back to the system.

    Every few threads have an arena of their own, and what one frees another cannot use: a program that starts
    threads again and again grows by that, though it holds nothing.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
