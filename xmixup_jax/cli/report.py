"""Writes report.html of a finished run, for example of one trained with --config.report=False.

    xmixup report --workdir=runs/mine

  --workdir=DIR   the folder of a finished run (required)

Needs the run's last checkpoint, and its images in their original place: the test images go through
the network once more. Nothing is trained, and result.json does not change.
"""

import contextlib
from pathlib import Path

import jax
from ml_collections import ConfigDict

from xmixup_jax.checks import validate
from xmixup_jax.cli.program import Parser, setup
from xmixup_jax.compute.evaluation import evaluate
from xmixup_jax.compute.reestimation import with_clean_statistics
from xmixup_jax.config import own_run
from xmixup_jax.errors import DataError
from xmixup_jax.files import CONFIG, REPORT, RESULT, SUMS, read_json
from xmixup_jax.report.run import write_report
from xmixup_jax.run.best import Best
from xmixup_jax.run.checkpoint import Checkpoints
from xmixup_jax.run.data_identity import same_data
from xmixup_jax.run.inputs import check_inputs, first_inputs, open_data
from xmixup_jax.run.start import Start, resume
from xmixup_jax.run.workdir import damaged_files, locked, seal
from xmixup_jax.text import one_line


def report(workdir: Path) -> Path:
    """Writes the report of a finished run, replacing an existing one.

    Args:
      workdir: the folder of the run.

    Returns:
      path of the report.

    Raises:
      UserError: the run is not finished or is corrupted, its last checkpoint is missing, or its
        data have changed or cannot be opened.
    """
    check_finished(workdir)
    config = own_run(workdir)
    validate(config, jax.device_count())
    check_inputs(config)
    with (
        locked(workdir),
        contextlib.closing(Checkpoints(workdir, config.keep_checkpoints)) as checkpoints,
    ):
        check_whole(workdir)
        data = same_data(config, checkpoints, open_data(config), finished=True)
        assert data is not None  # it was given
        result = read_json(workdir / RESULT)
        start = _end_of_run(config, checkpoints, result['steps'])
        match = start.meta.match
        state = with_clean_statistics(start.task, config, start.state, data.target)
        if data.validation is not None:
            state = Best(workdir, config, data.target.class_names).network(state)
        tested = None if data.test is None else evaluate(start.task, config, state, data.test)
        inputs = first_inputs(start.task, start.constants, config, data, match)
        write_report(workdir, config, result, data, match, inputs, tested)
        seal(workdir)
    return workdir / REPORT


def check_finished(workdir: Path) -> None:
    """Raises DataError if the folder contains no finished run."""
    missing = [name for name in (CONFIG, RESULT, SUMS) if not (workdir / name).is_file()]
    if missing:
        there = workdir.is_dir()
        what = f'contains no finished run ({missing[0]} is missing)' if there else 'is no folder'
        raise DataError(
            f'{one_line(workdir)} {what}: name the folder of a finished run, or run its training '
            'command again to resume it'
        )


def check_whole(workdir: Path) -> None:
    """Raises DataError if a file of the finished run has changed; its report may have."""
    damaged = [name for name in damaged_files(workdir) if name != REPORT]
    if damaged:
        raise DataError(
            f'{one_line(workdir / damaged[0])} is not as the run wrote it: run its training '
            'command again, which restores what it can'
        )


def _end_of_run(config: ConfigDict, checkpoints: Checkpoints, steps: int) -> Start:
    start = resume(config, checkpoints)
    if start is None or int(start.state.step) != steps:
        raise DataError(
            f'{one_line(checkpoints.workdir)} has no checkpoint of its last step, {steps}, which '
            'the report needs: restore its folder checkpoints/, or train in another --workdir with '
            '--config.report=True'
        )
    return start


def run(argv: list[str]) -> None:
    """Parses the flags and writes the report."""
    parser = Parser('report')
    parser.add_argument('--workdir', required=True, type=Path)
    args = parser.parse_args(argv[1:])
    check_finished(args.workdir)
    setup(read_json(args.workdir / CONFIG)['cache_dir'])
    print(f'->  {one_line(report(args.workdir))}')
