"""Compiles training steps for a GPU or for TPUs that are not there, and counts their traffic:

    pip install --no-deps libtpu                                # for TPUs
    pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt     # for GPUs, JAX's own version

    JAX_PLATFORMS=cpu python -m benchmarks.ahead --target=h100 --config=configs/aircraft.py \\
        --config.model.name=resnet50 --config.batch_size=128
    JAX_PLATFORMS=cpu python -m benchmarks.ahead --target=v5e:2x4 ...

One row per method: time to compile, memory on each device, the gigabytes that the kernels of one
device read and write in a step, by the shapes of their operands and results: those of convolutions
and of all others; and its messages to other devices: their number and megabytes. On a GPU the
convolutions are cuDNN's, elsewhere they are fused with what surrounds them.

  --target   h100; h100:HxG for H hosts with G GPUs each; or a TPU's type and topology, such as
             v5e:2x4 or v4:8x8x8
  --methods  names of methods, comma-separated, of those that prepare nothing
             (default: finetune,xmixup)
  --classes  classes of the target and of the source (default: 100)
  --output   CSV file to write
"""

import argparse
import collections
import os
import re
import sys
import time
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from benchmarks import synthetic
from xmixup_jax.checks import validate
from xmixup_jax.cli.flags import read_command
from xmixup_jax.cli.program import run_and_exit
from xmixup_jax.compute.cost import drop_unused, memory_mib
from xmixup_jax.compute.mapping import TRAIN_AXES, by_shard_map
from xmixup_jax.compute.step import make_task, train_steps
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods.base import Sizes
from xmixup_jax.methods.find import with_traced

# What XLA needs to know of an H100: NVIDIA's data sheet, and limits of compute capability 9.0.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_address_bits: 64
  device_vendor: "NVIDIA Corporation"
  name: "NVIDIA H100"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
