"""Reopens finished runs to measure the cost of their training steps."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xmixup_jax.compute.cost import BATCHES, StepCost, measure_steps
from xmixup_jax.devices import shard_steps
from xmixup_jax.errors import DataError
from xmixup_jax.files import RESULT
from xmixup_jax.methods.find import method_of
from xmixup_jax.run.checkpoint import Checkpoints
from xmixup_jax.run.inputs import open_data, open_input
from xmixup_jax.run.start import Start, resume

PyTree = Any


def measure(configs: dict[str, ConfigDict], workdirs: dict[str, Path]) -> dict[str, StepCost]:
    """Measures the cost of a training step of each method, all on the same batches.

    Args:
      configs: configuration of a finished run, by method.
      workdirs: folders of the same runs; the steps use their state and constants.

    Returns:
      the costs, by method.
    """
    starts = {name: _open(config, workdirs[name]) for name, config in configs.items()}
    return measure_steps(starts, _batches(configs, starts))


def _open(config: ConfigDict, workdir: Path) -> Start:
    checkpoints = Checkpoints(workdir, config.keep_checkpoints)
    try:
        start = resume(config, checkpoints)
        if start is None:
            raise DataError(
                f'{workdir} has no checkpoint from which to measure a step: remove its {RESULT}, '
                'and run the same command again'
            )
        return start
    finally:
        checkpoints.close()


def _batches(configs: dict[str, ConfigDict], starts: dict[str, Start]) -> list[PyTree]:
    """Loads some batches onto the devices, with pairs if any of the methods uses pairs."""
    pairing = (name for name, config in configs.items() if method_of(config).pairs)
    name = next(pairing, next(iter(configs)))
    config = configs[name]
    config = config.copy_and_resolve_references()
    config.data.cache = 'none'
    batches, _, _ = open_input(config, open_data(config), starts[name].meta.match)
    iterator = iter(batches)
    return [shard_steps([next(iterator)]) for _ in range(BATCHES)]
