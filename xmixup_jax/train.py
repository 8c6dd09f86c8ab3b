"""A whole run, top to bottom: data, backbone, class match, training, evaluation, result."""

import importlib.metadata
import logging
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from xmixup_jax import config as config_lib
from xmixup_jax import step as step_lib
from xmixup_jax.checkpoint import Checkpoints
from xmixup_jax.data.pairing import train_batches
from xmixup_jax.data.sources import Records, problem, train_and_test, train_records
from xmixup_jax.errors import DataError
from xmixup_jax.evaluation import evaluate
from xmixup_jax.features import class_means
from xmixup_jax.loop import fit
from xmixup_jax.matching import ClassMatch, assign, check_assignment, class_similarity
from xmixup_jax.methods import METHODS
from xmixup_jax.models.pretrained import load_backbone, missing_weights, save_weights
from xmixup_jax.workdir import claim, locked, write_json

log = logging.getLogger('xmixup_jax')

WEIGHTS_FILE = 'model.safetensors'
_PACKAGES = (
    'jax',
    'jaxlib',
    'flax',
    'optax',
    'orbax-checkpoint',
    'grain',
    'tensorflow-datasets',
    'numpy',
)


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains, or continues, or merely reports the run in `workdir`.

    Args:
      config: an experiment, as `config.validate` accepts it.
      workdir: folder of the run; gets config.json, match.json, metrics.csv, tensorboard/,
        checkpoints/, model.safetensors and result.json.

    Returns:
      the content of result.json.

    Raises:
      UserError: something that the user can mend.
    """
    check_inputs(config)
    with locked(workdir):
        finished = claim(config, workdir)
        if finished:
            return finished
        target, test = train_and_test(config.target, config)
        source = open_source(config, target)
        checkpoints = Checkpoints(workdir, config.keep_checkpoints)
        try:
            if checkpoints.steps:
                match, backbone = checkpoints.restore_match(), None
            else:
                backbone = backbone_weights(config)
                match = find_match(config, backbone, target, source)
            if match is not None:
                report_match(workdir, match, target, source)
            num_source = 0 if match is None else len(match.selected)
            task, state = step_lib.create_task(config, len(target.class_names), num_source)
            if backbone is not None:
                state.params, state.batch_stats = load_backbone(
                    backbone, state.params, state.batch_stats
                )
            batches = train_batches(
                target,
                source,
                match,
                seed=config.seed,
                batch_size=config.batch_size,
                resize=config.resize,
                num_threads=config.num_threads,
            )
            state, speed = fit(
                task, step_lib.replicate(state), batches, test, match, checkpoints, workdir
            )
            metrics = evaluate(task, state, test) if test is not None else {}
        finally:
            checkpoints.close()
        if jax.process_index() == 0:
            save_weights(
                workdir / WEIGHTS_FILE,
                state.params,
                state.batch_stats,
                {'class_names': target.class_names, 'config': config.to_dict()},
            )
        result = {
            'method': config.method,
            'seed': config.seed,
            **metrics,
            'steps': config.steps,
            **speed,
            'train_images': len(target),
            'test_images': 0 if test is None else len(test),
            'num_classes': len(target.class_names),
            'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
            'versions': {name: importlib.metadata.version(name) for name in _PACKAGES},
        }
        write_json(workdir / 'result.json', result)
        return result


def check_inputs(config: ConfigDict) -> None:
    """Raises DataError with everything that is missing, data sets and weights, in one message."""
    names = {'target': config.target.name}
    if METHODS[config.method].uses_source or config.weights == 'source':
        names['source'] = config.source.name
    missing = {f'config.{key}.name': problem(name, config) for key, name in names.items()}
    if config.weights not in ('', 'source') and not Path(config.weights).expanduser().is_file():
        missing['config.weights'] = missing_weights(Path(config.weights))
    missing = {key: words for key, words in missing.items() if words}
    if missing:
        lines = [f'{key}: {words}' for key, words in missing.items()]
        raise DataError(lines[0] if len(lines) == 1 else '\n- '.join(['missing:', *lines]))


def open_source(config: ConfigDict, target: Records) -> Records | None:
    """The auxiliary records, if the method uses any; checks that the classes can be matched."""
    if not METHODS[config.method].uses_source:
        return None
    source = train_records(config.source, config)
    check_assignment(
        config.match.assignment,
        len(target.class_names),
        len(source.class_names),
        config.match.classes_per_target,
    )
    return source


def backbone_weights(config: ConfigDict) -> Path | None:
    """The weights to start from; trains them on the source if no run before has done so."""
    if config.weights == '':
        return None
    if config.weights != 'source':
        return Path(config.weights).expanduser()
    pretrain = config_lib.pretrain_config(config)
    name = f'{config.source.name.split("/")[-1]}-{config.model.name}-{config_lib.digest(pretrain)}'
    folder = Path(config.cache_dir).expanduser() / 'pretrained' / name
    weights = folder / WEIGHTS_FILE
    with locked(folder.with_name(folder.name + '.lock'), '--config.cache_dir', wait=True):
        if not (folder / 'result.json').exists():
            log.info(
                'Training %s on %s, once, in %s', config.model.name, config.source.name, folder
            )
            train_and_evaluate(pretrain, folder)
    return weights


def find_match(
    config: ConfigDict, backbone: Path | None, target: Records, source: Records | None
) -> ClassMatch | None:
    """Matches classes by their mean features in the pre-trained backbone."""
    if source is None:
        return None
    task, state = step_lib.create_task(config, len(target.class_names), 0)
    if backbone is not None:
        state.params, state.batch_stats = load_backbone(backbone, state.params, state.batch_stats)
    state = step_lib.replicate(state)
    similarity = class_similarity(
        class_means(task, state, target), class_means(task, state, source), config.match.similarity
    )
    return assign(similarity, config.match.assignment, config.match.classes_per_target, config.seed)


def report_match(workdir: Path, match: ClassMatch, target: Records, source: Records) -> None:
    """Writes match.json: each target class with its source classes and their similarities."""
    rows = [
        {
            'target': target.class_names[i],
            'source': [source.class_names[c] for c in classes],
            'similarity': [round(float(s), 6) for s in similarity],
        }
        for i, (classes, similarity) in enumerate(zip(match.classes, match.similarity, strict=True))
    ]
    write_json(workdir / 'match.json', rows)
