"""Weights & Biases, for those who ask for it with config.wandb, beside the logs on disk."""

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
    """Yields a run of wandb, or None where config.wandb names no project.

    A run that is continued is one run there, too: its identifier is kept in the work directory.

    Raises:
      UserError: wandb is not installed, or it refuses.
    """
    if not config.wandb or not is_first():
        yield None
        return
    try:
        import wandb
    except ImportError as error:
        raise DataError(
            f'config.wandb={config.wandb!r} needs Weights & Biases: run  pip install wandb , or '
            "leave it ''"
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
    with run:  # ends it, whatever happens
        yield run
