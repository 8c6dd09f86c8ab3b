"""Writes report.html of a run."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from ml_collections import ConfigDict

from xmixup_jax.compute.evaluation import Tested
from xmixup_jax.data.names import readable
from xmixup_jax.data.selection import Data
from xmixup_jax.data.sources import short_name
from xmixup_jax.files import ENVIRONMENT, METRICS, REPORT, read_json
from xmixup_jax.matching import ClassMatch
from xmixup_jax.report import figures
from xmixup_jax.report.advice import Numbers, advice
from xmixup_jax.report.classes import classes_contents, classes_part
from xmixup_jax.report.examples import inputs_part, match_part
from xmixup_jax.report.facts import interval
from xmixup_jax.report.page import figure_tag, write
from xmixup_jax.report.scores import Reliability, calibration
from xmixup_jax.text import shell_line

_PAIRS_OPEN = 12  # of the class match; the others are folded


def write_report(
    workdir: Path,
    config: ConfigDict,
    result: dict[str, Any],
    data: Data,
    match: ClassMatch | None,
    inputs: dict[str, np.ndarray],
    tested: Tested | None,
) -> None:
    """Writes report.html from the result and metrics.csv of a run.

    Args:
      workdir: of the run.
      config: of the run.
      result: the content of result.json.
      data: its records; some images are read.
      match: of the classes, if the method pairs.
      inputs: of the first batch, see `step.input_step`.
      tested: the network's outputs for data.test.
    """
    names = readable(data.target.class_names)
    environment = read_json(workdir / ENVIRONMENT)
    rows = _rows(workdir / METRICS)
    bins = None if tested is None else calibration(tested)
    classes = classes_part(tested, bins, names, data.test, config)
    curves = _curves(rows, result)
    follows = advice(_numbers(rows, result, data, match, tested, bins), config)
    mixed = 'lam' in inputs
    write(
        workdir / REPORT,
        'run.html',
        title=f'{short_name(config.target.name)} · {result["method"]}',
        sentence=sentence(result),
        key_facts=_key_facts(result, config),
        contents=[
            *([('training', 'Training')] if curves else []),
            *([('advice', 'What to try next')] if follows else []),
            ('inputs', 'Mixed images' if mixed else 'Training images'),
            *([('match', 'Class match')] if match is not None else []),
            *classes_contents(classes),
            ('configuration', 'Configuration'),
        ],
        pixelated=config.resize < 64,
        curves=curves,
        advice=follows,
        pairs_open=_PAIRS_OPEN,
        **match_part(match, data, config),
        **inputs_part(inputs, data, match),
        **classes,
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


def duration(seconds: float) -> str:
    """A time in its two largest units.

    >>> duration(47.6), duration(200), duration(7500)
    ('48 s', '3 min 20 s', '2 h 5 min')
    """
    whole, minutes = round(seconds), round(seconds / 60)
    if minutes >= 60:
        return f'{minutes // 60} h {minutes % 60} min'
    return f'{whole // 60} min {whole % 60} s' if whole >= 60 else f'{whole} s'


def _key_facts(result: dict[str, Any], config: ConfigDict) -> list[tuple[str, Any]]:
    scores = {'top1': 'Top-1', 'top5': 'Top-5', 'macro_top1': 'Macro top-1'}
    shown = [(name, f'{100 * result[key]:.2f} %') for key, name in scores.items() if key in result]
    images = result['test_images']
    if 'top1' in result:
        shown.insert(1, ('95 % interval of top-1', interval(result['top1'], images)))
    return [
        *shown,
        ('Test images', images),
        ('Training images', result['train_images']),
        ('Classes', result['num_classes']),
        ('Steps', result['steps']),
        ('Time', duration(result['seconds'])),
        ('Method', result['method']),
        ('Network', config.model.name),
    ]


def _numbers(
    rows: list[dict[str, float]],
    result: dict[str, Any],
    data: Data,
    match: ClassMatch | None,
    tested: Tested | None,
    bins: Reliability | None,
) -> Numbers:
    names = readable(data.target.class_names)
    return Numbers(
        class_names=names,
        class_images=np.bincount(data.target.labels, minlength=len(names)),
        loss=[row['loss'] for row in rows if 'loss' in row],
        top1=[row['top1'] for row in rows if 'top1' in row],
        stopped='stopped_of' in result,
        test_top1=result.get('top1'),
        similarity=None if match is None else match.similarity[:, 0],
        confusion=None if tested is None else tested.confusion,
        ece=None if bins is None else bins.ece,
        confidence=None if bins is None else bins.mean_confidence,
    )


def _rows(path: Path) -> list[dict[str, float]]:
    """The values of each row of metrics.csv, without empty cells."""
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
    rate = {'rate': points('learning_rate')}
    values = [value for line in loss.values() for _, value in line]
    log = bool(values) and 0 < 20 * min(values) < max(values)
    plots = [
        (loss, 'loss', log, _ends('Loss', loss)),
        (top1, 'top-1, %', False, _ends('Top-1 accuracy in %', top1)),
        (rate, 'learning rate', False, 'Learning rate over the steps.'),
    ]
    return [
        figure_tag(figures.curves(lines, label, logarithmic), words)
        for lines, label, logarithmic, words in plots
        if any(len(line) > 1 for line in lines.values())
    ]


def _ends(what: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    ends = [f'{name} {_range(points)}' for name, points in lines.items() if points]
    return f'{what} over the steps: {", ".join(ends)}.'


def _range(points: list[tuple[float, float]]) -> str:
    first, last = points[0][1], points[-1][1]
    return f'{last:.3g}' if len(points) == 1 else f'from {first:.3g} to {last:.3g}'


def _facts(result: dict[str, Any], environment: dict[str, Any]) -> list[tuple[str, Any]]:
    """The facts to see without opening the configuration."""
    keys = ('test_images', 'skipped_images', 'images_per_second', 'first_step_seconds', 'commit')
    facts = [(key.replace('_', ' '), result[key]) for key in keys if result[key] is not None]
    versions = ', '.join(f'{name} {value}' for name, value in environment['versions'].items())
    return [*facts, ('versions', versions), ('command', shell_line(environment['command']))]
