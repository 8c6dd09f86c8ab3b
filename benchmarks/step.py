"""Measures the cost of a training step of every method, on synthetic images:

    python -m benchmarks.step --config=configs/tiny_caltech.py --config.model.name=resnet18 \\
        --config.model.width=64 --output=step.csv

One row per method: compile time, time per step (median and interquartile range, methods in turns),
images/s, step time relative to fine-tuning, memory, operations and bytes of the step, and `share of
limit`. The limit is the time that the operations would take at the speed of a matrix product, or
the bytes at the speed of a copy, whichever is longer; the share is the limit divided by the step's
time. Both speeds are measured first, in the same precision. (On a GPU, the bytes of the
convolutions are missing, as cuDNN runs them, so the share is a lower bound.)

  --methods  names of methods, comma-separated, or all (default)
  --classes  classes of the target and of the source (default: 100)
  --output   CSV file to write
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks import synthetic
from xmixup_jax.cli.flags import read_command
from xmixup_jax.cli.program import run_and_exit, use_huge_pages
from xmixup_jax.compute import cost
from xmixup_jax.compute.step import train_steps
from xmixup_jax.devices import chosen_precision
from xmixup_jax.methods import METHODS
from xmixup_jax.run.start import Start

PyTree = Any


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='step', add_help=False)
    parser.add_argument('--methods', default='all')
    parser.add_argument('--classes', default=100, type=int)
    parser.add_argument('--output', type=Path)
    args, rest = parser.parse_known_args(argv)
    config, _ = read_command(rest)
    config.precision = chosen_precision(config.precision)
    names = list(METHODS) if args.methods == 'all' else args.methods.split(',')
    gflops, gbytes = synthetic.peaks(config.precision)
    devices = jax.device_count()
    print(
        f'{config.model.name}, {config.image_size} px, batch {config.batch_size}, '
        f'{config.precision}, {devices} x {jax.devices()[0].device_kind}: matrix products '
        f'{gflops:.0f} GFLOP/s, copies {gbytes:.1f} GB/s'
    )
    with synthetic.starts(config, names, args.classes) as (starts, batches, _):
        costs = cost.measure_steps(starts, batches)
        gflop = {name: step_gflop(start, batches[0]) for name, start in starts.items()}
    base = costs.get('finetune', next(iter(costs.values())))
    rows = []
    for name, c in costs.items():
        limit_ms = {'operations': 1e3 * gflop[name] / gflops, 'bytes': 1e3 * c.gbytes / gbytes}
        bound = max(limit_ms, key=limit_ms.get)
        rows.append(
            {
                'method': name,
                'compile s': c.compile_seconds,
                'step ms': float(c.step_ms),
                'iqr ms': float(c.step_ms_spread),
                'images/s': 1e3 * config.batch_size / float(c.step_ms),
                'relative': float(c.step_ms / base.step_ms),
                'memory MiB': c.memory_mb,
                'GFLOP': gflop[name],
                'GFLOP/s': 1e3 * gflop[name] / float(c.step_ms),
                'GB': c.gbytes,
                'bound by': bound,
                'share of limit': float(limit_ms[bound] / c.step_ms),
            }
        )
    synthetic.write_table(rows, args.output)


def step_gflop(start: Start, batches: PyTree) -> float:
    """Counts a step's operations on one device, in 10**9; `batches` as in `cost.measure_steps`."""
    step = jax.vmap(partial(train_steps, start.task), (None, None, None, 0), axis_name='batch')
    inputs = jax.tree.map(lambda x: x[:1], cost.drop_unused(batches, start.task.config))
    return cost.gflop(step, start.constants, start.state, {}, inputs)


if __name__ == '__main__':
    use_huge_pages()
    run_and_exit(run, sys.argv)
