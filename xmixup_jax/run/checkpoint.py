"""Checkpoints with Orbax: the state, the iterator, and everything else a resumed run needs."""

import errno
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp

from xmixup_jax.compute.state import TrainState
from xmixup_jax.devices import global_arrays, local_arrays, replicated_shapes
from xmixup_jax.errors import UserError, first_line
from xmixup_jax.files import set_aside, sync_tree
from xmixup_jax.integrity import arrays_digest, by_name, json_array, network_digest, tree_digest
from xmixup_jax.matching import ClassMatch
from xmixup_jax.methods.base import Sizes
from xmixup_jax.processes import every_process, first_process, is_first
from xmixup_jax.run.memory import release_memory
from xmixup_jax.trees import int_keys, read_tree, write_tree

PyTree = Any

log = logging.getLogger('xmixup_jax')


# System errors that do not mean that a file is corrupted.
_TRANSIENT = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)


class NotRestored(UserError):
    """The checkpoint cannot be used, but it is not corrupted, and stays where it is."""


class Meta(NamedTuple):
    """The content of a checkpoint besides the state."""

    config: dict[str, Any]
    """The configuration when the checkpoint was written."""
    iterator: dict[str, Any] | None
    """State of the training iterator, for `set_state`; None before the first step."""
    match: ClassMatch | None
    sizes: Sizes
    """Numbers of classes, which determine the shape of the head."""
    seconds: float
    """Time spent on preparation and training so far."""
    rows: list[dict[str, float]]
    """Rows of metrics.csv."""
    constants: str
    """Digest of the constants that `save_constants` wrote."""
    data: dict[str, Any] | None = None
    """`Data.summary`; None in checkpoints written by earlier versions."""

    def to_json(self) -> dict[str, Any]:
        """Returns the metadata as JSON values."""
        match = self.match and {key: value.tolist() for key, value in self.match._asdict().items()}
        return self._asdict() | {'match': match, 'sizes': self.sizes._asdict()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> 'Meta':
        """Restores what `to_json` returned."""
        match = values['match'] and ClassMatch(
            np.array(values['match']['classes'], np.int32),
            np.array(values['match']['similarity'], np.float32),
        )
        return cls(**values | {'match': match, 'sizes': Sizes(**values['sizes'])})


class Checkpoints:
    """The checkpoints of one run, written atomically and with digests of their content.

    `save` returns when the checkpoint is on disk: a run that is killed at any moment loses only the
    steps since the last save.
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
        """Steps of the existing checkpoints, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, state: TrainState, meta: Meta) -> None:
        """Writes a checkpoint, and deletes the oldest ones beyond config.keep_checkpoints.

        Raises:
          UserError: it cannot be written; the earlier ones are still there.
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
            # Delete only now that the new checkpoint is safely on disk.
            for old in self.steps[self._keep :]:
                self._manager.delete(old)
        except Exception as error:  # Orbax raises errors without a common class on a full disk
            self._manager.reload()
            whole = [old for old in self.steps if old != step]
            raise UserError(
                f'the checkpoint of step {step} cannot be written into {self._folder} '
                f'({_reason(error)}): free disk space, or make the folder writable, and run the '
                f'same command again; it resumes from step {whole[0] if whole else 0}'
            ) from error
        release_memory()

    def save_constants(self, constants: PyTree) -> str:
        """Writes the constants from the method's preparatory phase; returns their digest.

        Called once per run, before the first checkpoint.
        """
        if constants:
            write_tree(self._constants, constants)
            if is_first():
                sync_tree(self._constants)
        elif is_first():  # of a start that ended before its first checkpoint
            shutil.rmtree(self._constants, ignore_errors=True)
        return tree_digest(constants)

    def restore_constants(self, meta: Meta) -> PyTree:
        """Reads the constants that `save_constants` wrote; {} if there were none.

        Raises:
          UserError: they cannot be read, or are corrupted.
        """
        constants = {}
        try:
            if self._constants.exists():
                constants = read_tree(self._constants)
            _check(meta.constants, tree_digest(constants))
        except Exception as error:  # Orbax raises errors without a common class on corrupted files
            raise UserError(
                f'{self._constants} cannot be read ({first_line(error)}), but the checkpoints '
                'next to it need it: restore it from a copy, or start again in another --workdir'
            ) from error
        return constants

    def restore_meta(self) -> Meta | None:
        """Reads the metadata of the newest readable checkpoint; None if there is no checkpoint."""
        return self._newest(lambda step: Meta.from_json(self._read_meta(step)['content']))

    def restore(self, shapes: TrainState) -> tuple[TrainState, Meta] | None:
        """Reads the newest readable checkpoint; None if there is no checkpoint.

        Args:
          shapes: shapes of everything except the memory; see `step.Task`.

        Returns:
          (the replicated state, the metadata).

        Raises:
          NotRestored: the checkpoint belongs to another network or optimiser.
          UserError: there are checkpoints, but none can be read.
        """

        def read(step):
            stored = self._checked_meta(step, shapes)
            memory = int_keys(self._manager.item_metadata(step).state['memory'])
            template = replicated_shapes(_as_dict(shapes) | {'memory': memory})
            items = ocp.args.Composite(state=ocp.args.StandardRestore(template))
            restored = local_arrays(TrainState(**self._manager.restore(step, args=items).state))
            _check(stored['state'], tree_digest(_as_dict(restored)))
            return restored, Meta.from_json(stored['content'])

        return self._newest(read)

    def close(self) -> None:
        """Closes Orbax's checkpoint manager."""
        self._manager.close()

    def check_structure(self, shapes: TrainState) -> None:
        """Raises NotRestored if the newest readable checkpoint is not of this structure."""
        self._newest(lambda step: self._checked_meta(step, shapes))

    def _checked_meta(self, step: int, shapes: TrainState) -> dict[str, Any]:
        stored = self._read_meta(step)
        if stored['structure'] != _structure(shapes):
            raise NotRestored(
                f'{self._folder / str(step)} belongs to another network or optimiser: use the '
                'configuration that the run was started with, or choose another --workdir'
            )
        return stored

    def _read_meta(self, step: int) -> dict[str, Any]:
        """Reads and verifies what `_sealed` returned."""
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        stored = self._manager.restore(step, args=items).meta
        _check(stored.pop('seal'), _json_digest(stored))
        return stored

    def _newest(self, read):
        """Reads the newest readable checkpoint; corrupted ones are moved aside, never deleted."""
        steps = self.steps
        for step in steps:
            try:
                return _readable(read, step)
            except NotRestored:
                raise
            except UserError as error:  # raised in this or in another process
                damaged = self._folder / str(step)
                # All processes wait here until it is moved.
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
                f'no checkpoint in {self.workdir} can be read; all were moved to damaged/: put a '
                f'copy of one back into {self._folder}, or run the same command again to start over'
            )
        return None


