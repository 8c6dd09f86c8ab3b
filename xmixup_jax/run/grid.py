"""Several runs in sequence: comparisons, sweeps and studies."""

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
    """One run of a grid."""

    config: ConfigDict
    workdir: Path
    labels: dict[str, Any]
    """The values that distinguish the run, by column."""


def row_of(run: Run, opened: Opened) -> Row:
    """Executes a run, unless it is finished, and returns its row.

    Args:
      run: the run.
      opened: splits opened by earlier runs, with their decoded images; new ones are added.

    Returns:
      the labels with the result, or with the 'error' of a run that diverged.
    """
    try:
        result = train_and_evaluate(run.config, run.workdir, open_data(run.config, opened))
    except Diverged as error:
        log.warning('%s: %s', run.workdir, error)
        return run.labels | {'error': str(error)}
    return run.labels | result


def rows_of(runs: list[Run], title: str) -> Iterator[Row]:
    """Yields `row_of` for each run, with a progress bar of this title."""
    opened: Opened = {}
    for run in tqdm(runs, desc=title, unit='run', disable=None):
        yield row_of(run, opened)
