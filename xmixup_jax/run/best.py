"""Keeps the best network so far, by validation or test accuracy during training."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.compute.state import TrainState
from xmixup_jax.devices import replicate
from xmixup_jax.errors import DataError
from xmixup_jax.files import BEST, set_aside
from xmixup_jax.processes import every_process, first_process, is_first
from xmixup_jax.weights.files import read_metadata, save_weights
from xmixup_jax.weights.pretrained import Weights

log = logging.getLogger('xmixup_jax')


class Best:
    """The file best_model.safetensors, which stores the weights together with their score.

    A run that was killed can use the file no matter when it was written: the steps that it repeats
    give the same scores again.
    """

    def __init__(self, workdir: Path, config: ConfigDict, class_names: tuple[str, ...]):
        """Reads the score of an existing file; a corrupted file is moved aside.

        Args:
          workdir: folder of the run.
          config: configuration of the run.
          class_names: class names of the target.
        """
        self._path = workdir / BEST
        self._model = config.model.name
        self._content = {'class_names': class_names, 'config': config.to_dict()}
        self._by = 'validation' if config.target.validation_share else 'test'
        self._patience = config.patience * config.eval_every
        self.score: dict[str, Any] = {}
        """'best_step', 'best_top1', 'best_loss' and 'best_by' ('validation' or 'test'); {} before
        the first evaluation."""
        if not self._path.exists():
            return
        try:
            Weights(self._path, self._model)  # verifies the digest
            self.score = read_metadata(self._path)['score']
        except DataError as error:
            if is_first():
                log.warning('%s: moved to %s', error, set_aside(self._path, workdir))

    def offer(self, state: TrainState, tested: dict[str, float]) -> None:
        """Saves the network if its 'top1' is the highest so far, or equal with a lower 'loss'.

        Args:
          state: the network.
          tested: its 'top1' and 'loss'.
        """
        best = self.score.get('best_top1', -1.0), -self.score.get('best_loss', 0.0)
        if (tested['top1'], -tested['loss']) <= best:
            return
        scores = {f'best_{key}': tested[key] for key in ('top1', 'loss')}
        self.score = {'best_step': int(state.step), **scores, 'best_by': self._by}
        self._save(state)

    def exhausted(self, step: int) -> bool:
        """Whether the last config.patience evaluations up to this step brought no improvement."""
        if not (self._patience and self.score):
            return False
        return step - self.score['best_step'] >= self._patience

    @every_process
    def network(self, state: TrainState) -> TrainState:
        """Returns the state with the parameters and statistics of the best network."""
        params, batch_stats = Weights(self._path, self._model).fill(
            *jax.tree.map(np.asarray, (state.params, state.batch_stats)), with_head=True
        )
        return replace(state, params=replicate(params), batch_stats=replicate(batch_stats))

    @first_process
    def _save(self, state: TrainState) -> None:
        content = self._content | {'score': self.score}
        save_weights(self._path, self._model, state.params, state.batch_stats, content)
