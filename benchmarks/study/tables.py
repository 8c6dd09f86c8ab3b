"""Makes the tables of RESULTS.md, and its figures, from runs.csv:

    python -m benchmarks.study.tables [--results=DIR]

Everything between `<!-- NAME -->` and `<!-- end -->` in RESULTS.md is replaced by the block NAME: a
table for each scale and each number of images a class that has runs.
"""

import argparse
import csv
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.study import figures, plan, statistics
from benchmarks.study.names import (
    BATCH_NORMS,
    COMBINATIONS,
    COMPARED,
    CONTROLS,
    NAMES,
    NORM_NAMES,
    PROBE,
    RATE_NAMES,
    STARTS,
)
from benchmarks.study.outcome import (
    Seeds,
    Study,
    compared,
    difference,
    differences,
    over_tasks,
    percent,
    ranks,
    studies,
)
from benchmarks.study.plan import Choice, Row
from xmixup_jax.cli.program import run_and_exit
from xmixup_jax.errors import DataError, UserError
from xmixup_jax.files import atomic_write
from xmixup_jax.report.tables import BASELINE, paired_difference

RESULTS = 'RESULTS.md'


def cell(mean: float, half: float | None = None, sign: bool = False) -> str:
    """'12.34 ± 0.56'; a difference is bold where its interval leaves out 0."""
    if not np.isfinite(mean):
        return ''
    text = f'{mean:+.2f}' if sign else f'{mean:.2f}'
    if half is None or not np.isfinite(half):
        return text
    text += f' ± {half:.2f}'
    return f'**{text}**' if sign and abs(mean) > half else text


