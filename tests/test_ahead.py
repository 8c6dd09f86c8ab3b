"""The count of a compiled program's memory traffic, on a program that was written by hand."""

import subprocess
import sys

import pytest

from benchmarks import ahead, torch_peer
from xmixup_jax.errors import ConfigError

PROGRAM = """HloModule step

%fused (p0: f32[8,4], p1: f32[4]) -> f32[2,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = f32[4]{0} parameter(1)
  %part = f32[2,4]{1,0} slice(%p0), slice={[0:2], [0:4]}
  %wide = f32[2,4]{1,0} broadcast(%p1), dimensions={1}
  ROOT %sum = f32[2,4]{1,0} add(%part, %wide)
}

ENTRY %main (x: bf16[2,3], w: bf16[3,3], y: f32[8,4], b: f32[4]) -> f32[2,4] {
  %x = bf16[2,3]{1,0} parameter(0)
  %w = bf16[3,3]{1,0} parameter(1)
  %y = f32[8,4]{1,0} parameter(2)
  %b = f32[4]{0} parameter(3)
  %conv = (bf16[2,3]{1,0}, u8[0]{0}) custom-call(%x, %w), custom_call_target="__cudnn$convForward"
  %out = bf16[2,3]{1,0} get-tuple-element(%conv), index=0
  %start = f32[4]{0} all-reduce-start(%b), to_apply=%add
  %done = f32[4]{0} all-reduce-done(%start)
  ROOT %end = f32[2,4]{1,0} fusion(%y, %done), kind=kLoop, calls=%fused
}
"""


def test_traffic_of_a_program():
    found = ahead.traffic(PROGRAM)
    # The convolution: 6 and 9 numbers in, 6 out, of 2 bytes.
    assert found.convolutions == 2 * (6 + 9 + 6)
    # The fusion: a slice of 8 numbers and 4 others in, 8 out, of 4 bytes.
    assert found.others == 4 * (8 + 4 + 8)
    assert (found.messages, found.message_bytes) == (1, 16)


@pytest.mark.parametrize(
    ('flag', 'words'),
    [
        ('--config.batch_norm_over=device', 'would be those of the devices of this machine'),
        ('--target=no:1x1', r'--target=no:1x1: .*; install'),
    ],
)
def test_impossible_targets_end_in_one_line(tmp_path, flag, words):
    flags = ['--target=h100', '--config=configs/digits.py', f'--config.cache_dir={tmp_path}', flag]
    with pytest.raises(ConfigError, match=words):
        ahead.run(['ahead', *flags])


def test_help_imports_nothing():
    done = subprocess.run(
        [sys.executable, '-X', 'importtime', '-m', 'benchmarks.torch_peer', '--help'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == torch_peer.__doc__.strip()
    imported = {line.split('|')[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {'torch', 'jax', 'tensorflow'}
