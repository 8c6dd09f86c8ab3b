"""Memory of the process."""

import ctypes
import sys

_M_ARENA_MAX = -8  # malloc.h
_ARENAS = 2


def share_arenas() -> None:
    """Lets all threads share two arenas of memory, where the C library is glibc.

    By itself it makes up to eight a core, and what is free in one is lost to the threads of the
    others. Orbax writes each checkpoint with other threads: a long run grew by 50 MB an hour
    (benchmarks/soak.py). To be called before there are threads; those that have an arena keep it.
    """
    if sys.platform == 'linux':
        mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
        if mallopt is not None:
            mallopt(_M_ARENA_MAX, _ARENAS)
