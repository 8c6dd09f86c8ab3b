"""The folder of a run: one writer at a time, one experiment."""

import contextlib
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xmixup_jax import config as config_lib
from xmixup_jax.errors import ConfigError
from xmixup_jax.files import held, write_json
from xmixup_jax.processes import is_first, together


@contextlib.contextmanager
def locked(folder: Path, key: str = '--workdir', wait: bool = False):
    """Makes the folder and holds it for this run, by its first process; see `files.held`."""
    with contextlib.ExitStack() as stack:
        hold = held(folder, key, wait)
        together(lambda: stack.enter_context(hold) if is_first() else None)
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
    if is_first():
        write_json(path, config.to_dict())
    result = workdir / 'result.json'
    return json.loads(result.read_text()) if result.exists() else None
