"""Memory of this process."""

import ctypes


def release_memory() -> None:
    """Returns free memory to the system, if the C library is glibc.

    glibc keeps free memory in per-thread arenas. Each checkpoint is written by new threads, so that
    a long run would grow by 0.2 MB with every checkpoint (benchmarks/soak.py).
    """
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
