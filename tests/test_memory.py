import ctypes
import subprocess
import sys

import pytest

THREADS = """
import ctypes, sys, threading
from xmixup_jax.memory import share_arenas
if sys.argv[1] == 'shared':
    share_arenas()
allocated = threading.Barrier(33)
def allocate():
    bytes(10_000)
    allocated.wait()
threads = [threading.Thread(target=allocate) for _ in range(32)]
for thread in threads:
    thread.start()
allocated.wait()
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, 'stdout'))
libc.fflush(None)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'malloc_info'), reason='not glibc')
def test_threads_share_arenas():
    def arenas(argument):
        command = [sys.executable, '-c', THREADS, argument]
        return subprocess.check_output(command, text=True).count('<heap nr=')

    assert arenas('shared') <= 2 < arenas('own')
