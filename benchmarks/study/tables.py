"""Makes the tables of RESULTS.md, and its figures, of runs.csv and curves.csv:

    python -m benchmarks.study.tables [--results=DIR]

Everything between `<!-- NAME -->` and `<!-- end -->` in RESULTS.md is replaced by the table NAME.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.study import figures, plan, tasks
from benchmarks.study.plan import FEW, Row
from xmixup_jax.errors import DataError
from xmixup_jax.files import whole_file
from xmixup_jax.main import ended
from xmixup_jax.methods import METHODS
from xmixup_jax.tables import BASELINE, paired_difference, time_ratio, training_seconds

RESULTS = 'RESULTS.md'
Seeds = dict[int, float]


class Study:
    """The rows of runs.csv, by what is asked of them."""

    def __init__(self, rows: list[Row]):
        self.rows = [row for row in rows if not row['error']]

    def select(self, part: str, rate: float = FEW) -> list[Row]:
        parts = ('main', 'rates') if part == 'rates' else (part,)
        return [r for r in self.rows if r['part'] in parts and r['sample_rate'] == rate]

    def top1(self, task: str, name: str, part: str = 'main', rate: float = FEW) -> Seeds:
        """Top-1 in % by seed; empty if there are no such runs."""
        return {
            row['seed']: 100 * row['top1']
            for row in self.select(part, rate)
            if (row['task'], row['name']) == (task, name)
        }

    def time_ratio(self, task: str, name: str) -> float | None:
        """Median training time relative to fine-tuning's."""
        seconds: dict[str, Seeds] = {name: {}, BASELINE: {}}
        for row in self.select('main'):
            if row['task'] == task and row['name'] in seconds:
                seconds[row['name']][row['seed']] = training_seconds(row)
        return time_ratio(seconds[name], seconds[BASELINE])

    def names(self, part: str = 'main') -> list[str]:
        """Of methods that have been run, in the registry's order."""
        present = {row['name'] for row in self.select(part)}
        return [name for name in (*METHODS, *plan.WARM) if name in present]

    def rates(self) -> list[float]:
        """Sample rates other than FEW."""
        return sorted({row['sample_rate'] for row in self.rows if row['part'] == 'rates'})

    def tasks(self, part: str = 'main', rate: float = FEW) -> list[str]:
        present = {row['task'] for row in self.select(part, rate)}
        return [task for task in tasks.TASKS if task in present]


def over_tasks(differences: dict[str, Seeds]) -> tuple[float, float, float]:
    """Mean over tasks of a method's paired differences.

    Args:
      differences: by task, then by seed.

    Returns:
      (mean; half its 95 % interval for these tasks and other seeds, from the means over tasks of
      each seed; half its 95 % interval for other tasks, from the means over seeds of each task),
      Student's t.
    """
    seeds = sorted(set.intersection(*(set(each) for each in differences.values())))
    table = np.array([[each[seed] for seed in seeds] for each in differences.values()])
    return float(table.mean()), _half(table.mean(0)), _half(table.mean(1))


def _half(values: np.ndarray) -> float:
    if len(values) < 2:
        return np.nan
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def differences(
    study: Study, name: str, part: str = 'main', rate: float = FEW, base: str = BASELINE
) -> dict[str, Seeds]:
    """Differences to `base` with the same task and seed, of the tasks that have both."""
    found = {}
    for task in study.tasks(part, rate):
        top1, base_top1 = (study.top1(task, each, part, rate) for each in (name, base))
        both = top1.keys() & base_top1.keys()
        if both:
            found[task] = {seed: top1[seed] - base_top1[seed] for seed in both}
    return found


def ranks(study: Study) -> dict[str, float]:
    """Mean rank by mean top-1 over the tasks that all methods were run on; 1 is the best."""
    names = study.names()
    table = [
        [np.mean(list(study.top1(task, name).values())) for name in names]
        for task in study.tasks()
        if all(study.top1(task, name) for name in names)
    ]
    if not table:
        return {}
    mean = stats.rankdata(-np.array(table), axis=1).mean(0)
    return dict(zip(names, mean, strict=True))


def cell(mean: float, half: float | None = None, sign: bool = False) -> str:
    """'12.34 ± 0.56'; a difference is bold where its interval leaves out 0."""
    text = f'{mean:+.2f}' if sign else f'{mean:.2f}'
    if half is None or not np.isfinite(half):
        return text
    text += f' ± {half:.2f}'
    return f'**{text}**' if sign and abs(mean) > half else text


