"""Memory of the process."""

import ctypes


def give_back_memory() -> None:
    """Gives the system what memory is free, where the C library is glibc.

    glibc keeps free memory in an arena for each of many threads. A checkpoint is written by other
    threads every time, so that a long run grows, by 0.2 MB with each (benchmarks/soak.py).
    """
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
