"""report.html of a run."""

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from ml_collections import ConfigDict

from xmixup_jax.compute.evaluation import Tested
from xmixup_jax.data.names import readable
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import Data
from xmixup_jax.files import ENVIRONMENT, METRICS, REPORT, read_json
from xmixup_jax.matching import ClassMatch
from xmixup_jax.report import figures
from xmixup_jax.report.classes import classes_part, thumbnail
from xmixup_jax.report.page import figure_tag, image_uri, write
from xmixup_jax.text import shell_line

_PAIRS, _INPUTS = 200, 12  # shown at most
_IMAGES = 2  # of each class in the match
_SIMILARITY = {
    'cosine': 'the cosine of their mean features in the pre-trained network',
    'euclidean': 'minus the distance of their mean features in the pre-trained network',
    'emd': "the earth mover's similarity of their mean features in the pre-trained network",
    'predicted': 'the mean probability that the pre-trained head gives the source class',
}


def write_report(
    workdir: Path,
    config: ConfigDict,
    result: dict[str, Any],
    data: Data,
    match: ClassMatch | None,
    inputs: dict[str, np.ndarray],
    tested: Tested | None,
) -> None:
    """Writes report.html, from what the run found and from its metrics.csv.

    Args:
      workdir: of the run.
      config: of the run.
      result: the content of result.json.
      data: its records; some images are read.
      match: of the classes, where the method pairs.
      inputs: of the first batch, see `step.input_step`.
      tested: the network's outputs on data.test.
    """
    names = readable(data.target.class_names)
    environment = read_json(workdir / ENVIRONMENT)
    write(
        workdir / REPORT,
        'run.html',
        title=f'{config.target.name.split("/")[-1]} · {result["method"]}',
        sentence=sentence(result),
        contents=_contents(match, 'lam' in inputs, tested),
        pixelated=config.resize < 64,
        curves=_curves(_rows(workdir / METRICS), result),
        inputs=_inputs(inputs, names, data, match),
        mixed='lam' in inputs,
        similarity=_SIMILARITY[config.match.similarity] if match else '',
        **_match(match, data, config),
        **classes_part(tested, names, data.test, config),
        facts=_facts(result, environment[-1]),
        config=json.dumps(config.to_dict(), indent=2),
        environment=json.dumps(environment, indent=2),
    )


def sentence(result: dict[str, Any]) -> str:
    """The result in one line."""
    of = f' of {result["stopped_of"]}' if 'stopped_of' in result else ''
    steps = f'{result["steps"]}{of} steps'
    if result.get('best_by') == 'validation':
        steps += (
            f', the network of step {result["best_step"]} chosen by '
            f'{result["validation_images"]} validation images'
        )
    trained = (
        f'{result["method"]} with {result["train_images"]} training images of '
        f'{result["num_classes"]} classes, {steps}, seed {result["seed"]}, '
        f'{result["seconds"]:.0f} s on {result["devices"]}'
    )
    if 'top1' not in result:
        return trained
    return f'{100 * result["top1"]:.2f} % top-1 on {result["test_images"]} test images: {trained}'


def _contents(match, mixed: bool, tested) -> list[tuple[str, str]]:
    parts = [
        (True, 'training', 'training'),
        (match is not None, 'match', 'class match'),
        (True, 'inputs', 'mixed images' if mixed else 'training images'),
        (tested is not None, 'classes', 'classes'),
        (tested is not None, 'calibration', 'calibration'),
        (True, 'configuration', 'configuration'),
    ]
    return [(id, name) for there, id, name in parts if there]


