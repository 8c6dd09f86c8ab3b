"""What a run's numbers depend on beside its configuration: machine, versions, source code."""

import datetime
import importlib.metadata
import json
import logging
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from xmixup_jax.errors import UserError
from xmixup_jax.files import read_json, set_aside, write_json
from xmixup_jax.processes import first_process

log = logging.getLogger('xmixup_jax')

_PACKAGES = (
    'jax',
    'jaxlib',
    'flax',
    'optax',
    'orbax-checkpoint',
    'grain',
    'tensorflow-datasets',
    'numpy',
    'opencv-python-headless',
    'simplejpeg',
)
_QUIET: dict[str, Any] = {'capture_output': True, 'text': True, 'timeout': 10}


def environment() -> dict[str, Any]:
    """Where and with what this process computes; JSON values."""
    flags = {key: value for key, value in os.environ.items() if key.startswith(('JAX_', 'XLA_'))}
    return {
        'started': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'command': sys.argv,
        'commit': commit(),
        'versions': {name: importlib.metadata.version(name) for name in _PACKAGES},
        'python': platform.python_version(),
        'platform': platform.platform(),
        'host': socket.gethostname(),
        'pid': os.getpid(),
        'processes': jax.process_count(),
        'devices': jax.device_count(),
        'device_kind': jax.devices()[0].device_kind,
        'variables': flags,
    }


def commit() -> str | None:
    """The git commit of this program, with '-dirty' if tracked files have changed since.

    Returns:
      None where it was installed from neither a checkout nor a repository's address.
    """
    here = Path(__file__).parent
    git = ('git', '-C', str(here))
    try:
        # A checkout of something else may lie around the folder it was installed into.
        subprocess.run((*git, 'ls-files', '--error-unmatch', __file__), check=True, **_QUIET)
        described = subprocess.run(
            (*git, 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'),
            check=True,
            **_QUIET,
        )
        return described.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return _installed_commit()


def _installed_commit() -> str | None:
    """What pip wrote of where it took the program from (PEP 610)."""
    try:
        url = importlib.metadata.distribution('xmixup-jax').read_text('direct_url.json')
    except importlib.metadata.PackageNotFoundError:
        return None
    return json.loads(url or '{}').get('vcs_info', {}).get('commit_id')


@first_process
def record(path: Path, first_step: int) -> None:
    """Adds the first process to the list of those that have worked on the run.

    Args:
      path: of the list, a JSON file.
      first_step: number of updates that were done before.
    """
    try:
        earlier = read_json(path) if path.exists() else []
    except UserError as error:
        log.warning('%s: moved to %s', error, set_aside(path, path.parent))
        earlier = []
    write_json(path, [*earlier, {'first_step': first_step, **environment()}])
