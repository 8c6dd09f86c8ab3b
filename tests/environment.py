"""Environment variables for the processes that tests start."""

import os
from importlib.metadata import version

# A process that takes longer than this is considered to hang, even on a busy machine.
HANGS = 900  # seconds

# With these flags, XLA in jaxlib 0.10 compiles in a third of the time. Later versions do not know
# the first flag, and fail.
COMPILE_FAST = ''
if version('jaxlib').startswith('0.10.'):
    COMPILE_FAST = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'

# Two devices are enough for most tests; tests/test_many_devices.py uses eight.
DEVICES = int(os.environ.get('XMIXUP_TEST_DEVICES', '2'))


def simulated(devices: int) -> str:
    """XLA_FLAGS for this number of devices on the CPU."""
    return f'--xla_force_host_platform_device_count={devices} {COMPILE_FAST}'


def one_device() -> dict[str, str]:
    """The environment of a user's process, which has one device."""
    return os.environ | {'XLA_FLAGS': COMPILE_FAST}
