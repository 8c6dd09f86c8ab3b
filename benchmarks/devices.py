"""Measures time and memory of a step by the number of devices, with `pmap` and `shard_map`:

    python -m benchmarks.devices --config=configs/digits.py --devices=1,2,4,8

For each number, starts a process with that many simulated CPU devices. The global batch stays the
same. `pmap` and `jit` of `shard_map` run the same per-device function in turns; `ratio` is the
median over the rounds of pmap's time divided by shard_map's. `call us` is the host overhead: the
time until the call of a step returns that does nothing but return a state of as many arrays.

  --devices    numbers of devices (default: the real devices, without simulation)
  --processes  number of processes, connected over TCP, that share the devices (default: 1)
  --output     CSV file to write
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import portpicker

from benchmarks import synthetic
from xmixup_jax.cli.flags import read_command
from xmixup_jax.cli.program import run_and_exit
from xmixup_jax.compute import cost, mapping
from xmixup_jax.compute import step as step_lib
from xmixup_jax.devices import replicate, shard_steps
from xmixup_jax.methods.base import Sizes
from xmixup_jax.processes import is_first

CLASSES = 10
CALLS = 300


def measure(config) -> dict:
    """Measures this process's devices; returns a row of the table."""
    task, state = step_lib.create_task(config, Sizes(CLASSES, CLASSES))
    batch = synthetic.batch(config, CLASSES, 0)
    share = config.batch_size // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    batch = jax.tree.map(lambda x: x[mine], batch)
    inputs = shard_steps([batch])

    maps = {
        name: partial(by, in_axes=mapping.TRAIN_AXES, donate_argnums=(1,))
        for name, by in (('pmap', mapping.by_pmap), ('shard_map', mapping.by_shard_map))
    }

    def timed(step_fn) -> dict[str, list[float]]:
        states = {name: replicate(state) for name in maps}
        steps = {name: mapped(step_fn) for name, mapped in maps.items()}

        def run(name, i):
            states[name], metrics = steps[name]({}, states[name], {}, inputs)
            jax.block_until_ready((states[name], metrics))

        return cost.in_turns({name: partial(run, name) for name in maps})

    times = timed(partial(step_lib.train_steps, task))
    row = {name: float(np.median(each)) for name, each in times.items()}
    row['ratio'] = float(np.median(np.divide(times['pmap'], times['shard_map'])))

    def nothing(constants, state, pool, batches):
        del constants, pool
        return state, {'loss': batches['label'].sum()}

    for name, mapped in maps.items():
        step, current = mapped(nothing), replicate(state)
        seconds = []
        for _ in range(CALLS):
            begun = time.perf_counter()
            current, metrics = step({}, current, {}, inputs)
            seconds.append(time.perf_counter() - begun)
            jax.block_until_ready((current, metrics))
        row[f'{name} call us'] = 1e6 * float(np.median(seconds))
    if jax.process_count() == 1:
        compiled = mapping.map_train_steps(partial(step_lib.train_steps, task)).lower(
            {}, replicate(state), {}, inputs
        )
        memory = compiled.compile().memory_analysis()
        row['temporary MiB a device'] = memory.temp_size_in_bytes / 2**20
    return row


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='devices', add_help=False)
    parser.add_argument('--devices', default='')
    parser.add_argument('--processes', default=1, type=int)
    parser.add_argument('--output', type=Path)
    parser.add_argument('--result', type=Path)  # internal: where a child process writes its row
    args, rest = parser.parse_known_args(argv)
    if not args.devices:
        config, _ = read_command(rest)
        row = measure(config)
        if args.result and is_first():
            args.result.write_text(json.dumps(row))
        elif not args.result:
            synthetic.write_table([{'devices': jax.device_count()} | row], args.output)
        return
    rows = []
    for devices in map(int, args.devices.split(',')):
        each = devices // args.processes
        environment = os.environ | {
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': f'--xla_force_host_platform_device_count={each}',
        }
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / 'row.json'
            command = [sys.executable, '-m', 'benchmarks.devices', *rest[1:], f'--result={result}']
            address = f'--coordinator=localhost:{portpicker.pick_unused_port()}'
            joined = [address, f'--num_processes={args.processes}']
            children = [
                subprocess.Popen(
                    [*command, *joined, f'--process_id={i}'] if args.processes > 1 else command,
                    env=environment,
                )
                for i in range(args.processes)
            ]
            codes = [child.wait() for child in children]
            if any(codes):
                raise SystemExit(f'{devices} devices failed')
            rows.append({'devices': devices} | json.loads(result.read_text()))
    synthetic.write_table(rows, args.output)


if __name__ == '__main__':
    run_and_exit(run, sys.argv)
