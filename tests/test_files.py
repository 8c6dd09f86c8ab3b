"""Atomic writes, also when several processes write the same file."""

import subprocess
import sys

import pytest
from environment import HANGS

from xmixup_jax.files import atomic_write

WRITE = """
import sys
from pathlib import Path
from xmixup_jax.files import atomic_write
for _ in range(300):
    with atomic_write(Path(sys.argv[1])) as partial:
        partial.write_text(sys.argv[2] * 1000)
"""


def test_processes_may_write_the_same_file_at_once(tmp_path):
    path = tmp_path / 'shared'
    writers = [
        subprocess.Popen([sys.executable, '-c', WRITE, path, word], stderr=subprocess.PIPE)
        for word in 'ab'
    ]
    for writer in writers:
        assert (writer.communicate(timeout=HANGS)[1], writer.returncode) == (b'', 0)
    assert path.read_text() in ('a' * 1000, 'b' * 1000)
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(ValueError, match='no'), atomic_write(path) as partial:
        partial.write_text('half')
        raise ValueError('no')
    assert path.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [path]