def spread(top1: Seeds) -> str:
    """Mean ± standard deviation over seeds."""
    values = list(top1.values())
    return (
        cell(np.mean(values), np.std(values, ddof=1) if len(values) > 1 else None) if top1 else ''
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return 'No runs yet.'
    lines = [header, ['---'] + ['---:'] * (len(header) - 1), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def top1_table(study: Study) -> str:
    names = study.tasks()
    rows = [
        [f'`{name}`', *(spread(study.top1(task, name)) for task in names)] for name in study.names()
    ]
    return table(['top-1, %', *names], rows)


def differences_table(study: Study) -> str:
    names, order = study.tasks(), ranks(study)
    rows = []
    for name in study.names():
        found = differences(study, name)
        ratios = [study.time_ratio(task, name) for task in names]
        ratios = [ratio for ratio in ratios if ratio]
        line = [f'`{name}`']
        for task in names if name != BASELINE else ():
            line.append(_difference(study.top1(task, name), study.top1(task, BASELINE)))
        if name == BASELINE:
            line += [''] * (len(names) + 2)
        elif len(found) == len(names):
            mean, seeds, others = over_tasks(found)
            line += [cell(mean, seeds, sign=True), f'± {others:.2f}']
        else:
            line += ['', '']
        line.append(f'{order[name]:.1f}' if order else '')
        line.append(f'{np.mean(ratios):.2f} ×' if ratios else '')
        rows.append(line)
    header = ['to fine-tuning', *names, 'mean', 'other tasks', 'mean rank', 'training time']
    return table(header, rows)


def _difference(top1: Seeds, base: Seeds) -> str:
    return cell(*paired_difference(top1, base), sign=True) if top1.keys() & base.keys() else ''


def warm_table(study: Study) -> str:
    """What a head that begins as a linear classifier brings, and what mixing brings to it."""
    names, rows = study.tasks(), []
    for name, base in (
        ('xmixup', BASELINE),
        ('finetune_warm', BASELINE),
        ('xmixup_warm', 'xmixup'),
        ('xmixup_warm', 'finetune_warm'),
    ):
        found = differences(study, name, base=base)
        line = [f'`{name}` − `{base}`']
        line += [_difference(study.top1(task, name), study.top1(task, base)) for task in names]
        rows.append([*line, cell(*over_tasks(found)[:2], sign=True) if found else ''])
    return table(['', *names, 'mean'], rows)


def tuned_table(study: Study) -> str:
    """Top-1 on images held out of the training set for each value of each grid."""
    names = study.tasks('tune')
    found = {(row['task'], row['name']): 100 * row['top1'] for row in study.select('tune')}
    rows = []
    for key, values in plan.GRIDS.values():
        cells = []
        for task in names:
            each = {value: found.get((task, plan.text({key: value}))) for value in values}
            chosen = max(each, key=lambda value: each[value] or 0.0)
            words = [
                f'**{value:g}: {top1:.1f}**' if value == chosen else f'{value:g}: {top1:.1f}'
                for value, top1 in each.items()
                if top1 is not None
            ]
            cells.append(' · '.join(words))
        if any(cells):
            rows.append([f'`{key}`', *cells])
    return table(['coefficient', *names], rows)


def fit_table(study: Study) -> str:
    """Training accuracy of the last steps, on the images as the network saw them."""
    names = study.tasks()
    rows = []
    for rate in plan.STEPS:
        runs = [row for row in study.select('rates', rate) if row['name'] == BASELINE]
        line = [f'{rate:.0%}', f'{plan.STEPS[rate]:,}']
        for task in names:
            of_task = [row for row in runs if row['task'] == task]
            if of_task:
                images = int(of_task[0]['train_images'])
                top1 = np.mean([row['train_top1'] for row in of_task])
                line.append(f'{100 * top1:.1f} % ({images:,})')
            else:
                line.append('')
        if runs:
            rows.append(line)
    return table(['sample rate', 'steps', *names], rows)


def rates_table(study: Study) -> str:
    names, rows = study.tasks(), []
    for rate in plan.STEPS if study.rates() else ():
        rows += [[f'{rate:.0%}', *line] for line in _to_baseline(study, names, 'rates', rate)]
    return table(['sample rate', '', *names, 'mean'], rows)


def large_table(study: Study) -> str:
    """Differences to fine-tuning with the larger network."""
    names = study.tasks('large')
    return table(['', *names, 'mean'], _to_baseline(study, names, 'large'))


def _to_baseline(study: Study, names: list[str], part: str, rate: float = FEW) -> list[list[str]]:
    """A line for each method: its differences to fine-tuning by task, and their mean."""
    rows = []
    for name in dict.fromkeys(row['name'] for row in study.select(part, rate)):
        if part == 'rates' and name not in plan.IN_RATES:  # the smallest rate has all methods
            continue
        line = [f'`{name}`']
        for task in names:
            top1, base = (study.top1(task, each, part, rate) for each in (name, BASELINE))
            line.append(spread(top1) if name == BASELINE else _difference(top1, base))
        found = differences(study, name, part, rate)
        whole = name != BASELINE and len(found) == len(names)
        rows.append([*line, cell(*over_tasks(found)[:2], sign=True) if whole else ''])
    return rows


def ablation_table(study: Study) -> str:
    """Differences to `xmixup` as tuned, and to fine-tuning."""
    rows = []
    for title, variants in plan.ABLATIONS.items():
        for changes in variants:
            name = plan.text(changes)
            line = [title, f'`{name}`']
            tops = {task: study.top1(task, name, 'ablation') for task in plan.ABLATED}
            if not any(tops.values()):
                continue
            for task, top1 in tops.items():
                line.append(spread(top1))
                line += [_difference(top1, study.top1(task, each)) for each in ('xmixup', BASELINE)]
            rows.append(line)
    header = ['', 'changed']
    for task in plan.ABLATED:
        header += [task, 'to `xmixup`', 'to fine-tuning']
    return table(header, rows)


def variants_table(study: Study) -> str:
    """Differences to fine-tuning, on images held out of the training set."""
    names = study.tasks('variants')
    return table(['', *names, 'mean'], _to_baseline(study, names, 'variants'))


def length_table(study: Study) -> str:
    """Differences to fine-tuning of as many steps, on images held out of the training set."""
    rows = []
    for steps, name in sorted({(int(row['steps']), row['name']) for row in study.select('length')}):
        baseline = f'{BASELINE} steps={steps}'
        line = [f'{steps:,}', f'`{name.split()[0]}`']
        for task in plan.VARIED:
            top1, base = (study.top1(task, each, 'length') for each in (name, baseline))
            line.append(spread(top1) if name == baseline else _difference(top1, base))
        rows.append(line)
    return table(['steps', '', *plan.VARIED], rows)


def compute_table(study: Study) -> str:
    rows = []
    for part in plan.PARTS:
        runs = [row for row in study.rows if row['part'] == part]
        if runs and part not in plan.LARGE:  # whose runs share a GPU
            hours = sum(row['seconds'] for row in runs) / 3600
            rows.append([part, f'{len(runs):,}', f'{hours:.1f}'])
    return table(['part', 'runs', 'hours of one core'], rows)


TABLES: dict[str, Callable[[Study], str]] = {
    'top1': top1_table,
    'differences': differences_table,
    'warm': warm_table,
    'tuned': tuned_table,
    'fit': fit_table,
    'rates': rates_table,
    'ablation': ablation_table,
    'variants': variants_table,
    'length': length_table,
    'large': large_table,
    'compute': compute_table,
}


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='tables', add_help=False)  # `ended` gives help
    parser.add_argument('--results', default=Path(__file__).parent, type=Path)
    folder = parser.parse_args(argv[1:]).results
    rows = plan.read(folder / plan.RUNS)
    if not rows:
        raise DataError(f'{folder / plan.RUNS} has no rows: first run benchmarks.study.run')
    study = Study(rows)
    page = folder / RESULTS
    if page.exists():
        text = page.read_text()
        for name, make in TABLES.items():
            block = f'<!-- {name} -->\n\n{make(study)}\n\n<!-- end -->'
            text = re.sub(f'<!-- {name} -->.*?<!-- end -->', lambda _, b=block: b, text, flags=re.S)
        with whole_file(page) as partial:
            partial.write_text(text)
    else:
        for name, make in TABLES.items():
            print(f'{name}\n\n{make(study)}\n')
    figures.write(folder, study, plan.read(folder / plan.CURVES))


if __name__ == '__main__':
    ended(run, sys.argv)
