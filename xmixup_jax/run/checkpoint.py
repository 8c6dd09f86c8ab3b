"""Checkpoints with orbax: the state, the iterator, and what else a resumed run needs."""

import errno
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp

from xmixup_jax.compute.state import TrainState
from xmixup_jax.devices import everywhere, global_arrays, local_arrays
from xmixup_jax.errors import UserError, first_line
from xmixup_jax.files import set_aside, sync_tree
from xmixup_jax.integrity import arrays_digest, by_name, json_array, network_digest, tree_digest
from xmixup_jax.matching import ClassMatch
from xmixup_jax.methods.base import Sizes
from xmixup_jax.processes import every_process, first_process, is_first
from xmixup_jax.run.memory import give_back_memory
from xmixup_jax.trees import int_keys, read_tree, write_tree

PyTree = Any

log = logging.getLogger('xmixup_jax')


# Errors of the system that say nothing about the files.
_PASSING = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)


class NotRestored(UserError):
    """The checkpoint cannot be taken, but it is not damaged, and stays where it is."""


class Meta(NamedTuple):
    """What a checkpoint holds beside the state."""

    config: dict[str, Any]
    """Of the experiment, as it was when the checkpoint was written."""
    iterator: dict[str, Any] | None
    """State of the training iterator, for `set_state`; None before the first step."""
    match: ClassMatch | None
    sizes: Sizes
    """Numbers of classes, which shape the head."""
    seconds: float
    """Time of preparation and training so far."""
    rows: list[dict[str, float]]
    """Those of metrics.csv."""
    constants: str
    """Digest of what `save_constants` wrote."""
    data: dict[str, Any] | None = None
    """`Data.summary`; None in checkpoints of earlier versions."""

    def to_json(self) -> dict[str, Any]:
        match = self.match and {key: value.tolist() for key, value in self.match._asdict().items()}
        return self._asdict() | {'match': match, 'sizes': self.sizes._asdict()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> 'Meta':
        match = values['match'] and ClassMatch(
            np.array(values['match']['classes'], np.int32),
            np.array(values['match']['similarity'], np.float32),
        )
        return cls(**values | {'match': match, 'sizes': Sizes(**values['sizes'])})


class Checkpoints:
    """The checkpoints of one run: each appears whole or not at all, with digests of its content.

    `save` returns when the checkpoint is on disk, so that a run that is killed at any moment loses
    no more than the steps since its last call.
    """

    def __init__(self, workdir: Path, keep: int):
        self.workdir = workdir.absolute()
        self._keep = keep
        self._folder = self.workdir / 'checkpoints'
        self._constants = self.workdir / 'constants'
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False),
            item_handlers={
                'state': ocp.StandardCheckpointHandler(),
                'meta': ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints at hand, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, state: TrainState, meta: Meta) -> None:
        """Writes a checkpoint, and removes the oldest beyond config.keep_checkpoints.

        Raises:
          UserError: it cannot be written; those from before are still there.
        """
        step = int(state.step)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_as_dict(global_arrays(state))),
                    meta=ocp.args.JsonSave(_sealed(meta, state)),
                ),
                force=True,
            )
            if is_first():
                sync_tree(self._folder / str(step))
            # Only now: what is on disk for certain takes their place.
            for old in self.steps[self._keep :]:
                self._manager.delete(old)
        except Exception as error:  # orbax has no common class for what a full disk raises
            self._manager.reload()
            whole = [old for old in self.steps if old != step]
            raise UserError(
                f'the checkpoint of step {step} cannot be written into {self._folder} '
                f'({_reason(error)}): make room, or the folder writable, and run the same command '
                f'again; it continues from step {whole[0] if whole else 0}'
            ) from error
        give_back_memory()

    def save_constants(self, constants: PyTree) -> str:
        """Writes what the method's preparatory phase found, once a run; returns its digest."""
        if constants:
            write_tree(self._constants, constants)
            if is_first():
                sync_tree(self._constants)
        return tree_digest(constants)

    def restore_constants(self, meta: Meta) -> PyTree:
        """Reads what `save_constants` wrote; {} if there was nothing to write.

        Raises:
          UserError: it cannot be read, or is not what was written.
        """
        constants = {}
        try:
            if self._constants.exists():
                constants = read_tree(self._constants)
            _check(meta.constants, tree_digest(constants))
        except Exception as error:  # orbax has no common class for what a damaged file raises
            raise UserError(
                f'{self._constants} cannot be read ({first_line(error)}): the checkpoints beside '
                'it need it; restore it from a copy, or start anew in another --workdir'
            ) from error
        return constants

    def restore_meta(self) -> Meta | None:
        """That of the newest readable checkpoint; None without any."""
        return self._newest(lambda step: Meta.from_json(self._read_meta(step)['content']))

    def restore(self, shapes: TrainState) -> tuple[TrainState, Meta] | None:
        """Reads the newest readable checkpoint; None without any.

        Args:
          shapes: of all but the memory; see `step.Task`.

        Returns:
          the replicated state, and what else there is.

        Raises:
          NotRestored: the checkpoint is of another network or optimiser.
          UserError: there are checkpoints, and none can be read.
        """

        def read(step):
            stored = self._read_meta(step)
            if stored['structure'] != _structure(shapes):
                raise NotRestored(
                    f'{self._folder / str(step)} is of another network or optimiser: give the '
                    'configuration that the run was begun with, or choose another --workdir'
                )
            memory = int_keys(self._manager.item_metadata(step).state['memory'])
            template = everywhere(_as_dict(shapes) | {'memory': memory})
            items = ocp.args.Composite(state=ocp.args.StandardRestore(template))
            restored = local_arrays(TrainState(**self._manager.restore(step, args=items).state))
            _check(stored['state'], tree_digest(_as_dict(restored)))
            return restored, Meta.from_json(stored['content'])

        return self._newest(read)

    def close(self) -> None:
        self._manager.close()

    def _read_meta(self, step: int) -> dict[str, Any]:
        """What `_sealed` returned."""
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        stored = self._manager.restore(step, args=items).meta
        _check(stored.pop('seal'), _json_digest(stored))
        return stored

    def _newest(self, read):
        """The newest checkpoint that can be read; damaged ones are moved aside, never deleted."""
        steps = self.steps
        for step in steps:
            try:
                return _readable(read, step)
            except NotRestored:
                raise
            except UserError as error:  # here or in another process
                damaged = self._folder / str(step)
                # Nobody goes on before it is moved.
                aside = first_process(set_aside)(damaged, self.workdir)
                log.warning(
                    'Checkpoint %s cannot be read (%s): moved to %s',
                    damaged,
                    error,
                    aside,
                )
                self._manager.reload()
        if steps:
            raise UserError(
                f'no checkpoint in {self.workdir} can be read; they are in damaged/: put a copy of '
                f'one back into {self._folder}, or run the same command again to start anew'
            )
        return None


