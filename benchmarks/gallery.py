"""A page of pictures for each task: what is matched, mixed, won and lost.

    python -m benchmarks.gallery --runs=DIR --out=DIR
    python -m benchmarks.gallery --runs=runs/compare --out=gallery

  --runs    a folder of finished runs, as `xmixup compare` (METHOD/seedN) or `benchmarks.options`
            (TASK/METHOD/OPTION/seedN) makes it, or a folder of such folders; is not written to
  --out     gets index.html, with a row for each task, and the tasks' own pages
  --option  of `benchmarks.options`; runs with other options are left out (default: none)

A page shows the class match, mixed images of the first batch, and where XMixup and fine-tuning
differ: classes and images won and lost, with the seeds that both methods have. The data sets must
be where the runs found them. The pages contain photographs of the data sets: check their licences
before you publish them.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from benchmarks.options import BASE, OPTIONS
from xmixup_jax import report
from xmixup_jax.compute.step import make_task
from xmixup_jax.config import from_stored
from xmixup_jax.data.sources import short_name
from xmixup_jax.errors import DataError, UserError
from xmixup_jax.files import CONFIG, MATCH, PREDICTIONS, RESULT, SUMS, atomic_write, read_json
from xmixup_jax.matching import ClassMatch
from xmixup_jax.methods.base import Sizes
from xmixup_jax.methods.find import with_traced
from xmixup_jax.report.examples import inputs_part, match_part
from xmixup_jax.report.page import templates
from xmixup_jax.report.predictions import Finished, where_they_differ
from xmixup_jax.report.tables import BASELINE, paired_difference
from xmixup_jax.run.inputs import first_inputs, open_data

METHOD = 'xmixup'
MATCHES = 24  # pairs of classes, at most

Group = dict[str, dict[int, Finished]]
"""The runs of a task by method and seed."""

_templates = templates.overlay(
    loader=jinja2.FileSystemLoader([Path(__file__).parent, *report.__path__])
)


def find_runs(folder: Path, option: str = BASE) -> dict[str, Group]:
    """The finished runs of fine-tuning and XMixup in a folder, by task.

    Args:
      folder: of the runs.
      option: runs with another one of `benchmarks.options.OPTIONS` in their path are left out.

    Returns:
      those of tasks that have a seed with both methods; a task's name is the path of its runs
      without method, option and seed.

    Raises:
      DataError: no task has such a seed.
    """
    found: dict[str, Group] = {}
    for path in sorted(folder.rglob(RESULT)):
        workdir = path.parent
        if not re.fullmatch(r'seed\d+', workdir.name):
            continue
        if not all((workdir / name).is_file() for name in (SUMS, PREDICTIONS)):
            continue
        parts, result = list(workdir.relative_to(folder).parts[:-1]), read_json(path)
        config = from_stored(read_json(workdir / CONFIG))
        if set(parts) & (OPTIONS.keys() - {option}):
            continue
        if result['method'] not in parts or result['method'] not in (BASELINE, METHOD):
            continue
        parts = [part for part in parts if part not in (result['method'], option)]
        task = ' '.join(parts) or short_name(config.target.name)
        seeds = found.setdefault(task, {}).setdefault(result['method'], {})
        seeds[result['seed']] = Finished(workdir, config)
    both = {
        task: group
        for task, group in found.items()
        if group.get(BASELINE, {}).keys() & group.get(METHOD, {}).keys()
    }
    if not both:
        raise DataError(
            f'{folder} has no finished runs of {BASELINE} and {METHOD} with the same seed: name a '
            'folder that `xmixup compare` or `python -m benchmarks.options` has filled'
        )
    return both


def page_of(task: str, group: Group) -> dict[str, Any]:
    """The values of gallery.html.

    Args:
      task: its name.
      group: its runs.

    Raises:
      DataError: the data cannot be opened, or the predictions of a run cannot be read.
    """
    seeds = sorted(group[BASELINE].keys() & group[METHOD].keys())
    run = group[METHOD][seeds[0]]
    results = {
        method: {seed: read_json(group[method][seed].workdir / RESULT) for seed in seeds}
        for method in (BASELINE, METHOD)
    }
    top1 = {
        name: {seed: 100 * result['top1'] for seed, result in each.items()}
        for name, each in results.items()
    }
    means = {name: float(np.mean(list(each.values()))) for name, each in top1.items()}
    difference, result = _difference(top1[METHOD], top1[BASELINE]), results[METHOD][seeds[0]]
    several = f'mean of {len(seeds)} seeds' if len(seeds) > 1 else 'one seed'
    interval = ', 95 % interval' if len(seeds) > 1 else ''
    return {
        'title': task,
        'sentence': (
            f'{METHOD} {means[METHOD]:.2f} %, {BASELINE} {means[BASELINE]:.2f} % top-1, {several}: '
            f'{difference} points{interval}'
        ),
        'key_facts': [
            ('training images', result['train_images']),
            ('classes', result['num_classes']),
            ('test images', result['test_images']),
            ('network', run.config.model.name),
            ('steps', result['steps']),
        ],
        'contents': [
            ('match', 'Class match'),
            ('inputs', 'Mixed images'),
            ('differences', 'Where they differ'),
        ],
        'pixelated': run.config.resize < 64,
        'seeds': len(seeds),
        'top1': means,
        'difference': difference,
        'pairs_open': MATCHES,
        **_pictures(run),
        'part': where_they_differ(group[BASELINE], group[METHOD], (BASELINE, METHOD), {}),
    }


def _difference(top1: dict[int, float], baseline: dict[int, float]) -> str:
    mean, half = paired_difference(top1, baseline)
    return f'{mean:+.2f}' + (f' ± {half:.2f}' if np.isfinite(half) else '')


def _pictures(run: Finished) -> dict[str, Any]:
    """The values of match.html and inputs.html."""
    data, rows = open_data(run.config), read_json(run.workdir / MATCH)
    assert data.source is not None  # the method pairs
    number = {name: c for c, name in enumerate(data.source.class_names)}
    match = ClassMatch(
        np.array([[number[name] for name in row['source']] for row in rows], np.int32),
        np.array([row['similarity'] for row in rows], np.float32),
    )
    sizes = Sizes(target=len(rows), source=len(match.selected), pretrained=0)
    constants = with_traced({}, run.config)
    inputs = first_inputs(make_task(run.config, sizes), constants, run.config, data, match)
    return match_part(match, data, run.config, MATCHES) | inputs_part(inputs, data, match)


def write_gallery(runs: Path, out: Path, option: str = BASE) -> list[dict[str, Any]]:
    """Writes index.html and a page for each task.

    Args:
      runs: the folder of the runs.
      out: the folder that gets the pages.
      option: see `find_runs`.

    Returns:
      the values of the pages, with 'link', the name of each file.

    Raises:
      DataError: there are no runs, or their data cannot be opened.
    """
    pages = []
    for task, group in find_runs(runs, option).items():
        name = re.sub(r'[^\w.=-]+', '_', task)
        page = page_of(task, group) | {'link': f'{name}.html'}
        _write(out / page['link'], 'gallery.html', page)
        pages.append(page)
    _write(
        out / 'index.html',
        'gallery_index.html',
        {'title': 'XMixup and fine-tuning', 'pixelated': False, 'pages': pages},
    )
    return pages


def _write(path: Path, template: str, values: dict[str, Any]) -> None:
    with atomic_write(path) as partial:
        text = _templates.get_template(template).render(**values, methods=(BASELINE, METHOD))
        partial.write_bytes(text.encode('utf-8', 'backslashreplace'))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--runs', required=True, type=Path)
    parser.add_argument('--out', required=True, type=Path)
    parser.add_argument('--option', default=BASE, choices=OPTIONS)
    args = parser.parse_args(argv)
    for page in write_gallery(args.runs, args.out, args.option):
        won, lost = (group['count'] for group in page['part']['images'])
        print(
            f'{page["title"]}: {BASELINE} {page["top1"][BASELINE]:.2f} %, '
            f'{METHOD} {page["top1"][METHOD]:.2f} %, {won} images won, {lost} lost'
            f'  ->  {args.out / page["link"]}'
        )
    print(f'->  {args.out / "index.html"}')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f'gallery: {error}')