"""


class Traffic(NamedTuple):
    """What one device moves in a step."""

    convolutions: int
    """Bytes that convolutions read and write; those that are kernels of their own."""
    others: int
    """Bytes that all other kernels read and write."""
    messages: int
    """Number of messages to and from other devices."""
    message_bytes: int


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='ahead', add_help=False)
    parser.add_argument('--target', required=True)
    parser.add_argument('--methods', default='finetune,xmixup')
    parser.add_argument('--classes', default=100, type=int)
    parser.add_argument('--output', type=Path)
    args, rest = parser.parse_known_args(argv)
    config, _ = read_command(rest)
    config.precision = 'bfloat16' if config.precision == 'auto' else config.precision
    if config.batch_norm_over != 'all':
        raise ConfigError(
            f'config.batch_norm_over={config.batch_norm_over}: its groups would be those of the '
            'devices of this machine, not of --target; leave it out'
        )
    found = devices(args.target)
    print(
        f'{config.model.name}, {config.image_size} px, batch {config.batch_size}, '
        f'{config.precision}, {len(found)} x {args.target}'
    )
    rows = []
    for name in args.methods.split(','):
        config.method = name
        validate(config, len(found))
        begun = time.perf_counter()
        compiled = compile_step(config, args.classes, found)
        seconds = time.perf_counter() - begun
        moved = traffic(compiled.as_text())
        rows.append(
            {
                'method': name,
                'compile s': seconds,
                'memory MiB': memory_mib(compiled),
                'convolutions GB': moved.convolutions / 1e9,
                'others GB': moved.others / 1e9,
                'messages': moved.messages,
                'messages MB': moved.message_bytes / 1e6,
            }
        )
    synthetic.write_table(rows, args.output)


def devices(target: str) -> list[jax.Device]:
    """The devices of a machine that is not there.

    Raises:
      ConfigError: the package that compiles for it is missing, or there is no such topology.
    """
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # libtpu asks the cloud for its machine
    try:
        if target.startswith('h100'):
            shape = f'1x{target.partition(":")[2] or "1x1"}'  # slices, hosts, GPUs of each
            made = topologies.get_topology_desc(target, 'cuda', topology=shape, target_config=H100)
        else:
            made = topologies.get_topology_desc(target, 'tpu')
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ConfigError(
            f'--target={target}: {error}; install jax-cuda12-plugin and jax-cuda12-pjrt of JAX '
            f'{jax.__version__} (for h100) or libtpu'
        ) from error
    return made.devices


def compile_step(config: ConfigDict, classes: int, to: list[jax.Device]) -> jax.stages.Compiled:
    """Compiles the training step of config.method for these devices; the batch is theirs."""
    task = make_task(config, Sizes(classes, classes))

    def shape(x, axes: tuple[int, ...] = ()):
        return jax.ShapeDtypeStruct((*axes, *np.shape(x)), np.asarray(x).dtype)

    one = config.copy_and_resolve_references()
    one.batch_size //= len(to)
    batch = drop_unused(synthetic.batch(one, classes, 0), config)
    step = by_shard_map(partial(train_steps, task), TRAIN_AXES, (1,), to)
    arguments = (
        jax.tree.map(shape, with_traced({}, config)),
        task.shapes,
        {},
        jax.tree.map(partial(shape, axes=(len(to), 1)), batch),
    )
    backend = 'tpu' if to[0].platform == 'tpu' else 'gpu'
    # What is chosen by the device when the step is traced must suit the target.
    with mock.patch.object(jax, 'default_backend', lambda: backend):
        lowered = step.lower(*arguments)
    return lowered.compile()


# Instructions that move nothing.
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all'}
_MESSAGES = ('all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all')
_INSTRUCTION = re.compile(r'\s*(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)')
_SHAPE = re.compile(r'([a-z]+)(\d*)\w*\[([\d,]*)\]')


def traffic(program: str) -> Traffic:
    """Adds up the operands and results of the kernels in a compiled program's text.

    Of an operand that a kernel only cuts slices from, the slices count.
    """
    bodies = dict(re.findall(r'^(?:ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}', program, re.M | re.S))
    entry = program[program.index('\nENTRY') :]
    sizes: dict[str, int] = {}
    moved: collections.Counter[str] = collections.Counter()
    for line in entry.splitlines()[1:]:
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name, shape, kind, rest = match.groups()
        sizes[name] = size_of(shape)
        if kind in _FREE or kind.endswith('-done'):
            continue
        read = [sizes.get(each, 0) for each in _operands(rest)]
        if called := re.search(r'calls=%([\w.-]+)', rest):
            slices = _slices(bodies[called[1]])
            read = [slices.get(i, size) for i, size in enumerate(read)]
        if kind.removesuffix('-start') in _MESSAGES:
            moved['messages'] += 1
            moved['message_bytes'] += sum(read)
        else:
            key = 'convolutions' if '__cudnn$conv' in line else 'others'
            moved[key] += sizes[name] + sum(read)
    return Traffic(*(moved[field] for field in Traffic._fields))


def _operands(rest: str) -> list[str]:
    return re.findall(r'%([\w.-]+)', rest.split('), ')[0])


def _slices(body: str) -> dict[int, int]:
    """By the number of a fused computation's parameter: the bytes of its slices, if no other
    instruction uses it."""
    numbers: dict[str, int] = {}
    found: dict[int, int] = {}
    others = set()
    for line in body.splitlines():
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name, shape, kind, rest = match.groups()
        if kind == 'parameter':
            numbers[name] = int(rest.split(')')[0])
            continue
        for each in _operands(rest):
            if each in numbers and kind == 'slice':
                found[numbers[each]] = found.get(numbers[each], 0) + size_of(shape)
            elif each in numbers:
                others.add(numbers[each])
    return {number: size for number, size in found.items() if number not in others}


def size_of(shape: str) -> int:
    """The bytes of a shape or tuple of shapes in a program's text.

    >>> size_of('(f32[2,3]{1,0}, bf16[4]{0}, pred[5]{0}, s32[])')
    41
    """
    total = 0
    for kind, bits, sides in _SHAPE.findall(shape):
        if kind in ('f', 'bf', 's', 'u', 'pred'):
            bits = int(bits) if bits else 8
            total += -(-bits // 8) * prod(map(int, filter(None, sides.split(','))))
    return total


if __name__ == '__main__':
    run_and_exit(run, sys.argv)
