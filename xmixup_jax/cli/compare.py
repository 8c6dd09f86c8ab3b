r"""Compares methods over several seeds, or two finished runs.

    xmixup compare --config=configs/digits.py --methods=finetune,xmixup --workdir=runs/compare
    xmixup compare RUN_A RUN_B

The first form trains and tests every method with every seed:

  --config=NAME, --config.KEY=VALUE
                       the experiment and its values, as for `xmixup train`
  --workdir=DIR        the folder of the comparison (required)
  --methods=A,B,...    built-in methods, or files that define one (default: all, the built-in ones)
  --seeds=0,1,...      seeds (default: 0,1,2,3,4)
  --sample_rates=0.15,0.3,...
                       trains on each of these shares of each class's training images
                       (default: the training images that the configuration selects)
  --jobs=N             makes N runs at once (default: 1), which share the GPU or divide the CPU
                       cores; each prints to log.txt in its own folder. Not available on TPUs

The folder gets comparison.csv (one row per run), comparison.md (mean and standard deviation, paired
differences to fine-tuning, cost), comparison.png, and report.html: accuracy against training time,
the classes and test images on which the methods differ, and links to the reports of the runs. Each
run has its own folder there. The same command resumes a comparison that was stopped, and extends a
finished one by methods, seeds or sample rates.

The second form trains nothing. It compares two finished runs that were tested on the same images,
for example two methods, two seeds or two values of an option. It prints both accuracies with the p
value of McNemar's test, and writes a page with the classes and images that only one of the networks
gets right, and the values that differ between the configurations:

  --output=FILE        the page (default: differences.html in RUN_B)

Exit codes: 0 success; 1 some runs failed (comparison.csv has the reasons) or something is missing;
2 invalid configuration; 75 stopped by a signal and saved: run the same command to resume.

"""

import itertools
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax

from xmixup_jax.checks import validate
from xmixup_jax.cli.flags import parse_flags
from xmixup_jax.cli.program import Parser, setup
from xmixup_jax.cli.report import check_finished, check_whole
from xmixup_jax.compute import cost
from xmixup_jax.config import from_stored
from xmixup_jax.data.selection import Opened, train_and_test
from xmixup_jax.errors import ConfigError, DataError, UserError
from xmixup_jax.files import CONFIG, DATA, REPORT, RESULT, read_json, write_json
from xmixup_jax.methods import METHODS
from xmixup_jax.methods.find import method_name
from xmixup_jax.processes import connect, is_first
from xmixup_jax.report import tables
from xmixup_jax.report.comparison import pair_sentence, write_pair, write_report
from xmixup_jax.report.predictions import Finished
from xmixup_jax.run.data_identity import difference
from xmixup_jax.run.finished import measure
from xmixup_jax.run.grid import Run, rows_of
from xmixup_jax.run.inputs import check_inputs
from xmixup_jax.run.workers import check_jobs, disable_preallocation, rows_in_parallel
from xmixup_jax.text import one_line

log = logging.getLogger('xmixup_jax')

DIFFERENCES = 'differences.html'


def parse(argv: list[str]) -> tuple[list[Run], Path, int]:
    """The runs that the command line asks for, the folder of the comparison, and the jobs."""
    parser = Parser('compare')
    parser.add_argument('--workdir', required=True, type=Path)
    parser.add_argument('--methods', default='all')
    parser.add_argument('--seeds', default='0,1,2,3,4', type=_numbers(int))
    parser.add_argument('--sample_rates', default=[None], type=_numbers(float))
    parser.add_argument('--jobs', default=1, type=int)
    args, config_args = parser.parse_known_args(connect(argv)[1:])
    if args.jobs < 1:
        parser.error(f'--jobs={args.jobs}: must be at least 1')
    if args.jobs > 1:
        disable_preallocation()
    check_jobs(args.jobs)
    methods = list(METHODS) if args.methods == 'all' else args.methods.split(',')
    runs = []
    for rate, seed, method in itertools.product(args.sample_rates, args.seeds, methods):
        config, _ = parse_flags([argv[0], *config_args, f'--config.method={method}'], methods)
        config.seed, name = seed, method_name(method)
        folder = args.workdir
        if rate is not None:
            config.target.shots, config.target.sample_rate = 0, rate
            folder = folder / f'sample_rate={rate:g}'
        validate(config, jax.device_count())
        if not config.target.test_split:
            raise ConfigError('compare needs images to test on: give --config.target.test_split')
        labels = {'sample_rate': rate, 'method': name, 'seed': seed}
        runs.append(Run(config, folder / name / f'seed{seed}', labels))
    return runs, args.workdir, args.jobs


def _numbers(kind):
    def parse_list(text: str) -> list:
        return [kind(part) for part in text.split(',')]

    parse_list.__name__ = f'comma-separated list of {kind.__name__}'
    return parse_list


def compare(runs: list[Run], workdir: Path, jobs: int = 1) -> list[Run]:
    """Makes the runs that are not finished, and writes the tables; the .csv after each run.

    Returns:
      the runs that failed.

    Raises:
      Interrupted: by a signal; what is finished is in the tables.
    """
    for run in {run.labels['method']: run for run in runs}.values():
        check_inputs(run.config)
    rows: dict[int, tables.Row] = {}
    try:
        for number, row in _rows(runs, jobs):
            rows[number] = row
            if is_first():
                tables.write_csv(workdir, [rows[each] for each in sorted(rows)])
    finally:
        if rows and is_first():
            write_outcome(runs, workdir, rows, {})
    failed = [run for number, run in enumerate(runs) if 'error' in rows[number]]
    # Steps are timed, and their memory is read, in one process.
    costs = step_costs(runs, failed, workdir) if jax.process_count() == 1 else {}
    if is_first():
        write_outcome(runs, workdir, rows, costs, finished=True)
    return failed


