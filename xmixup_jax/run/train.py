"""A whole run, top to bottom: data, backbone, class match, training, evaluation, result."""

import contextlib
import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from xmixup_jax import config as config_lib
from xmixup_jax.compute.evaluation import evaluate
from xmixup_jax.compute.reestimation import with_clean_statistics
from xmixup_jax.data.selection import Data
from xmixup_jax.files import read_json, write_json
from xmixup_jax.processes import is_first, on_all_processes
from xmixup_jax.report.run import write_report
from xmixup_jax.run.best import Best
from xmixup_jax.run.checkpoint import Checkpoints
from xmixup_jax.run.inputs import check_inputs, first_inputs, open_data, open_input
from xmixup_jax.run.loop import Diverged, fit
from xmixup_jax.run.provenance import commit, record
from xmixup_jax.run.start import begin, report_match, resume
from xmixup_jax.run.tracking import tracked
from xmixup_jax.run.workdir import ENVIRONMENT, RESULT, claim, locked, seal
from xmixup_jax.weights.find import WEIGHTS_FILE, find_weights
from xmixup_jax.weights.pretrained import Weights, save_weights

log = logging.getLogger('xmixup_jax')


def train_and_evaluate(
    config: ConfigDict, workdir: Path, data: Data | None = None
) -> dict[str, Any]:
    """Trains, or continues, or merely reports the run in `workdir`.

    Args:
      config: an experiment, as `config.validate` accepts it.
      workdir: folder of the run; gets config.json, environment.json, match.json, metrics.csv,
        tensorboard/, checkpoints/, constants/, model.safetensors, best_model.safetensors,
        result.json, report.html and SHA256SUMS.
      data: the records, where the caller has them; otherwise the configuration's are opened.

    Returns:
      the content of result.json.

    Raises:
      UserError: something that the user can mend.
    """
    if data is None:
        on_all_processes(lambda: check_inputs(config))
    with (
        locked(workdir),
        contextlib.closing(Checkpoints(workdir, config.keep_checkpoints)) as checkpoints,
        contextlib.ExitStack() as stack,
    ):
        finished = claim(config, workdir, checkpoints)
        if finished:
            return finished
        data = data or on_all_processes(lambda: open_data(config))

        def train(auxiliary: ConfigDict, name: str, data: Data) -> dict[str, Any]:
            return train_and_evaluate(auxiliary, workdir / name, data)

        start = resume(config, checkpoints)
        if start is None:
            start = begin(config, data, backbone_weights(config), checkpoints, train)
        if is_first():
            record(workdir / ENVIRONMENT, int(start.state.step))
        if start.meta.match is not None:
            report_match(workdir, start.meta.match, data)
        batches, pool, data = open_input(config, data, start.meta.match)
        best = Best(workdir, config, data.target.class_names)
        tracker = stack.enter_context(tracked(config, workdir))
        tested_state = partial(with_clean_statistics, start.task, config, target=data.target)
        state, speed = fit(
            config, start, batches, pool, data.test, best, checkpoints, tested_state, tracker
        )
        state = tested_state(state)
        if speed['images_per_second'] is None and (workdir / RESULT).exists():
            speed |= {key: read_json(workdir / RESULT)[key] for key in speed}  # nothing was trained
        tested = evaluate(start.task, config, state, data.test) if data.test else None
        metrics = tested.metrics if tested else {}
        if not np.isfinite(list(metrics.values())).all():
            raise Diverged(
                f'the loss on the test images is not finite after step {config.steps}, the '
                f'checkpoints are in {workdir}: lower config.optimizer.learning_rate'
            )
        if data.test and config.eval_every:
            best.offer(state, metrics)
        result = {
            'method': config.method,
            'seed': config.seed,
            **metrics,
            **best.score,
            'steps': config.steps,
            **speed,
            'train_images': len(data.target),
            'test_images': len(data.test) - data.test.skipped if data.test else 0,
            'skipped_images': sum(part.skipped for part in data if part is not None),
            'num_classes': len(data.target.class_names),
            'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
            'commit': commit(),
        }
        inputs = first_inputs(start.task, config, data, start.meta.match) if config.report else {}

        def write() -> None:
            if not is_first():
                return
            save_weights(
                workdir / WEIGHTS_FILE,
                config.model.name,
                state.params,
                state.batch_stats,
                {'class_names': data.target.class_names, 'config': config.to_dict()},
            )
            write_json(workdir / RESULT, result)
            if config.report:
                write_report(workdir, config, result, data, start.meta.match, inputs, tested)
            seal(workdir)

        on_all_processes(write)  # another process may want to read it next
        if tracker is not None:
            tracker.summary.update({f'result/{key}': value for key, value in result.items()})
        return result


def backbone_weights(config: ConfigDict) -> Weights | None:
    """The weights to start from; trains them on the source if no run before has done so."""
    if config.weights == '':
        return None
    if config.weights != 'source':
        return on_all_processes(lambda: Weights(find_weights(config.weights), config.model.name))
    pretrain = config_lib.pretrain_config(config)
    name = f'{config.source.name.split("/")[-1]}-{config.model.name}-{config_lib.digest(pretrain)}'
    folder = Path(config.cache_dir).expanduser() / 'pretrained' / name
    with locked(folder.with_name(folder.name + '.lock'), '--config.cache_dir', wait=True):
        if not (folder / RESULT).exists():
            log.info(
                'Training %s on %s, once, in %s', config.model.name, config.source.name, folder
            )
        train_and_evaluate(pretrain, folder)  # if that has not been done
    return on_all_processes(lambda: Weights(folder / WEIGHTS_FILE, config.model.name))
