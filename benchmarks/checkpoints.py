"""Measures how long a checkpoint blocks the training loop:

    python -m benchmarks.checkpoints --config=configs/tiny_caltech.py --output=checkpoints.csv

Alternates, in one process: a step on synthetic images; a checkpoint as the loop writes it (waiting
until everything is on disk); and plain Orbax writing in the background, timed until it returns to
the loop and until it is done. Shares are relative to the time of config.checkpoint_every steps.

  --classes  classes of the target and of the source (default: 100)
  --rounds   rounds to take medians over, after one warm-up round (default: 20)
  --output   CSV file to write
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks import synthetic
from xmixup_jax.cli.flags import read_command
from xmixup_jax.cli.program import run_and_exit
from xmixup_jax.integrity import network_digest, tree_digest
from xmixup_jax.run.checkpoint import Checkpoints


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='checkpoints', add_help=False)
    parser.add_argument('--classes', default=100, type=int)
    parser.add_argument('--rounds', default=20, type=int)
    parser.add_argument('--output', type=Path)
    args, rest = parser.parse_known_args(argv)
    config, _ = read_command(rest)
    opened = synthetic.starts(config, [config.method], args.classes)
    with opened as (starts, (batch, *_), folder):
        start = starts[config.method]
        checkpoints = Checkpoints(folder / 'run', config.keep_checkpoints)
        plain = ocp.CheckpointManager(
            folder / 'plain', options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )
        state = start.state

        def step(i: int) -> None:
            nonlocal state
            state, metrics = start.task.train_steps(start.constants, state, {}, batch)
            jax.block_until_ready((state, metrics))

        def save(i: int) -> None:
            checkpoints.save(replace(state, step=np.int32(i)), start.meta)

        def digests(i: int) -> None:
            tree_digest((state.params, state.opt_state, state.batch_stats))
            network_digest(state.params, state.batch_stats)

        def plain_begin(i: int) -> None:
            tree = {'params': state.params, 'opt_state': state.opt_state}
            plain.save(i, args=ocp.args.StandardSave(tree | {'batch_stats': state.batch_stats}))

        def plain_end(i: int) -> None:
            plain.wait_until_finished()

        times: dict[str, list[float]] = {}
        for i in range(1 + args.rounds):
            for action in (step, save, digests, plain_begin, plain_end):
                begun = time.perf_counter()
                action(i)
                times.setdefault(action.__name__, []).append(1e3 * (time.perf_counter() - begun))
        size = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
        checkpoints.close()
        plain.close()
    ms = {name: float(np.median(values[1:])) for name, values in times.items()}
    between = config.checkpoint_every * ms['step']
    row = {
        'network': f'{config.model.name} {config.image_size} px',
        'MB': size / 1e6,
        'step ms': ms['step'],
        'checkpoint ms': ms['save'],
        'iqr ms': float(np.subtract(*np.percentile(times['save'][1:], (75, 25)))),
        'of it digests ms': ms['digests'],
        'every': config.checkpoint_every,
        'share': ms['save'] / between,
        'orbax blocks ms': ms['plain_begin'],
        'orbax done ms': ms['plain_begin'] + ms['plain_end'],
        'orbax share': ms['plain_begin'] / between,
    }
    synthetic.write_table([row], args.output)


if __name__ == '__main__':
    run_and_exit(run, sys.argv)