def _rows(runs: list[Run], jobs: int) -> Iterator[tuple[int, tables.Row]]:
    if jobs == 1:
        return enumerate(rows_of(runs, 'comparison'))
    return rows_in_parallel(runs, 'comparison', jobs, partial(setup, runs[0].config.cache_dir))


def write_outcome(
    runs: list[Run],
    workdir: Path,
    rows: dict[int, tables.Row],
    costs: dict[str, cost.StepCost],
    finished: bool = False,
) -> None:
    """Writes the tables and the report.

    Args:
      runs: of the comparison.
      workdir: its folder.
      rows: by the number of the run; some may be missing.
      costs: of a step of each method.
      finished: whether the report shows where the methods differ.
    """
    numbers = sorted(rows)
    in_order = [rows[number] for number in numbers]
    tables.write(workdir, in_order, costs)
    folders = [str(runs[number].workdir.relative_to(workdir)) for number in numbers]
    configs = [runs[number].config for number in numbers] if finished else []
    write_report(workdir, runs[0].config, in_order, folders, costs, configs)


def step_costs(runs: list[Run], failed: list[Run], workdir: Path) -> dict[str, cost.StepCost]:
    """The cost of a step of each method; measured again only when the methods have changed."""
    first: dict[str, Run] = {}
    for run in runs:
        if run not in failed:
            first.setdefault(run.labels['method'], run)
    path = workdir / 'step_costs.json'
    try:
        stored = {name: cost.StepCost(**v) for name, v in json.loads(path.read_text()).items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        stored = {}  # none, damaged, or an earlier version's
    if list(stored) == list(first):
        return stored
    costs = measure(
        {name: run.config for name, run in first.items()},
        {name: run.workdir for name, run in first.items()},
    )
    write_json(path, {name: value._asdict() for name, value in costs.items()})
    return costs


def compare_two(first: Path, second: Path, output: Path | None) -> None:
    """Prints how two finished runs differ, and writes a page that shows it.

    Args:
      first, second: their folders.
      output: the page; differences.html in the second folder by default.

    Raises:
      DataError: a run is not finished, is damaged or had no test images, or its images cannot be
        opened.
      ConfigError: the runs have other classes, or were tested on other images, or the images have
        changed since.
    """
    for workdir in (first, second):
        check_finished(workdir)
        check_whole(workdir)
    stored = _same_test(first, second)
    ours, theirs = (
        Finished(each, from_stored(read_json(each / CONFIG))) for each in (second, first)
    )
    setup(ours.config.cache_dir)
    opened: Opened = {}
    _, test = train_and_test(ours.config.target, ours.config, opened)
    words = difference(stored, None if test is None else test.summary())
    if words:
        raise ConfigError(
            f'the test images of {one_line(second)} are no longer those that it was tested on '
            f'({words}): restore them'
        )
    output = output or second / DIFFERENCES
    part = write_pair(output, theirs, ours, _names(first, second), opened)
    print(f'{one_line(pair_sentence(part))}  ->  {one_line(output)}')


def _same_test(first: Path, second: Path) -> dict[str, Any]:
    """`Records.summary` of the test images of two runs, which are the same."""
    tests = []
    for workdir in (first, second):
        data = read_json(workdir / DATA)
        if data['test'] is None:
            raise DataError(
                f'{one_line(workdir)} had no test images (config.target.test_split): nothing to '
                'compare'
            )
        tests.append(data['test'])
    if tests[0]['class_names'] != tests[1]['class_names']:
        what = 'have different classes'
    else:
        what = 'were tested on different images'
    words = difference(*tests)
    if words:
        raise ConfigError(
            f'{one_line(first)} and {one_line(second)} {what} ({words}): name two runs with the '
            'same test images'
        )
    return tests[1]


def _names(first: Path, second: Path) -> tuple[str, str]:
    """The runs' methods if they differ, else their folders."""
    a, b = (read_json(each / RESULT)['method'] for each in (first, second))
    return (a, b) if a != b else (one_line(first), one_line(second))


def run(argv: list[str]) -> None:
    """Parses the flags and compares: methods, or the two runs that the first words name."""
    if argv[1:] and not argv[1].startswith('-'):
        parser = Parser('compare')
        parser.add_argument('runs', nargs='+', type=Path)
        parser.add_argument('--output', type=Path)
        args = parser.parse_args(argv[1:])
        if len(args.runs) != 2:
            parser.error(f'name two run folders, not {len(args.runs)}')
        first, second = args.runs
        compare_two(first, second, args.output)
        return
    runs, workdir, jobs = parse(argv)
    setup(runs[0].config.cache_dir)
    failed = compare(runs, workdir, jobs)
    if is_first():
        print((workdir / tables.MARKDOWN).read_text(encoding='utf-8'))
        print(f'->  {one_line(workdir / REPORT)}, {tables.MARKDOWN}, {tables.CSV}, {tables.FIGURE}')
    if failed:
        raise UserError(f'{len(failed)} of {len(runs)} runs failed: {tables.CSV} says why')
