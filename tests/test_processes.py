"""Two real processes with one device each make the step that one process makes alone."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import portpicker

from configs import digits
from xmixup_jax import step as step_lib
from xmixup_jax.methods.base import Sizes


def make_batch():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 16, 22, 22, 3), np.uint8)
    labels = rng.integers(0, 10, (2, 16)).astype(np.int32)
    return {
        'image': images[0],
        'source_image': images[1],
        'label': labels[0],
        'source_label': labels[1],
        'seed': rng.integers(0, 2**32, 16, np.uint32),
    }


def make_task():
    config = digits.get_config()
    config.model.width = 4
    return step_lib.create_task(config, Sizes(10, 10))


def take_step(step, state, batch):
    state, metrics = jax.device_get(step({}, state, batch))
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves((state.params, state.batch_stats))]
    return np.concatenate([*leaves, [metrics['loss'], metrics['top1']]])


def worker(port: str, process: int, folder: str) -> None:
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(f'localhost:{port}', 2, process)
    assert (jax.process_count(), jax.device_count()) == (2, 2)
    task, state = make_task()
    share = jax.tree.map(lambda x: x[process::2], make_batch())  # as `pairing` parts a batch
    step = step_lib.map_train_steps(partial(step_lib.train_steps, task))
    result = take_step(step, step_lib.replicate(state), step_lib.shard(share))
    np.save(Path(folder) / f'{process}.npy', result)


def test_two_processes_make_the_step_of_one(tmp_path):
    port = str(portpicker.pick_unused_port())
    environment = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}
    processes = [
        subprocess.Popen(
            [sys.executable, '-m', 'tests.test_processes', port, str(i), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr
    task, state = make_task()
    step = jax.pmap(
        partial(step_lib.train_step, task),
        axis_name='batch',
        in_axes=(None, None, 0),
        out_axes=None,
        devices=jax.devices()[:1],
    )
    batch = jax.tree.map(lambda x: x[None], make_batch())
    alone = take_step(step, jax.tree.map(np.asarray, state), batch)
    for i in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f'{i}.npy'), alone, rtol=1e-4, atol=1e-5)


if __name__ == '__main__':
    worker(sys.argv[1], int(sys.argv[2]), sys.argv[3])
