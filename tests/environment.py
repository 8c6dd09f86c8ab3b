"""The environments of the processes that tests start."""

import os
from importlib.metadata import version

# A process that takes longer hangs, also on a busy machine.
HANGS = 900  # seconds

# The XLA of jaxlib 0.10 compiles in a third of the time without its emitters for fusions, and with
# one part of a program at a time. Later ones stop at the first flag, which they do not know.
COMPILE_FAST = ''
if version('jaxlib').startswith('0.10.'):
    COMPILE_FAST = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'

# Two show what depends on there being several; tests/test_many_devices.py asks for eight.
DEVICES = int(os.environ.get('XMIXUP_TEST_DEVICES', '2'))


def simulated(devices: int) -> str:
    """XLA_FLAGS for this number of devices on the CPU."""
    return f'--xla_force_host_platform_device_count={devices} {COMPILE_FAST}'


def one_device() -> dict[str, str]:
    """One device, as a user's process has it."""
    return os.environ | {'XLA_FLAGS': COMPILE_FAST}
