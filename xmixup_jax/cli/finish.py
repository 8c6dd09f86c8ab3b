"""Tests a run that was stopped early, and writes its weights and result.

    xmixup finish --workdir=runs/mine

  --workdir=DIR   the folder of a run that was stopped (required)

Uses the newest checkpoint or, if the run has --config.target.validation_share, the best network so
far. Afterwards the folder is that of a finished run, ready for predict, evaluate and export;
result.json says how many of the steps were done. To resume training instead, run the training
command again.

"""

from pathlib import Path

import jax

from xmixup_jax.checks import validate
from xmixup_jax.cli.program import Parser, setup
from xmixup_jax.cli.train import print_result
from xmixup_jax.config import own_run
from xmixup_jax.errors import DataError
from xmixup_jax.files import CONFIG
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.text import one_line


def run(argv: list[str]) -> None:
    """Parses the flags, tests the network, and prints the result."""
    parser = Parser('finish')
    parser.add_argument('--workdir', required=True, type=Path)
    workdir = parser.parse_args(argv[1:]).workdir
    if not (workdir / CONFIG).is_file():
        raise DataError(
            f'{one_line(workdir)} holds no run ({CONFIG} is missing): name the folder of a run '
            'that was stopped'
        )
    config = own_run(workdir)
    validate(config, jax.device_count())
    setup(config.cache_dir)
    print_result(train_and_evaluate(config, workdir, finish=True), workdir)
