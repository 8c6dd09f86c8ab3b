"""Profiles what the device does during a training step:

    python -m benchmarks.kernels --config=configs/tiny_caltech.py --config.model.name=resnet18 \\
        --config.model.width=64 --output=kernels.csv

Traces some steps of config.method with JAX's profiler, and adds up the kernels by the operation
that they come from. Each row has: forward or backward pass, operation (for a fused kernel, the last
one), kernels per step, ms per step, and share of the step's time. The last row is the time in which
no kernel runs; it is meaningless on CPUs, where several kernels run at once.

On a GPU, set XLA_FLAGS=--xla_gpu_enable_command_buffer= so that the trace shows each kernel
separately.

  --classes  classes of the target and of the source (default: 100)
  --steps    steps to trace (default: 10)
  --output   CSV file to write
"""

import argparse
import collections
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from benchmarks import synthetic
from xmixup_jax.cli.flags import read_command
from xmixup_jax.cli.program import run_and_exit, use_huge_pages
from xmixup_jax.compute.cost import BATCHES, drop_unused


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='kernels', add_help=False)
    parser.add_argument('--classes', default=100, type=int)
    parser.add_argument('--steps', default=10, type=int)
    parser.add_argument('--output', type=Path)
    args, rest = parser.parse_known_args(argv)
    config, _ = read_command(rest)
    opened = synthetic.starts(config, [config.method], args.classes)
    with opened as (starts, batches, folder):
        start = starts[config.method]
        batches = [drop_unused(each, start.task.config) for each in batches]
        lowered = start.task.train_steps.lower(start.constants, start.state, {}, batches[0])
        compiled = lowered.compile()
        state, _ = compiled(start.constants, start.state, {}, batches[0])
        jax.block_until_ready(state)
        with jax.profiler.trace(folder / 'trace'):
            begun = time.perf_counter()
            for i in range(args.steps):
                state, _ = compiled(start.constants, state, {}, batches[i % BATCHES])
            jax.block_until_ready(state)
            step_ms = 1e3 * (time.perf_counter() - begun) / args.steps
        trace = next((folder / 'trace').rglob('*.xplane.pb'))
        profile = jax.profiler.ProfileData.from_file(str(trace))
        kernels = list(kernels_of(profile))
    made_of = origins(compiled.as_text())
    times = collections.defaultdict(list)
    for name, ms in kernels:
        times[made_of.get(name, ('', re.sub(r'[.\d]+$', '', name)))].append(ms)
    rows = [
        {
            'pass': direction,
            'operation': operation,
            'kernels': len(ms) / args.steps,
            'ms': sum(ms) / args.steps,
            'share': sum(ms) / args.steps / step_ms,
        }
        for (direction, operation), ms in times.items()
    ]
    rows.sort(key=lambda row: -row['ms'])
    idle = step_ms - sum(row['ms'] for row in rows)
    rows.append(
        {'pass': '', 'operation': '(none)', 'kernels': 0, 'ms': idle, 'share': idle / step_ms}
    )
    print(f'{config.method}, {jax.devices()[0].device_kind}: {step_ms:.2f} ms per step')
    synthetic.write_table(rows, args.output)


def kernels_of(trace: jax.profiler.ProfileData) -> Iterator[tuple[str, float]]:
    """Yields (instruction of the compiled program or name of the kernel, ms) for every kernel that
    ran on the first device."""
    planes = {plane.name: plane for plane in trace.planes}
    device = planes.get('/device:GPU:0')
    for line in (device or planes['/host:CPU']).lines:
        if device and not line.name.startswith('Stream'):
            continue  # other lines add up those of the streams
        for event in line.events:
            instruction = dict(event.stats).get('hlo_op')
            if device or instruction:
                yield instruction or event.name, event.duration_ns / 1e6


def origins(program: str) -> dict[str, tuple[str, str]]:
    """Parses a compiled program's text: instruction to ('forward' or 'backward', JAX operation)."""
    pattern = r'^\s*(?:ROOT )?%?(\S+) = .*metadata=\{[^}]*op_name="([^"]*)"'
    return {
        name: ('backward' if 'transpose(' in path else 'forward', path.rpartition('/')[2])
        for name, path in re.findall(pattern, program, re.MULTILINE)
    }


if __name__ == '__main__':
    use_huge_pages()
    run_and_exit(run, sys.argv)
