"""Optional logging to Weights & Biases (config.wandb), in addition to the logs on disk."""

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xmixup_jax.errors import DataError, UserError, first_line
from xmixup_jax.files import atomic_write
from xmixup_jax.processes import is_first

WANDB_ID = 'wandb_id'


@contextlib.contextmanager
def tracked(config: ConfigDict, workdir: Path) -> Iterator[Any]:
    """Yields a wandb run, or None if config.wandb names no project.

    A resumed run continues the same wandb run, whose id is stored in the run folder.

    Raises:
      UserError: wandb is not installed, or it cannot start the run.
    """
    if not config.wandb or not is_first():
        yield None
        return
    try:
        import wandb
    except ImportError as error:
        raise DataError(
            f'config.wandb={config.wandb!r} needs Weights & Biases: run  pip install wandb , or '
            'leave out --config.wandb'
        ) from error
    path = workdir / WANDB_ID
    if not path.exists():
        with atomic_write(path) as partial:
            partial.write_text(secrets.token_hex(8))
    try:
        run = wandb.init(
            project=config.wandb,
            id=path.read_text(),
            resume='allow',
            name=f'{workdir.parent.name}/{workdir.name}',
            dir=workdir,
            config=config.to_dict(),
            settings=wandb.Settings(silent=True),
        )
    except wandb.Error as error:
        raise UserError(
            f'config.wandb={config.wandb!r}: {first_line(error)}; run  wandb login , or set '
            'WANDB_MODE=offline'
        ) from error
    with run:  # ends it in any case
        yield run
