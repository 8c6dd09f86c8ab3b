"""Checkpoints with orbax: the state, the iterator, and what else a resumed run needs."""

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from xmixup_jax.devices import global_arrays, local_arrays
from xmixup_jax.errors import UserError, first_line
from xmixup_jax.matching import ClassMatch
from xmixup_jax.methods.base import Sizes
from xmixup_jax.processes import is_first, together
from xmixup_jax.step import TrainState

PyTree = Any

log = logging.getLogger('xmixup_jax')


class Meta(NamedTuple):
    """What a checkpoint holds beside the state."""

    iterator: dict[str, Any] | None
    """State of the training iterator, for `set_state`; None before the first step."""
    match: ClassMatch | None
    sizes: Sizes
    """Numbers of classes, which shape the head."""
    seconds: float
    """Time of preparation and training so far."""

    def to_json(self) -> dict[str, Any]:
        match = self.match and {key: value.tolist() for key, value in self.match._asdict().items()}
        return self._replace(match=match, sizes=self.sizes._asdict())._asdict()

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> 'Meta':
        match = values['match'] and ClassMatch(
            np.array(values['match']['classes'], np.int32),
            np.array(values['match']['similarity'], np.float32),
        )
        sizes = Sizes(**values['sizes'])
        return cls(values['iterator'], match, sizes, values['seconds'])


class Checkpoints:
    """The checkpoints of one run; written in the background, each appears whole or not at all."""

    def __init__(self, workdir: Path, keep: int):
        self.workdir = workdir.absolute()
        self._folder = self.workdir / 'checkpoints'
        self._constants = self.workdir / 'constants'
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_handlers={
                'state': ocp.StandardCheckpointHandler(),
                'meta': ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints at hand, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, state: TrainState, meta: Meta, config: dict[str, Any]) -> None:
        """Starts writing; returns once the state's buffers may be reused."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_dict(global_arrays(state))),
                meta=ocp.args.JsonSave(meta.to_json() | {'config': config}),
            ),
            force=True,
        )

    def save_constants(self, constants: PyTree) -> None:
        """Writes what the method's preparatory phase found, once a run."""
        if constants:
            with ocp.StandardCheckpointer() as checkpointer:
                tree = jax.tree.map(np.asarray, constants)
                checkpointer.save(self._constants, tree, force=True)

    def restore_constants(self) -> PyTree:
        """Reads what `save_constants` wrote; {} if there was nothing to write.

        Raises:
          UserError: it cannot be read.
        """
        if not self._constants.exists():
            return {}
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                return _int_keys(checkpointer.restore(self._constants))
        except Exception as error:  # orbax has no common class for what a damaged file raises
            raise UserError(
                f'{self._constants} cannot be read ({first_line(error)}): the checkpoints beside '
                'it need it; restore it from a copy, or start anew in another --workdir'
            ) from error

    def restore_meta(self) -> Meta:
        """That of the newest readable checkpoint."""
        return self._newest(self._read_meta)

    def restore(self, state: TrainState) -> tuple[TrainState, Meta]:
        """Reads the newest readable checkpoint.

        Args:
          state: replicated, gives the structure, shapes and sharding of all but the memory.

        Raises:
          UserError: none of the checkpoints can be read.
        """
        state = global_arrays(state)
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(state))
        sharding = state.step.sharding

        def read(step):
            memory = _int_keys(self._manager.item_metadata(step).state['memory'])
            template['memory'] = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), memory
            )
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(template), meta=ocp.args.JsonRestore()
            )
            restored = self._manager.restore(step, args=items)
            return local_arrays(TrainState(**restored.state)), Meta.from_json(restored.meta)

        return self._newest(read)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _read_meta(self, step: int) -> Meta:
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return Meta.from_json(self._manager.restore(step, args=items).meta)

    def _newest(self, read):
        """The newest checkpoint that can be read; damaged ones are moved aside, never deleted."""
        for step in self.steps:
            try:
                return together(partial(_readable, read, step))
            except UserError as error:  # here or in another process
                aside = self._folder.parent / 'damaged_checkpoints' / f'{step}-{time.time_ns()}'
                log.warning(
                    'Checkpoint %s/%d cannot be read (%s): moved to %s',
                    self._folder,
                    step,
                    first_line(error),
                    aside,
                )
                if is_first():
                    aside.parent.mkdir(exist_ok=True)
                    (self._folder / str(step)).rename(aside)
                together(lambda: None)  # nobody goes on before it is moved
                self._manager.reload()
        raise UserError(
            f'none of the checkpoints in {self._folder} could be read: the same command starts '
            'the run anew'
        )


def _readable(read, step: int):
    try:
        return read(step)
    except Exception as error:  # orbax has no common class for what a damaged file raises
        raise UserError(first_line(error)) from error


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {
        'step': state.step,
        'params': state.params,
        'batch_stats': state.batch_stats,
        'opt_state': state.opt_state,
        'memory': state.memory,
    }


def _int_keys(tree: PyTree) -> PyTree:
    """Without a template, orbax returns the places in a list of layers (0, 1, ...) as text."""
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdigit() else key: _int_keys(value) for key, value in tree.items()}
