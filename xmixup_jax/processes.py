"""Runs in several processes: joins them, watches them, and shares values and errors."""

import argparse
import atexit
import contextlib
import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial, wraps
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from xmixup_jax.errors import ConfigError, ProcessLost, UserError, first_line

log = logging.getLogger('xmixup_jax')

P = ParamSpec('P')
T = TypeVar('T')

# A process that sends no heartbeat for this long counts as lost.
_HEARTBEAT_SECONDS = 30
_CONNECT_SECONDS = 120


def connect(argv: list[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """Joins the other processes of the run, if there are any. Call it before using JAX.

    The flags --coordinator=HOST:PORT, --num_processes=N and --process_id=I describe the processes.
    JAX finds them by itself if SLURM, Open MPI or the environment of a TPU slice say that there are
    several, or with --num_processes=auto.

    Args:
      argv: a command line.
      environ: the environment variables.

    Returns:
      the command line without these flags.

    Raises:
      ConfigError: some of the flags are missing or impossible.
      UserError: the other processes cannot be reached.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument('--coordinator')
    parser.add_argument('--num_processes')
    parser.add_argument('--process_id', type=int)
    try:
        flags, rest = parser.parse_known_args(argv)
        count = None if flags.num_processes in (None, 'auto') else int(flags.num_processes)
    except (argparse.ArgumentError, ValueError) as error:
        raise ConfigError(f'--num_processes and --process_id must be numbers: {error}') from error
    by_hand = (flags.coordinator, count, flags.process_id)
    if flags.num_processes != 'auto':
        if by_hand == (None, None, None):
            if not in_several_processes(environ):
                return rest
        elif None in by_hand:
            raise ConfigError(
                'give all of --coordinator=HOST:PORT, --num_processes=N and --process_id=I, or '
                '--num_processes=auto alone'
            )
        elif not 0 <= flags.process_id < count:
            raise ConfigError(
                f'--process_id={flags.process_id}: must be at least 0 and less than '
                f'--num_processes={count}'
            )
    # The service would catch SIGTERM, on which the training loop saves a checkpoint.
    jax.config.update('jax_enable_preemption_service', False)
    try:
        jax.distributed.initialize(
            *by_hand,
            initialization_timeout=_CONNECT_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f'the processes of the run could not connect ({first_line(error)}): start all of them, '
            'with the same --coordinator, which all can reach'
        ) from error
    if jax.process_count() > 1:
        _watch((flags.coordinator or socket.gethostname()).rsplit(':', 1)[0])
    return rest


def in_several_processes(environ: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX supports has started more than one process."""
    if 'SLURM_STEP_NODELIST' in environ:  # set by srun, but not in a batch script
        return int(environ.get('SLURM_STEP_NUM_TASKS', environ.get('SLURM_NTASKS', 1))) > 1
    if 'OMPI_COMM_WORLD_SIZE' in environ:
        return int(environ['OMPI_COMM_WORLD_SIZE']) > 1
    return ',' in environ.get('TPU_WORKER_HOSTNAMES', '')


def _watch(host: str) -> None:
    """Watches the other processes, and exits with one line as soon as one of them has crashed.

    Each process has a connection to the first one, which breaks when either ends. Without it, the
    others would hang in a collective until JAX misses heartbeats and aborts them from C++, with a
    stack trace and without exit code 75. That still happens if a whole machine is lost.

    Args:
      host: name of the first process's machine; used in the first process.
    """
    address = b''
    if is_first():
        key = secrets.token_bytes(16)
        listener = Listener(('', 0), backlog=jax.process_count(), authkey=key)
        address = f'{host} {listener.address[1]} {key.hex()}'.encode()
    sent = np.zeros(512, np.uint8)
    sent[: len(address)] = np.frombuffer(address, np.uint8)
    machine, port, key = bytes(multihost_utils.broadcast_one_to_all(sent)).rstrip(b'\0').split()
    if is_first():
        watch: Callable[[], None] = partial(_watch_others, listener)
    else:
        try:
            first = Client((machine.decode(), int(port)), authkey=bytes.fromhex(key.decode()))
        except OSError as error:  # JAX's own heartbeats remain
            log.warning(
                'no connection to %s (%s): lost processes will be noticed late',
                machine.decode(),
                error,
            )
            return
        first.send_bytes(str(jax.process_index()).encode())
        _connections[0] = first
        watch = _watch_first
    atexit.register(leave)
    threading.Thread(target=watch, daemon=True).start()


_connections: dict[int, Connection] = {}
_LEAVING = b'leaving'


def leave() -> None:
    """Tells the other processes that this one exits normally."""
    for connection in _connections.values():
        with contextlib.suppress(OSError):
            connection.send_bytes(_LEAVING)


def _watch_others(listener: Listener) -> None:
    while len(_connections) < jax.process_count() - 1:
        # Other programs that connect to the port do not have the key.
        with contextlib.suppress(AuthenticationError, EOFError, OSError):
            connection = listener.accept()
            _connections[int(connection.recv_bytes())] = connection
    staying = dict(_connections)
    while staying:
        wait(staying.values())
        for index, connection in list(staying.items()):
            if connection.poll():
                message = _receive(connection)
                if message != _LEAVING:
                    _abort(index)
                del staying[index]


def _watch_first() -> None:
    if _receive(_connections[0]) != _LEAVING:
        _abort(0)


def _receive(connection: Connection) -> bytes | None:
    with contextlib.suppress(EOFError, OSError):
        return connection.recv_bytes()
    return None


def _abort(index: int) -> None:
    message = (
        f'process {index} of the run has died: its last lines say why; start all processes again, '
        'and the run resumes from the newest checkpoint'
    )
    print(f'xmixup: {message}', file=sys.stderr, flush=True)
    os._exit(ProcessLost.exit_code)


def is_first() -> bool:
    """Whether this is the first process of the run."""
    return jax.process_index() == 0


def all_gather(value: np.ndarray) -> np.ndarray:
    """Gathers an array from all processes: [...] to [processes, ...]."""
    if jax.process_count() == 1:
        return value[None]
    return multihost_utils.process_allgather(value)


def broadcast(value: bool) -> bool:
    """Broadcasts the first process's value to all processes."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def every_process(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that all processes call, so that a UserError in one stops all of them.

    The process that failed raises its own error, the others a UserError that names that process.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if jax.process_count() == 1:
            return function(*args, **kwargs)
        error = None
        try:
            result = function(*args, **kwargs)
        except UserError as raised:
            error = raised
        failed = all_gather(np.array(error is not None))
        if error is not None:
            raise error
        if failed.any():
            raise UserError(
                f'process {np.argmax(failed)} stopped the run: the last line of its output says why'
            )
        return result

    return wrapper


def first_process(function: Callable[P, T]) -> Callable[P, T | None]:
    """Decorates a function that all processes call, but only the first one runs.

    The others wait for it and get None. A UserError stops all of them.
    """

    @every_process
    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T | None:
        return function(*args, **kwargs) if is_first() else None

    return wrapper
