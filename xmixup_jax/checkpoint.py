"""Checkpoints with orbax: the state, the iterator, and what else a resumed run needs."""

import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from xmixup_jax.errors import UserError
from xmixup_jax.matching import ClassMatch
from xmixup_jax.step import TrainState

log = logging.getLogger('xmixup_jax')


class Restored(NamedTuple):
    """A checkpoint as read back."""

    state: TrainState
    iterator: dict[str, Any]
    """State of the training iterator, for `set_state`."""
    seconds: float
    """Training time so far."""


def _dump(match: ClassMatch | None) -> dict[str, Any] | None:
    if match is None:
        return None
    return {'classes': match.classes.tolist(), 'similarity': match.similarity.tolist()}


class Checkpoints:
    """The checkpoints of one run; written in the background, each appears whole or not at all."""

    def __init__(self, workdir: Path, keep: int):
        self._folder = (workdir / 'checkpoints').absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_names=('state', 'meta'),
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints at hand, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(
        self,
        state: TrainState,
        iterator: dict[str, Any],
        match: ClassMatch | None,
        seconds: float,
        config: dict[str, Any],
    ) -> None:
        """Starts writing; returns once the state's buffers may be reused."""
        meta = {
            'iterator': iterator,
            'match': _dump(match),
            'seconds': seconds,
            'config': config,
        }
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_dict(state)), meta=ocp.args.JsonSave(meta)
            ),
            force=True,
        )

    def restore_match(self) -> ClassMatch | None:
        """The class match stored with the newest readable checkpoint (needed to shape the head)."""
        match = self._newest(self._read_meta)['match']
        if match is None:
            return None
        return ClassMatch(
            np.array(match['classes'], np.int32), np.array(match['similarity'], np.float32)
        )

    def restore(self, state: TrainState) -> Restored:
        """Reads the newest readable checkpoint.

        Args:
          state: replicated, gives the structure, shapes and sharding.

        Raises:
          UserError: none of the checkpoints can be read.
        """
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(state))

        def read(step):
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(template), meta=ocp.args.JsonRestore()
            )
            restored = self._manager.restore(step, args=items)
            return restored.state, restored.meta

        tree, meta = self._newest(read)
        return Restored(TrainState(**tree), meta['iterator'], meta['seconds'])

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _read_meta(self, step: int) -> dict[str, Any]:
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items).meta

    def _newest(self, read):
        """The newest checkpoint that can be read; damaged ones are moved aside, never deleted."""
        for step in self.steps:
            try:
                return read(step)
            except Exception as error:  # orbax has no common class for what a damaged file raises
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                aside = self._folder.parent / 'damaged_checkpoints' / f'{step}-{time.time_ns()}'
                log.warning(
                    'Checkpoint %s/%d cannot be read (%s): moved to %s',
                    self._folder,
                    step,
                    reason,
                    aside,
                )
                aside.parent.mkdir(exist_ok=True)
                (self._folder / str(step)).rename(aside)
                self._manager.reload()
        raise UserError(
            f'none of the checkpoints in {self._folder} could be read: the same command starts '
            'the run anew'
        )


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {
        'step': state.step,
        'params': state.params,
        'batch_stats': state.batch_stats,
        'opt_state': state.opt_state,
    }
