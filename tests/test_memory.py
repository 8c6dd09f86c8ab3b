import ctypes

import psutil
import pytest

from xmixup_jax.run.memory import release_memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'malloc_trim'), reason='not glibc')
def test_free_memory_between_used_memory_is_given_back():
    blocks = [bytes(1000) for _ in range(100_000)]
    blocks.append(bytes(1000))
    del blocks[:-1]  # the last block keeps the memory below it from being returned automatically
    before = psutil.Process().memory_info().rss
    release_memory()
    assert before - psutil.Process().memory_info().rss > 50e6
