"""Several runs, one after the other: comparisons, sweeps and studies."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from tqdm import tqdm

from xmixup_jax.data.selection import Opened
from xmixup_jax.errors import Diverged
from xmixup_jax.run.inputs import open_data
from xmixup_jax.run.train import train_and_evaluate

log = logging.getLogger('xmixup_jax')

Row = dict[str, Any]
"""The labels of a run and the content of its result.json, or its 'error'."""


class Run(NamedTuple):
    """One cell of a grid."""

    config: ConfigDict
    workdir: Path
    labels: dict[str, Any]
    """What tells the run apart, by column."""


def row_of(run: Run, opened: Opened) -> Row:
    """Makes a run, unless it is finished.

    Args:
      run: to make.
      opened: data sets that earlier runs have opened, with their decoded images; extended.
    """
    try:
        result = train_and_evaluate(run.config, run.workdir, open_data(run.config, opened))
    except Diverged as error:
        log.warning('%s: %s', run.workdir, error)
        return run.labels | {'error': str(error)}
    return run.labels | result


def rows_of(runs: list[Run], title: str) -> Iterator[Row]:
    """Yields `row_of` each run, with a progress bar."""
    opened: Opened = {}
    for run in tqdm(runs, desc=title, unit='run', disable=None):
        yield row_of(run, opened)