def _system_error(error: Exception) -> int | None:
    """Returns the error's errno, which tensorstore hides in a message of many lines."""
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
    except Exception as error:  # Orbax raises errors without a common class on corrupted files
        if isinstance(error, MemoryError) or _system_error(error) in _TRANSIENT:
            raise NotRestored(
                f'checkpoint {step} cannot be read now ({_reason(error)}): fix that, and run the '
                'same command again'
            ) from error
        raise UserError(_reason(error)) from error


def _sealed(meta: Meta, state: TrainState) -> dict[str, Any]:
    """Returns `meta` as JSON values, with digests that detect corruption of any part."""
    stored = {
        'content': json.loads(json.dumps(meta.to_json())),
        'state': tree_digest(_as_dict(state)),
        'network': network_digest(state.params, state.batch_stats),
        'structure': _structure(state),
    }
    return stored | {'seal': _json_digest(stored)}


def _structure(state: TrainState) -> str:
    """Digest of names, shapes and types, except of the memory, which is up to the method."""
    leaves = {'params': state.params, 'stats': state.batch_stats, 'opt_state': state.opt_state}
    leaves |= _average(state)
    return _json_digest([f'{key} {x.shape} {x.dtype}' for key, x in by_name(leaves).items()])


def _check(expected: str, found: str) -> None:
    if expected != found:
        raise UserError('its content is corrupted')


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
    """Returns {} without an average, as in checkpoints of earlier versions."""
    return {'average': state.average} if state.average else {}
