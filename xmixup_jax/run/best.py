"""The best network so far, by the tests on the way."""

import logging
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xmixup_jax.compute.step import TrainState
from xmixup_jax.errors import DataError
from xmixup_jax.files import BEST, set_aside
from xmixup_jax.processes import first_process, is_first
from xmixup_jax.weights.files import read_metadata, save_weights
from xmixup_jax.weights.pretrained import Weights

log = logging.getLogger('xmixup_jax')


class Best:
    """Keeps best_model.safetensors, which holds weights and score together.

    A run that was killed finds it, and need not know when it was written: the steps that it does
    again give the same scores.
    """

    def __init__(self, workdir: Path, config: ConfigDict, class_names: tuple[str, ...]):
        """Finds what earlier parts of the run have left.

        Args:
          workdir: of the run.
          config: of the experiment.
          class_names: of the target.
        """
        self._path = workdir / BEST
        self._model = config.model.name
        self._content = {'class_names': class_names, 'config': config.to_dict()}
        self.score: dict[str, Any] = {}
        """'best_step', 'best_top1' and 'best_loss'; {} before the first test."""
        if not self._path.exists():
            return
        try:
            Weights(self._path, self._model)  # tests the digest
            self.score = read_metadata(self._path)['score']
        except DataError as error:
            if is_first():
                log.warning('%s: moved to %s', error, set_aside(self._path, workdir))

    def offer(self, state: TrainState, tested: dict[str, float]) -> None:
        """Keeps the network if its 'top1' is above all before."""
        if tested['top1'] <= self.score.get('best_top1', -1.0):
            return
        self.score = {'best_step': int(state.step)} | {
            f'best_{key}': tested[key] for key in ('top1', 'loss')
        }
        self._save(state)

    @first_process
    def _save(self, state: TrainState) -> None:
        content = self._content | {'score': self.score}
        save_weights(self._path, self._model, state.params, state.batch_stats, content)
