"""Records what a run's results depend on besides its configuration: machine, versions, commit."""

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
    """Describes this process, its machine, devices and package versions, as JSON values."""
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
    """Returns the git commit of this package, with '-dirty' if tracked files have changed since.

    Returns:
      None if it was installed neither from a checkout nor from a repository's URL.
    """
    here = Path(__file__).parent
    git = ('git', '-C', str(here))
    try:
        # The package may be installed inside a checkout of something else.
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
    """Returns the commit that pip recorded at installation (PEP 610), or None."""
    try:
        url = importlib.metadata.distribution('xmixup-jax').read_text('direct_url.json')
    except importlib.metadata.PackageNotFoundError:
        return None
    return json.loads(url or '{}').get('vcs_info', {}).get('commit_id')


@first_process
def record(path: Path, first_step: int) -> None:
    """Appends the first process to the list of processes that have worked on the run.

    Args:
      path: path of the list, a JSON file.
      first_step: number of steps done before.
    """
    try:
        earlier = read_json(path) if path.exists() else []
    except UserError as error:
        log.warning('%s: moved to %s', error, set_aside(path, path.parent))
        earlier = []
    write_json(path, [*earlier, {'first_step': first_step, **environment()}])