def _rows(path: Path) -> list[dict[str, float]]:
    """Of metrics.csv, what each row has."""
    with path.open(newline='') as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def _curves(rows: list[dict[str, float]], result: dict[str, Any]) -> list[Markup]:
    def points(key: str, scale: float = 1.0) -> list[tuple[float, float]]:
        found = [(row['step'], scale * row[key]) for row in rows if key in row]
        final = result.get(key.removeprefix('test_')) if key.startswith('test_') else None
        return found if final is None else [*found, (result['steps'], scale * final)]

    loss, top1 = {'training': points('loss')}, {'training': points('top1', 100)}
    for kind in ('validation', 'test'):
        if points(f'{kind}_loss'):
            loss[kind], top1[kind] = points(f'{kind}_loss'), points(f'{kind}_top1', 100)
    speed = figures.curves({'images/s': points('images_per_second')}, 'training images/s')
    rate = figures.curves({'rate': points('learning_rate')}, 'learning rate')
    values = [value for line in loss.values() for _, value in line]
    log = bool(values) and 0 < 20 * min(values) < max(values)
    return [
        figure_tag(figures.curves(loss, 'loss', log), _ends('Loss', loss)),
        figure_tag(figures.curves(top1, 'top-1, %'), _ends('Top-1 accuracy in %', top1)),
        figure_tag(rate, 'Learning rate over the steps.'),
        figure_tag(speed, 'Training images a second over the steps.'),
    ]


def _ends(what: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    ends = [f'{name} from {x[0][1]:.3g} to {x[-1][1]:.3g}' for name, x in lines.items() if x]
    return f'{what} over the steps: {", ".join(ends)}.'


def _first_images(records: Records, c: int, config: ConfigDict) -> list[str]:
    """Thumbnails of the first images of a class that can be read."""
    places = np.flatnonzero(records.labels == c)[: 3 * _IMAGES]
    uris = (thumbnail(records, i, config) for i in places)
    return list(itertools.islice(filter(None, uris), _IMAGES))


def _match(match: ClassMatch | None, data: Data, config: ConfigDict) -> dict[str, Any]:
    if match is None:
        return {'match': None, 'match_left_out': 0}
    source = data.source
    assert source is not None  # as there is a match
    targets, sources = readable(data.target.class_names), readable(source.class_names)
    order = np.argsort(-match.similarity[:, 0], kind='stable')[:_PAIRS]
    pairs = [
        {
            'target': targets[t],
            'target_images': _first_images(data.target, t, config),
            'sources': [
                {
                    'name': sources[s],
                    'similarity': f'{similarity:.3f}',
                    'images': _first_images(source, s, config),
                }
                for s, similarity in zip(match.classes[t], match.similarity[t], strict=True)
            ],
        }
        for t in order
    ]
    return {'match': pairs, 'match_left_out': len(targets) - len(pairs)}


def _inputs(
    inputs: dict[str, np.ndarray], names: list[str], data: Data, match: ClassMatch | None
) -> list[dict[str, Any]]:
    """A card for each of the first images, or of the most mixed, with what is in it."""
    if 'source_label' in inputs:
        assert match is not None and data.source is not None  # the method pairs
        selected = readable(data.source.class_names)
        others = [selected[match.selected[c]] for c in inputs['source_label']]
    else:
        others = [names[c] for c in inputs.get('other_label', ())]
    shown = np.arange(len(inputs['image']))
    if 'lam' in inputs:
        shown = np.argsort(np.abs(inputs['lam'] - 0.5), kind='stable')
    shown = shown[:_INPUTS]
    cards = []
    for i in shown:
        own = names[inputs['label'][i]]
        labels = [{'kind': 'target', 'words': own}]
        if 'lam' in inputs:
            lam = float(inputs['lam'][i])
            kind = 'source' if 'source_label' in inputs else 'target'
            labels = [
                {'kind': 'target', 'words': f'{lam:.2f} × {own}'},
                {'kind': kind, 'words': f'{1 - lam:.2f} × {others[i]}'},
            ]
        words = ' + '.join(label['words'] for label in labels)
        cards.append({'uri': image_uri(inputs['image'][i]), 'labels': labels, 'words': words})
    return cards


def _facts(result: dict[str, Any], environment: dict[str, Any]) -> list[tuple[str, Any]]:
    """What a reader wants to know without opening the configuration."""
    keys = ('test_images', 'skipped_images', 'images_per_second', 'first_step_seconds', 'commit')
    facts = [(key.replace('_', ' '), result[key]) for key in keys if result[key] is not None]
    versions = ', '.join(f'{name} {value}' for name, value in environment['versions'].items())
    return [*facts, ('versions', versions), ('command', shell_line(environment['command']))]