def _system_error(error: Exception) -> int | None:
    """Its number; tensorstore gives it in the midst of many lines."""
    number = re.search(r'OS error (\d+)', str(error))
    return int(number[1]) if number else getattr(error, 'errno', None)


def _reason(error: Exception) -> str:
    number = _system_error(error)
    return os.strerror(number) if number else first_line(error)


@every_process
def _readable(read, step: int):
    try:
        return read(step)
    except NotRestored:
        raise
    except Exception as error:  # orbax has no common class for what a damaged file raises
        if isinstance(error, MemoryError) or _system_error(error) in _PASSING:
            raise NotRestored(
                f'checkpoint {step} cannot be read now ({_reason(error)}): mend that, and run the '
                'same command again'
            ) from error
        raise UserError(_reason(error)) from error


def _sealed(meta: Meta, state: TrainState) -> dict[str, Any]:
    """JSON values of `meta`, with digests by which damage to any of it is noticed."""
    stored = {
        'content': json.loads(json.dumps(meta.to_json())),
        'state': tree_digest(_as_dict(state)),
        'network': network_digest(state.params, state.batch_stats),
        'structure': _structure(state),
    }
    return stored | {'seal': _json_digest(stored)}


def _structure(state: TrainState) -> str:
    """Digest of names, shapes and types of all but the memory, whose shape is a method's own."""
    leaves = {'params': state.params, 'stats': state.batch_stats, 'opt_state': state.opt_state}
    leaves |= _average(state)
    return _json_digest([f'{key} {x.shape} {x.dtype}' for key, x in by_name(leaves).items()])


def _check(expected: str, found: str) -> None:
    if expected != found:
        raise UserError('its content is not what was written')


def _json_digest(value: Any) -> str:
    return arrays_digest({'json': json_array(value)})


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {
        'step': state.step,
        'params': state.params,
        'batch_stats': state.batch_stats,
        'opt_state': state.opt_state,
        'memory': state.memory,
        **_average(state),
    }


def _average(state: TrainState) -> dict[str, Any]:
    """Nothing where there is none, as in checkpoints of earlier versions."""
    return {'average': state.average} if state.average else {}
