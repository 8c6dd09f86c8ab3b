"""The folder of a run: one writer at a time, one experiment."""

import contextlib
import fcntl
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xmixup_jax import config as config_lib
from xmixup_jax.errors import ConfigError, UserError
from xmixup_jax.files import write_json


@contextlib.contextmanager
def locked(workdir: Path, key: str = '--workdir', wait: bool = False):
    """Makes the folder and holds it, so that no second run writes into it; `key` can change it."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / '.lock').open('a+')
    except OSError as error:
        raise UserError(
            f'cannot write into {workdir}: {error.strerror}; choose another folder with {key}'
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(
                f'another run is writing into {workdir}: wait for it, or choose another --workdir'
            ) from error
        yield


def claim(config: ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """Stores the configuration, or compares it with the one that the folder was begun with.

    Returns:
      the result, if the run in the folder is finished.
    """
    path = workdir / 'config.json'
    ours = json.loads(json.dumps(config_lib.experiment_values(config)))
    if path.exists():
        stored = ConfigDict(json.loads(path.read_text()))
        theirs = config_lib.experiment_values(stored)
        changed = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if changed:
            key = changed[0]
            raise ConfigError(
                f'{workdir} holds a run with config.{key}={theirs.get(key)!r}, not '
                f'{ours.get(key)!r} ({len(changed)} keys differ): choose another --workdir'
            )
    write_json(path, config.to_dict())
    result = workdir / 'result.json'
    return json.loads(result.read_text()) if result.exists() else None
