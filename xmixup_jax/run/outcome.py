"""The end of a run: the final test and the files that it writes."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.compute.evaluation import Tested, evaluate
from xmixup_jax.compute.state import TrainState
from xmixup_jax.compute.step import Task
from xmixup_jax.config import total_steps
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import Data
from xmixup_jax.errors import DataError, Diverged
from xmixup_jax.files import RESULT, read_json, write_json
from xmixup_jax.methods.find import method_name
from xmixup_jax.processes import first_process
from xmixup_jax.report.run import write_report
from xmixup_jax.report.scores import write_scores
from xmixup_jax.run.best import Best
from xmixup_jax.run.inputs import first_inputs
from xmixup_jax.run.provenance import commit
from xmixup_jax.run.start import Start
from xmixup_jax.run.workdir import seal
from xmixup_jax.weights.files import save_weights


def chosen_network(
    config: ConfigDict, task: Task, state: TrainState, validation: Records | None, best: Best
) -> TrainState:
    """Returns the network that the run delivers: the last one, or with validation the best one."""
    if validation is None:
        return state
    best.offer(state, evaluate(task, config, state, validation).metrics)
    return best.network(state)


def test(
    config: ConfigDict, task: Task, state: TrainState, records: Records | None
) -> Tested | None:
    """Tests a network; None without test records.

    Raises:
      DataError: none of the test images can be decoded.
      Diverged: the loss is not finite.
    """
    if records is None:
        return None
    tested = evaluate(task, config, state, records)
    if not len(tested.label):
        raise DataError(
            f'none of the {len(records)} test images of {records.name} can be decoded: replace '
            'them, or test on another split with --config.target.test_split'
        )
    if not np.isfinite(list(tested.metrics.values())).all():
        raise Diverged(
            f'the loss on the test images is not finite after step {int(state.step)}: lower '
            'config.optimizer.learning_rate'
        )
    return tested


def summary(
    config: ConfigDict,
    workdir: Path,
    data: Data,
    speed: dict[str, float | None],
    scores: dict[str, Any],
    steps: int,
    test_images: int,
) -> dict[str, Any]:
    """Returns the content of result.json.

    Args:
      config: configuration of the run.
      workdir: folder of the run.
      data: records of the run.
      speed: the second result of `loop.fit`.
      scores: scores of the tests.
      steps: number of steps done.
      test_images: number of images tested, by all processes.
    """
    if speed['images_per_second'] is None and (workdir / RESULT).exists():
        # No step was left to train: keep the speed measured before.
        speed = speed | {key: read_json(workdir / RESULT)[key] for key in speed}
    return {
        'method': method_name(config.method),
        'seed': config.seed,
        **scores,
        'steps': steps,
        **({'stopped_of': total_steps(config)} if steps < total_steps(config) else {}),
        **speed,
        'train_images': len(data.target),
        'test_images': test_images,
        **({'validation_images': len(data.validation)} if data.validation else {}),
        'skipped_images': sum(part.skipped for part in data.parts().values()),
        'num_classes': len(data.target.class_names),
        'data': data.usage(),
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'commit': commit(),
    }


def write_outcome(
    config: ConfigDict,
    workdir: Path,
    start: Start,
    data: Data,
    networks: dict[str, TrainState],
    tested: Tested | None,
    result: dict[str, Any],
) -> None:
    """Writes the weights, result.json, the figures, the report, and the digests of all files.

    Args:
      config: configuration of the run.
      workdir: folder of the run.
      start: where the run started.
      data: records of the run.
      networks: networks by the name of their weights file.
      tested: the test of the first network; None without test records.
      result: content of result.json.
    """
    match = start.meta.match
    # All processes compute the inputs; only the first one writes.
    inputs = first_inputs(start.task, start.constants, config, data, match) if config.report else {}
    for name, state in networks.items():
        _write_weights(config, workdir / name, state, data)
    first_process(write_json)(workdir / RESULT, result)
    if tested is not None:
        assert data.test is not None  # it was tested
        first_process(write_scores)(workdir, tested, data.test)
    if config.report:
        first_process(write_report)(workdir, config, result, data, match, inputs, tested)
    seal(workdir)


@first_process
def _write_weights(config: ConfigDict, path: Path, state: TrainState, data: Data) -> None:
    digests = {part: used['digest'] for part, used in data.usage().items()}
    content = {
        'class_names': data.target.class_names,
        'config': config.to_dict(),
        'data': digests,
    }
    save_weights(path, config.model.name, state.params, state.batch_stats, content)