def spread(top1: Seeds) -> str:
    """Mean ± standard deviation over seeds."""
    values = list(top1.values())
    if not values:
        return ''
    return cell(np.mean(values), np.std(values, ddof=1) if len(values) > 1 else None)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown; empty without rows."""
    if not rows:
        return ''
    lines = [header, ['---'] + ['---:'] * (len(header) - 1), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def _mean(by_task: dict[str, Seeds], names: list[str], sign: bool = False) -> str:
    """The mean over tasks, where there are values for all of them."""
    if len(by_task) < len(names):
        return ''
    mean, half, _ = over_tasks(by_task)
    return cell(mean, half if sign else None, sign)


def differences_table(study: Study, part: str = 'main') -> str:
    """Differences to fine-tuning, rank and time of each name."""
    names, order = study.tasks(part), ranks(study, part)
    rows = []
    for name in study.names(part):
        found = differences(study, name, part)
        line = [f'`{name}`', str(min(len(study.top1(task, name, part)) for task in names))]
        if name == BASELINE:
            line += [''] * (len(names) + 2)
        else:
            for task in names:
                tops = (study.top1(task, each, part) for each in (name, BASELINE))
                line.append(cell(*paired_difference(*tops), sign=True))
            whole = len(found) == len(names)
            line += [_mean(found, names, sign=True), '']
            if whole and np.isfinite(others := over_tasks(found)[2]):
                line[-1] = f'± {others:.2f}'
        line.append(f'{order[name]:.1f}' if name in order else '')
        ratios = [study.time_ratio(task, name, part) for task in names]
        ratios = [ratio for ratio in ratios if ratio is not None]
        line.append(f'{np.mean(ratios):.2f} ×' if ratios else '')
        rows.append(line)
    header = ['to fine-tuning', 'seeds', *names, 'mean', 'other tasks', 'mean rank', 'time']
    return table(header, rows)


def lite2_table(study: Study) -> str:
    """Differences to fine-tuning with EfficientNet-Lite2."""
    return differences_table(study, 'lite2')


def top1_table(study: Study) -> str:
    """Mean and standard deviation of top-1 by name and task."""
    names, rows = study.tasks(), []
    for name in study.names():
        tops = {task: study.top1(task, name) for task in names}
        present = {task: top1 for task, top1 in tops.items() if top1}
        rows.append([f'`{name}`', *map(spread, tops.values()), _mean(present, names)])
    return table(['top-1, %', *names, 'mean'], rows)


def batch_norm_table(study: Study) -> str:
    """Top-1 with each choice of batch norm, each at its own learning rate."""
    names = study.tasks('main', 'batch_norm')
    rows = []
    for name in NORM_NAMES:
        for norm in ('batch', 'frozen', 'mixed'):
            found = {
                task: study.select('main', 'batch_norm', task=task, name=name, batch_norm=norm)
                for task in names
            }
            if not any(found.values()):
                continue
            cells = [
                f'{spread(percent(runs))} ({runs[0]["learning_rate"]:g})' if runs else ''
                for runs in found.values()
            ]
            present = {task: percent(runs) for task, runs in found.items() if runs}
            rows.append([f'`{name}`', norm, _seeds(present), *cells, _mean(present, names)])
    return table(['top-1, % (learning rate)', 'batch norm', 'seeds', *names, 'mean'], rows)


def same_norm_table(study: Study) -> str:
    """Differences to fine-tuning with the same choice of batch norm."""
    names, rows = study.tasks('main', 'batch_norm'), []
    for norm in ('batch', 'frozen', 'mixed'):
        base = study.with_norm(BASELINE, norm)
        for name in (each for each in NORM_NAMES if each != BASELINE):
            cells = _gains(study.with_norm(name, norm), base, names)
            rows += [[f'`{name}`', norm, *cells]] if cells else []
    header = ['to fine-tuning with the same', 'batch norm', 'seeds', *names, 'mean']
    return table(header, rows)


def starts_table(study: Study) -> str:
    """What the choice of statistics and head is worth without mixing."""
    names, rows = study.tasks('main', 'batch_norm'), []
    for choice, base in STARTS:
        cells = _gains(study.with_norm(*choice), study.with_norm(*base), names)
        words = ' − '.join(f'`{name}`, {norm}' for name, norm in (choice, base))
        rows += [[words, *cells]] if cells else []
    return table(['', 'seeds', *names, 'mean'], rows)


def rates_table(study: Study) -> str:
    """Top-1 with frozen statistics at each learning rate, and the differences at equal rates."""
    parts, rows = ('main', 'batch_norm', 'rates'), []
    names, (base, *_) = study.tasks(*parts), RATE_NAMES
    for rate in sorted({row['learning_rate'] for row in study.select('rates')}):
        same, found = {'batch_norm': 'frozen', 'learning_rate': rate}, {}
        for name in dict.fromkeys([*RATE_NAMES, *study.names()]):
            runs = {task: study.select(*parts, name=name, task=task, **same) for task in names}
            found[name] = {task: percent(each) for task, each in runs.items() if each}
        for name in filter(found.get, RATE_NAMES):
            cells = [spread(found[name].get(task, {})) for task in names]
            line = [f'`{name}`', f'{rate:g}', _seeds(found[name]), *cells]
            rows.append([*line, _mean(found[name], names)])
        for name in list(found)[1:]:  # also those whose tuning chose this rate
            cells = _gains(found[name], found[base], names)
            rows += [[f'`{name}` − `{base}`', f'{rate:g}', *cells]] if cells else []
    return table(['top-1, %', 'learning rate', 'seeds', *names, 'mean'], rows)


def _gains(tops: dict[str, Seeds], base: dict[str, Seeds], names: list[str]) -> list[str]:
    """Seeds, differences by task and their mean; [] where a task has no common seed."""
    pairs = {task: (tops.get(task, {}), base.get(task, {})) for task in names}
    gains = {task: difference(*pair) for task, pair in pairs.items()}
    if not all(gains.values()):
        return []
    cells = [cell(*paired_difference(*pair), sign=True) for pair in pairs.values()]
    return [_seeds(gains), *cells, _mean(gains, names, sign=True)]


def _seeds(by_task: dict[str, Seeds]) -> str:
    """The number of seeds that all tasks have."""
    return str(len(set.intersection(*map(set, by_task.values()))))


def tuned_table(study: Study) -> str:
    """The best option with each choice of batch norm by name and task, and its top-1 on held-out
    images; bold is what tuning chose."""
    names, rows = study.tasks('tune'), []
    for name, entry in NAMES.items():
        line = []
        for task in names if name != PROBE and not entry.tuned_as else ():
            try:
                line.append(_tuned(name, Choice(study.scale, task, study.shots), study))
            except UserError:  # its tuning has not finished
                line.append('')
        if any(line):
            coefficient = f', `{entry.coefficient[0]}`' if entry.coefficient else ''
            rows.append([f'`{name}`{coefficient}', *line])
    return table(['learning rate, batch norm, coefficient: top-1', *names], rows)


def _tuned(name: str, choice: Choice, study: Study) -> str:
    chosen = plan.chosen_option(name, choice, study.found)
    options = [
        plan.with_norm(name, norm, choice, study.found)
        for norm in dict.fromkeys((*NAMES[name].batch_norms, chosen['batch_norm']))
    ]
    cells = []
    for option in options:
        words = ' '.join(
            f'{value:g}' if isinstance(value, int | float) else value for value in option.values()
        )
        text = f'{words}: {100 * choice.top1(name, option, study.found):.1f}'
        cells.append(f'**{text}**' if option == chosen else text)
    return ' · '.join(cells)


def fit_table(study: Study) -> str:
    """Training accuracy of fine-tuning in its last steps, on the images as the network saw them."""
    names, rows = study.tasks(), []
    for name in (BASELINE, 'finetune_warm'):
        line = []
        for task in names:
            runs = study.select('main', task=task, name=name)
            if runs:
                top1 = np.mean([row['train_top1'] for row in runs])
                first = runs[0]
                words = f'{first["steps"]:,} steps, {first["train_images"]:,} images'
                line.append(f'{100 * top1:.1f} % ({words})')
            else:
                line.append('')
        if any(line):
            rows.append([f'`{name}`', *line])
    return table(['training accuracy', *names], rows)


def xmixup_table(study: Study) -> str:
    """Each variant of XMixup, to what it varies."""
    names, rows = study.tasks(), []
    for name, base in COMPARED.items():
        found = compared(study, name)
        if found:
            cells = [
                cell(*paired_difference(*found[task]), sign=True) if task in found else ''
                for task in names
            ]
            gains = {task: difference(*tops) for task, tops in found.items()}
            rows.append([f'`{name}` − `{base}`', *cells, _mean(gains, names, sign=True)])
    return table(['', *names, 'mean'], rows)


def controls_table(study: Study) -> str:
    """Whether methods that are known to gain do so here, under each choice of batch norm."""
    names, rows = study.tasks('main', 'batch_norm'), []
    for norm, (name, published) in itertools.product(BATCH_NORMS, CONTROLS.items()):
        base, tops = study.with_norm(BASELINE, norm), study.with_norm(name, norm)
        if not names or any(task not in tops or task not in base for task in names):
            continue
        found = {task: difference(tops[task], base[task]) for task in names}
        mean, half, _ = over_tasks(found)
        of_tasks = [over_tasks({task: seeds})[:2] for task, seeds in found.items()]
        signs = [np.sign(gain) * (abs(gain) > width) for gain, width in of_tasks]
        won, lost = signs.count(1), signs.count(-1)
        verdict = 'cannot be told' if not abs(mean) > half else 'wins' if mean > 0 else 'loses'
        count = f'{won} won, {lost} lost of {len(names)}'
        gain = cell(mean, half, sign=True)
        rows.append([f'`{name}`', published, norm, gain, count, verdict])
    return table(['', 'published gain', 'batch norm', 'mean gain here', 'tasks', 'verdict'], rows)


def combine_table(study: Study) -> str:
    """Top-1 on held-out images, and the differences to fine-tuning with a warm head."""
    names, rows = study.tasks('combine'), []
    base = {task: study.top1(task, 'finetune_warm', 'combine', 'as tuned') for task in names}
    options = {PROBE: ('',), **COMBINATIONS}
    for name, option in ((name, option) for name, each in options.items() for option in each):
        tops = {task: study.top1(task, name, 'combine', option) for task in names}
        present = {task: top1 for task, top1 in tops.items() if top1}
        if not present:
            continue
        found = {task: difference(tops[task], base[task]) for task in names}
        found = {task: seeds for task, seeds in found.items() if seeds}
        line = [f'`{name}`', option, *map(spread, tops.values()), _mean(present, names)]
        is_base = tops == base
        rows.append([*line, '' if is_base else _mean(found, names, sign=True)])
    return table(['top-1, %', '', *names, 'mean', 'to `finetune_warm`'], rows)


def compute_table(study: Study) -> str:
    """Runs and hours of each part."""
    rows = []
    for part in plan.PARTS:
        runs = study.select(part)
        if runs:
            devices = ', '.join(sorted({row['device'] for row in runs}))
            hours = sum(row['seconds'] for row in runs) / 3600
            rows.append([part, f'{len(runs):,}', f'{hours:.1f}', devices])
    return table(['part', 'runs', 'hours of one process', 'device'], rows)


TABLES: dict[str, tuple[Callable[[Study], str], tuple[str, ...]]] = {
    'differences': (differences_table, ('main',)),
    'top1': (top1_table, ('main',)),
    'batch_norm': (batch_norm_table, ('main', 'batch_norm')),
    'same_norm': (same_norm_table, ('main', 'batch_norm')),
    'starts': (starts_table, ('main', 'batch_norm')),
    'rates': (rates_table, ('main', 'batch_norm', 'rates')),
    'xmixup': (xmixup_table, ('main',)),
    'controls': (controls_table, ('main', 'batch_norm')),
    'combine': (combine_table, ('combine',)),
    'lite2': (lite2_table, ('lite2',)),
    'tuned': (tuned_table, ('tune',)),
    'fit': (fit_table, ('main',)),
    'compute': (compute_table, plan.PARTS),
}
"""Name of a block to the function that makes its table, and the parts whose rows it reads."""


def statistics_block(path: Path) -> str:
    """Top-1 of a linear probe by the statistics of batch norm, from `statistics.FILE`."""
    if not path.exists():
        return 'No runs yet.'
    with path.open() as file:
        rows = list(csv.DictReader(file))
    blocks = []
    for scale in dict.fromkeys(row['scale'] for row in rows):
        found: dict[str, dict[str, Seeds]] = {}
        for row in (row for row in rows if row['scale'] == scale):
            by_task = found.setdefault(row['statistics'], {})
            by_task.setdefault(row['task'], {})[int(row['seed'])] = 100 * float(row['top1'])
        names = list(found[statistics.PRETRAINED])
        lines = [
            [kind, *(spread(tops[task]) for task in names), _mean(tops, names)]
            for kind, tops in found.items()
        ]
        seeds = ', '.join(map(str, found[statistics.PRETRAINED][names[0]]))
        header = ['top-1 of a linear probe, %', *names, 'mean']
        blocks.append(f'*{scale} scale, seeds {seeds}*\n\n{table(header, lines)}')
    return '\n\n'.join(blocks)


def block(name: str, rows: list[Row]) -> str:
    """The tables of a block, each under its title."""
    make, parts = TABLES[name]
    tables = [(study.title(*parts), make(study)) for study in studies(rows)]
    found = [f'*{title}*\n\n{text}' for title, text in tables if text]
    return '\n\n'.join(found) or 'No runs yet.'


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='tables', add_help=False)  # `run_and_exit` gives help
    parser.add_argument('--results', default=Path(__file__).parent, type=Path)
    folder = parser.parse_args(argv[1:]).results
    rows = plan.read(folder / plan.RUNS)
    if not rows:
        raise DataError(f'{folder / plan.RUNS} has no rows: first run benchmarks.study.run')
    page = folder / RESULTS
    if page.exists():
        text = page.read_text()
        blocks = {name: block(name, rows) for name in TABLES}
        blocks['statistics'] = statistics_block(folder / statistics.FILE)
        for name, content in blocks.items():
            new = f'<!-- {name} -->\n\n{content}\n\n<!-- end -->'
            text = re.sub(f'<!-- {name} -->.*?<!-- end -->', lambda _, n=new: n, text, flags=re.S)
        with atomic_write(page) as partial:
            partial.write_text(text)
    else:
        for name in TABLES:
            print(f'{name}\n\n{block(name, rows)}\n')
    figures.write(folder, studies(rows))


if __name__ == '__main__':
    run_and_exit(run, sys.argv)
