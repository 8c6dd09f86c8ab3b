"""Tests that must not depend on the number of devices, repeated on eight."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from environment import HANGS


@pytest.mark.slow
def test_eight_devices():
    """Runs the tests marked `devices` in a process that starts with eight devices."""
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-m', 'devices', '-n', '0', '-p', 'no:cacheprovider'],
        cwd=Path(__file__).parents[1],
        env=os.environ | {'XMIXUP_TEST_DEVICES': '8'},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stdout
    assert ' passed' in done.stdout
