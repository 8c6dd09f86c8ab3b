"""The study's plan, tables and figures, and one of its runs with a network of two stages."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from benchmarks.study import figures, outcome, plan, probe, run, statistics, tables, tasks
from benchmarks.study.names import CONTROLS, NAMES, PROBE
from benchmarks.study.plan import Case, Choice, Wanted
from benchmarks.study.tasks import ALL, FEW
from xmixup_jax import config as config_lib
from xmixup_jax.checks import validate
from xmixup_jax.compute.reestimation import with_clean_statistics
from xmixup_jax.devices import replicate
from xmixup_jax.errors import DataError, UserError
from xmixup_jax.methods import METHODS
from xmixup_jax.run.inputs import open_data

DATA, CACHE = Path('data'), Path('cache')


def row(name='finetune', task='food10', seed=0, top1=0.5, **others):
    """A row of runs.csv, as `plan.read` returns it."""
    values = {'scale': 'cpu', 'part': 'main', 'shots': FEW, 'option': '', 'batch_norm': 'batch'}
    values |= {'learning_rate': 0.01, 'train_top1': 1.0, 'steps': 100, 'train_images': 60}
    values |= {'test_images': 1000, 'seconds': 10.0, 'first_step_seconds': 2.0, 'device': '1 x cpu'}
    return (
        values | {'error': ''} | {'name': name, 'task': task, 'seed': seed, 'top1': top1} | others
    )


def cases_of(wanted):
    """All groups in order; every run sees the rows of earlier ones, and later runs are better."""
    found, groups = {}, []
    for phase in plan.phases(wanted):
        for group in phase(found):
            groups.append(group)
            for case in group:
                labels = dict(zip(plan.KEY, case.key, strict=True))
                found[case.key] = row(**labels, top1=0.1 + len(found) / 1e5)
    return groups


@pytest.fixture(scope='module', params=[pytest.param('full', marks=pytest.mark.slow), 'cpu'])
def groups(request):
    return cases_of(Wanted(request.param))


def test_every_case_is_one_run_with_a_possible_configuration(groups):
    keys, configurations = set(), set()
    for case in (case for group in groups for case in group):
        assert case.key not in keys
        keys.add(case.key)
        config = case.configuration(DATA, CACHE)
        if case.seed == 0:
            validate(config, 1)
        rest = case.part in ('tune', 'combine', 'lite2_tune')
        assert config.target.test_split == ('rest' if rest else 'test')
        held_out = case.shots == ALL and rest
        assert (config.target.shots, config.target.sample_rate) == (
            case.shots,
            0.8 if held_out else 1.0,
        )
        assert (config.model.name == 'efficientnet_lite2') == case.part.startswith('lite2')
        # No two names of a part stand for the same run.
        same = (case.part, case.name == PROBE, config_lib.digest(config))
        assert same not in configurations, case.key
        configurations.add(same)
    main = {(case.name, case.task, case.seed) for g in groups for case in g if case.part == 'main'}
    of_scale = tasks.SCALES[groups[0][0].scale].tasks
    assert {(name, task, 4) for name in NAMES for task in of_scale} <= main


def test_every_method_has_a_name():
    assert {entry.changes['method'] for entry in NAMES.values()} == set(METHODS)


def test_runs_of_a_group_share_their_program(groups):
    for group in groups:
        values = [config_lib.experiment_values(c.configuration(DATA, CACHE)) for c in group]
        same = {'seed': 0, 'optimizer.learning_rate': 1.0}
        method = group[0].changes['method']
        same |= {f'{method}.{key}': 1 for key, o in METHODS[method].options.items() if o.traced}
        assert all(each | same == values[0] | same for each in values)


def test_a_study_that_is_cut_off_has_whole_rows(groups):
    order = [(g[0].shots, g[0].name, g[0].part) for g in groups if g[0].part in ('tune', 'main')]
    blocks = [each for i, each in enumerate(order) if i == 0 or each != order[i - 1]]
    assert len(blocks) == len(set(blocks))  # no block is taken up twice
    own = [(shots, name) for shots, name, part in blocks if part == 'main']
    assert [name for shots, name in own if shots == FEW] == list(NAMES)
    for shots, name, part in blocks:
        if part == 'tune':
            assert blocks[blocks.index((shots, name, part)) + 1] == (shots, name, 'main')


def test_every_name_has_the_same_budget(groups):
    runs = {}
    for case in (case for group in groups for case in group if case.part == 'tune'):
        assert case.seed == 0
        runs.setdefault((case.shots, case.task, case.name), []).append(case.option)
    full = groups[0][0].scale == 'full'
    for (_, _, name), options in runs.items():
        norms = 1 if name == 'stochnorm' else 2
        expected = 3 * norms + 2 * bool(NAMES[name].coefficient)
        assert len(options) == (expected if full else 2 * norms)


def tuned(best, name='l2sp', **others):
    """Rows of all options that can be tried; `best` gives the top-1 of some of them."""
    norms, rates = ('batch', 'frozen', 'mixed'), (0.0003, 0.001, 0.003, 0.01, 0.03)
    options = [f'optimizer.learning_rate={r} batch_norm={n}' for r in rates for n in norms]
    options += [f'{o} l2sp.alpha={a}' for o in options for a in (0.001, 0.1)]
    common = {'part': 'tune', 'scale': 'full', 'task': 'scene15'} | others
    return [row(name, option=o, top1=best.get(o, 0.2), **common) for o in options]


def test_tuning_takes_the_best_on_held_out_images_stage_by_stage():
    best = {
        'optimizer.learning_rate=0.003 batch_norm=frozen': 0.4,
        'optimizer.learning_rate=0.03 batch_norm=mixed': 0.9,  # not considered
        'optimizer.learning_rate=0.003 batch_norm=frozen l2sp.alpha=0.1': 0.6,
        'optimizer.learning_rate=0.03 batch_norm=batch l2sp.alpha=0.1': 0.9,  # neither
        'optimizer.learning_rate=0.003 batch_norm=batch': 0.3,
    }
    found, choice = tuned(best), Choice('full', 'food10', FEW)
    option = plan.chosen_option('l2sp', choice, plan.by_key(found))
    assert option == {
        'optimizer.learning_rate': 0.003,
        'batch_norm': 'frozen',
        'l2sp.alpha': 0.1,
    }
    # Ablations use the options chosen for their parent. Those without re-estimated statistics can
    # only use the statistics of the batch.
    found = tuned(best, 'xmixup')
    for name in ('xmixup', 'xmixup_least'):
        option = plan.chosen_option(name, choice, plan.by_key(found))
        assert option == {'optimizer.learning_rate': 0.003, 'batch_norm': 'frozen'}
    option = plan.chosen_option('xmixup_raw', choice, plan.by_key(found))
    assert option == {'optimizer.learning_rate': 0.003, 'batch_norm': 'batch'}
    rates = {
        norm: plan.with_norm('xmixup', norm, choice, plan.by_key(found))['optimizer.learning_rate']
        for norm in ('batch', 'frozen', 'mixed')
    }
    assert rates == {'batch': 0.003, 'frozen': 0.003, 'mixed': 0.003}


def test_a_diverged_run_is_not_chosen():
    wins = 'optimizer.learning_rate=0.001 batch_norm=frozen'
    found = tuned({wins: 0.3}, 'finetune')
    for each in found:
        if each['top1'] != 0.3:
            each |= {'error': 'diverged', 'top1': ''}
    option = plan.chosen_option('finetune', Choice('full', 'food10', FEW), plan.by_key(found))
    assert plan.text(option) == wins


def test_what_needs_tuning_says_so():
    with pytest.raises(UserError, match=r'no run of l2sp on scene15 .*--parts=tune --names=l2sp'):
        plan.chosen_option('l2sp', Choice('full', 'food10', FEW), {})


def test_groups_run_as_soon_as_what_they_need_is_there_the_most_urgent_first():
    wanted = Wanted('full', ('tune', 'main'), shots=(FEW,), names=('finetune', 'l2sp'), seeds=(0,))
    phases, found, begun, order = list(plan.phases(wanted)), {}, set(), []
    running = []
    while True:
        for group in run.next_groups(phases, found, begun):
            if len(running) == 5:
                break
            begun |= {case.key for case in group}
            running.append(group)
        if not running:
            break
        group = running.pop(0)
        order.append((group[0].name, group[0].part))
        for case in group:
            labels = dict(zip(plan.KEY, case.key, strict=True))
            found[case.key] = row(**labels, top1=0.1)
    assert len(begun) == len(found) == 2 * 6 + 6 + 2 * 8 + 6
    # Tuning of l2sp only fills idle slots during fine-tuning.
    last = max(i for i, each in enumerate(order) if each == ('finetune', 'main'))
    assert 0 < sum(each == ('l2sp', 'tune') for each in order[:last]) <= 4
    phases = list(plan.phases(wanted._replace(parts=('main',))))
    with pytest.raises(UserError, match='begin with --parts=tune --names=finetune'):
        list(run.next_groups(phases, {}, set()))


def test_missing_data_is_named(tmp_path):
    (tmp_path / 'imagenet_multi_176' / 'train').mkdir(parents=True)
    with pytest.raises(DataError, match=r'food10_176/train does not exist'):
        tasks.check_data(tmp_path, ['food10'])


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return [
        row(name, task, seed, rng.integers(1000) / 1000, seconds=10 if name == 'finetune' else 18)
        for task in ('scene15', 'food10')
        for name in ('finetune', 'xmixup', 'l2sp')
        for seed in range(5)
    ]


def points(rows, name, task, base='finetune'):
    """Differences by seed in points."""
    rows = [r for r in rows if r['part'] == 'main']
    top1 = {(r['name'], r['task'], r['seed']): 100 * r['top1'] for r in rows}
    return np.array([top1[name, task, s] - top1[base, task, s] for s in range(5)])


def half(values):
    interval = stats.ttest_1samp(values, 0).confidence_interval()
    return (interval.high - interval.low) / 2


def test_mean_over_tasks_and_its_intervals(rows):
    study = outcome.Study(rows, 'cpu', FEW)
    mean, seeds, others = outcome.over_tasks(outcome.differences(study, 'xmixup'))
    table = np.array([points(rows, 'xmixup', task) for task in ('scene15', 'food10')])
    assert mean == pytest.approx(table.mean())
    assert seeds == pytest.approx(half(table.mean(0)))
    assert others == pytest.approx(half(table.mean(1)))


def test_differences_table(rows):
    rows.append(row('mixup', seed=0, top1='', error='diverged'))
    rows.append(row('mars', seed=0, top1=0.9))  # cut off
    lines = tables.block('differences', rows).splitlines()
    assert lines[0] == '*cpu scale, 6 images a class, seeds 0, 1, 2, 3, 4*'
    # In order of priority; a name that lacks runs has no mean and no rank.
    assert [line.split('`')[1] for line in lines[4:]] == ['finetune', 'xmixup', 'mars', 'l2sp']
    found = lines[5].split('|')[1:-1]
    table = [points(rows, 'xmixup', task) for task in ('scene15', 'food10')]
    means = [values.mean() for values in (*table, np.concatenate(table))]
    halves = [half(values) for values in (*table, np.mean(table, axis=0))]
    for text, mean, width in zip(found[2:5], means, halves, strict=True):
        assert text.strip(' *') == f'{mean:+.2f} ± {width:.2f}'
        assert ('**' in text) == (abs(mean) > width)
    assert found[-1].strip() == '2.00 ×'  # (18 - 2) / (10 - 2), without compilation
    assert [text.strip() for text in lines[6].split('|')[4:8]][1:] == ['', '', '']


def test_top1_table(rows):
    top1 = [100 * r['top1'] for r in rows[:5]]
    line = tables.block('top1', rows).splitlines()[4]
    assert line.startswith(f'| `finetune` | {np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f} |')


def test_equal_numbers_of_right_answers_share_a_rank():
    right = {'finetune': (187, 162, 307, 622, 519), 'xmixup': (187, 162, 519, 622, 307)}
    right |= {'l2sp': (149, 115, 343, 612, 578)}
    right |= {'mars': (999, 799, 0, 0, 0), 'bss': (0, 0, 0, 800, 996)}
    top1 = {name: [n / 1000 for n in each] for name, each in right.items()}
    # The counts are equal, but rounding makes the means differ.
    assert len({np.mean(top1[name]) for name in ('finetune', 'xmixup', 'l2sp')}) == 3
    found = [row(name, seed=s, top1=t) for name, each in top1.items() for s, t in enumerate(each)]
    order = outcome.ranks(outcome.Study(found, 'cpu', FEW))
    assert order == {'mars': 1, 'finetune': 3, 'xmixup': 3, 'l2sp': 3, 'bss': 5}


def test_scales_and_numbers_of_images_are_never_mixed(rows):
    others = [row(seed=s, top1=0.9, scale='full', shots=shots) for s in (0, 1) for shots in (6, 0)]
    blocks = tables.block('top1', rows + others).split('\n\n')
    assert blocks[::2] == [
        '*full scale, 6 images a class, seeds 0, 1*',
        '*full scale, all images, seeds 0, 1*',
        '*cpu scale, 6 images a class, seeds 0, 1, 2, 3, 4*',
    ]
    assert blocks[1].splitlines()[2] == '| `finetune` | 90.00 ± 0.00 | 90.00 |'
    assert blocks[5] == tables.block('top1', rows).split('\n\n')[1]


def test_batch_norm_table_takes_rows_of_main_too():
    found = [row(top1=0.5, batch_norm='frozen', learning_rate=0.001)]
    found += [row(top1=0.4, part='batch_norm', option='batch_norm=batch')]
    lines = tables.block('batch_norm', found).splitlines()[4:]
    assert lines == [
        '| `finetune` | batch | 1 | 40.00 (0.01) | 40.00 |',
        '| `finetune` | frozen | 1 | 50.00 (0.001) | 50.00 |',
    ]


def test_same_norm_table_compares_runs_with_one_choice_of_batch_norm():
    rng, found, tops = np.random.default_rng(0), [], {}
    for name, norm, chosen in (
        ('finetune', 'frozen', True),
        ('finetune', 'batch', False),
        ('cotuning', 'frozen', False),
        ('cotuning', 'batch', True),
        ('bss', 'frozen', True),
    ):
        tops[name, norm] = rng.integers(1000, size=4) / 1000
        part = {'part': 'main' if chosen else 'batch_norm', 'option': '' if chosen else norm}
        found += [
            row(name, seed=s, top1=top1, batch_norm=norm, **part)
            for s, top1 in enumerate(tops[name, norm])
        ]
    lines = tables.block('same_norm', found).splitlines()[4:]
    cells = [[text.strip(' *`') for text in line.split('|')[1:-1]] for line in lines]
    for line, (name, norm) in zip(
        cells, [('cotuning', 'batch'), ('cotuning', 'frozen'), ('bss', 'frozen')], strict=True
    ):
        gains = 100 * (tops[name, norm] - tops['finetune', norm])
        assert line == [name, norm, '4', *[f'{gains.mean():+.2f} ± {half(gains):.2f}'] * 2]


def test_starts_table_compares_choices_of_statistics_and_head():
    rng, found, tops = np.random.default_rng(1), [], {}
    for name, norm, part in (
        ('probe', 'frozen', 'main'),
        ('finetune', 'batch', 'batch_norm'),
        ('finetune_warm', 'frozen', 'main'),
    ):
        tops[name] = rng.integers(1000, size=(2, 4)) / 1000
        for i, task in enumerate(('scene15', 'food10')):
            values = {'batch_norm': norm, 'part': part, 'option': '' if part == 'main' else norm}
            found += [row(name, task, s, top1, **values) for s, top1 in enumerate(tops[name][i])]
    lines = tables.block('starts', found).splitlines()[4:]
    for line, (name, base) in zip(
        lines,
        [('finetune', 'probe'), ('finetune_warm', 'finetune'), ('finetune_warm', 'probe')],
        strict=True,
    ):
        words, seeds, *cells = (text.strip(' *') for text in line.split('|')[1:-1])
        assert re.findall(r'`(\w+)`', words) == [name, base] and seeds == '4'
        gains = 100 * (tops[name] - tops[base])
        values = [*gains, gains.mean(axis=0)]
        assert cells == [f'{each.mean():+.2f} ± {half(each):.2f}' for each in values]


def test_rates_table_compares_at_equal_learning_rates():
    rng, found, tops = np.random.default_rng(2), [], {}
    for name, rate, part in (
        ('finetune', 0.001, 'batch_norm'),
        ('xmixup', 0.001, 'rates'),
        ('finetune', 0.003, 'rates'),
        ('xmixup', 0.003, 'main'),
        ('finetune', 0.01, 'rates'),  # XMixup has no run with it
    ):
        tops[name, rate] = rng.random((2, 4))
        values = {'batch_norm': 'frozen', 'learning_rate': rate, 'part': part}
        values['option'] = '' if part == 'main' else f'rate={rate}'
        for task, seeds in zip(('scene15', 'food10'), tops[name, rate], strict=True):
            found += [row(name, task, s, top1, **values) for s, top1 in enumerate(seeds)]
    # The statistics of the batch are another comparison.
    values = {'part': 'main', 'learning_rate': 0.003, 'batch_norm': 'batch'}
    found += [
        row('finetune', task, s, 0.1, **values) for task in ('scene15', 'food10') for s in (0, 1)
    ]
    lines = tables.block('rates', found).splitlines()[4:]
    cells = [[text.strip(' *`') for text in line.split('|')[1:-1]] for line in lines]
    assert [line[:3] for line in cells] == [
        ['finetune', '0.001', '4'],
        ['xmixup', '0.001', '4'],
        ['xmixup` − `finetune', '0.001', '4'],
        ['finetune', '0.003', '4'],
        ['xmixup', '0.003', '4'],
        ['xmixup` − `finetune', '0.003', '4'],
        ['finetune', '0.01', '4'],
    ]
    for lines_of_rate, rate in ((cells[:3], 0.001), (cells[3:6], 0.003)):
        for line, name in zip(lines_of_rate, ('finetune', 'xmixup'), strict=False):
            of_tasks = [
                f'{100 * s.mean():.2f} ± {100 * s.std(ddof=1):.2f}' for s in tops[name, rate]
            ]
            assert line[3:] == [*of_tasks, f'{100 * tops[name, rate].mean():.2f}']
        gains = 100 * (tops['xmixup', rate] - tops['finetune', rate])
        values = [*gains, gains.mean(axis=0)]
        assert lines_of_rate[2][3:] == [f'{g.mean():+.2f} ± {half(g):.2f}' for g in values]
    assert tables.block('rates', found[:4]) == 'No runs yet.'


def test_xmixup_table_compares_with_what_is_varied(rows):
    for each in rows:
        each['batch_norm'] = 'frozen'
    of_batch = {'part': 'batch_norm', 'option': 'batch_norm=batch'}
    for i, task in enumerate(('scene15', 'food10')):
        for s in range(5):
            rows.append(row('xmixup_least', task, s, 0.3, batch_norm='frozen'))
            rows.append(row('xmixup', task, s, 0.25 + 0.01 * s, **of_batch))
            rows.append(row('xmixup_raw', task, s, 0.2 + 0.01 * i))
    lines = tables.block('xmixup', rows).splitlines()[4:]
    cells = [[text.strip(' *') for text in line.split('|')[1:-1]] for line in lines]
    expected = [np.array([-5, -6, -7, -8, -9.0]), np.array([-4, -5, -6, -7, -8.0])]
    for line, name, values in (
        (cells[0], 'xmixup_raw', expected),
        (
            cells[1],
            'xmixup_least',
            [
                points(rows, name='xmixup_least', task=t, base='xmixup')
                for t in ('scene15', 'food10')
            ],
        ),
    ):
        assert line[0] == f'`{name}` − `xmixup`'
        values = [*values, np.mean(values, axis=0)]
        assert line[1:] == [f'{each.mean():+.2f} ± {half(each):.2f}' for each in values]


@pytest.mark.parametrize(
    ('gains', 'verdict'),
    [((3, 4, 5), 'wins'), ((-3, -4, -5), 'loses'), ((-3, 0, 5), 'cannot be told')],
)
def test_controls_table_judges_by_the_interval(gains, verdict):
    found = [row(seed=s) for s in range(3)]
    found += [row('cotuning', seed=s, top1=0.5 + gain / 100) for s, gain in enumerate(gains)]
    (line,) = tables.block('controls', found).splitlines()[4:]
    cells = [text.strip() for text in line.split('|')[1:-1]]
    text = f'{np.mean(gains):+.2f} ± {half(gains):.2f}'
    assert cells[3].strip('*') == text
    assert cells[1:3] == [CONTROLS['cotuning'], 'batch']
    won, lost = verdict == 'wins', verdict == 'loses'
    assert cells[4:] == [f'{won:d} won, {lost:d} lost of 1', verdict]


@pytest.mark.parametrize(
    ('scale', 'task', 'others'),
    [
        ('cpu', 'scene15', ('flowers17', 'scene15', 'food10')),
        ('full', 'scene15', ('sports22', 'flowers17', 'scene15', 'food10')),
        ('full', 'cub100', ('cub100', 'grocery81')),
    ],
)
def test_tasks_of_one_size_take_over_what_one_of_them_chose(scale, task, others):
    best = {'optimizer.learning_rate=0.003 batch_norm=frozen': 0.4}
    found = plan.by_key(tuned(best, scale=scale, task=task))
    for other in others:
        option = plan.chosen_option('l2sp', Choice(scale, other, FEW), found)
        assert option == {'optimizer.learning_rate': 0.003, 'batch_norm': 'frozen'}


def test_tuned_table_shows_the_choice():
    best = {
        'optimizer.learning_rate=0.001 batch_norm=frozen': 0.654,
        'optimizer.learning_rate=0.001 batch_norm=frozen l2sp.alpha=0.1': 0.7,
    }
    found = tuned(best, 'finetune') + tuned(best) + tuned(best, 'bss')[:2]  # bss: cut off
    lines = tables.block('tuned', found).splitlines()
    assert lines[4:] == [
        '| `finetune` | 0.01 batch: 20.0 · **0.001 frozen: 65.4** |',
        '| `l2sp`, `l2sp.alpha` | 0.01 batch: 20.0 · **0.001 frozen 0.1: 70.0** |',
    ]


def test_statistics_table(tmp_path):
    path = tmp_path / statistics.FILE
    assert tables.statistics_block(path) == 'No runs yet.'
    rows = ['scale,task,seed,statistics,top1']
    for kind, values in ((statistics.PRETRAINED, (0.7, 0.8)), ('"xmixup, alpha 1"', (0.5, 0.5))):
        rows += [f'cpu,scene15,{seed},{kind},{top1}' for seed, top1 in enumerate(values)]
    path.write_text('\n'.join(rows) + '\n')
    assert tables.statistics_block(path).splitlines() == [
        '*cpu scale, seeds 0, 1*',
        '',
        '| top-1 of a linear probe, % | scene15 | mean |',
        '| --- | ---: | ---: |',
        '| pre-trained | 75.00 ± 7.07 | 75.00 |',
        '| xmixup, alpha 1 | 50.00 ± 0.00 | 50.00 |',
    ]


def test_combine_table_compares_with_a_warm_head():
    found = [row(PROBE, seed=s, top1=0.6, part='combine') for s in range(3)]
    base = {'part': 'combine', 'option': 'as tuned'}
    found += [row('finetune_warm', seed=s, top1=0.5, **base) for s in range(3)]
    found += [
        row('xmixup_warm', seed=s, top1=0.5 + gain / 100, part='combine', option='alpha 1')
        for s, gain in enumerate((1, 2, 3))
    ]
    lines = tables.block('combine', found).splitlines()[4:]
    gain = f'**+10.00 ± {0:.2f}**'
    assert lines == [
        f'| `probe` |  | 60.00 ± 0.00 | 60.00 | {gain} |',
        '| `finetune_warm` | as tuned | 50.00 ± 0.00 | 50.00 |  |',
        f'| `xmixup_warm` | alpha 1 | 52.00 ± 1.00 | 52.00 | +2.00 ± {half([1, 2, 3]):.2f} |',
    ]


def test_page_and_figures_follow_from_the_rows_alone(rows, tmp_path):
    rows += [row(seed=s, part='batch_norm', batch_norm='frozen') for s in range(2)]
    for each in rows:
        run.append(tmp_path / plan.RUNS, each)
    assert plan.read(tmp_path / plan.RUNS)[0] == {
        column: rows[0].get(column, '') for column in plan.COLUMNS
    }
    page = Path(tables.__file__).with_name(tables.RESULTS).read_text()
    outputs = []
    for text in (page, 'x <!-- lite2 -->old<!-- end --> y'):
        (tmp_path / tables.RESULTS).write_text(text)
        tables.run(['tables', f'--results={tmp_path}'])
        outputs.append([(tmp_path / f).read_bytes() for f in ('differences.svg', 'batch_norm.svg')])
        written = (tmp_path / tables.RESULTS).read_text()
        if text is page:
            assert all(tables.block(name, rows) in written for name in tables.TABLES)
    assert written == 'x <!-- lite2 -->\n\nNo runs yet.\n\n<!-- end --> y'
    assert outputs[0] == outputs[1]
    figures.write(tmp_path / 'none', [])  # without rows there are no figures
    assert not (tmp_path / 'none').exists()


@pytest.fixture
def data(tmp_path):
    """The image folders of the source and one task, of noise with a colour for each class."""
    rng = np.random.default_rng(0)
    for folder in ('food10_176/train', 'food10_176/test', 'imagenet_multi_176/train'):
        for label in range(3):
            path = tmp_path / 'data' / folder / f'n0000000{label}'
            path.mkdir(parents=True)
            for i in range(8):
                image = rng.integers(100, size=(40, 40, 3), dtype=np.uint8)
                image[..., label] += 100
                Image.fromarray(image).save(path / f'{i}.png')
    return tmp_path / 'data'


SMALL = {'steps': 4, 'log_every': 2, 'model.name': 'resnet6', 'model.width': 4, 'weights': ''}
SMALL |= {'resize': 36, 'image_size': 32}


@pytest.mark.slow
def test_statistics_of_other_images(data, tmp_path):
    """The target's statistics agree with those re-estimated in a run, on other crops."""
    changes = SMALL | {'method': 'xmixup', 'reestimate': statistics.BATCHES}
    case = Case('cpu', 'main', 'food10', 6, 'xmixup', '', 0, changes)
    config = case.configuration(data, tmp_path)
    records = open_data(config)
    task, state = probe.pretrained(config)
    found = statistics.statistics_of(config, records, task, state)
    assert {*statistics.IMAGES, statistics.PRETRAINED} < found.keys()
    expected = with_clean_statistics(task, config, replicate(state), records.target).batch_stats
    ratios = jax.tree.map(lambda a, b: np.median(a / np.asarray(b)), found['target'], expected)
    np.testing.assert_allclose(jax.tree.leaves(ratios), 1, atol=0.05)
    mixed, clean = (found[kind]['bn1']['var'] for kind in ('xmixup, alpha 1', 'target'))
    assert (mixed / clean).mean() < 0.99  # the mean of two images varies less
    half = found['mean of pre-trained and target']['bn1']['var']
    np.testing.assert_allclose(half, (1 + found['target']['bn1']['var']) / 2, rtol=1e-5)


@pytest.mark.slow
def test_runs(data, tmp_path):
    def group(name, option='', seeds=(0, 1), **changes):
        changes = SMALL | NAMES[name].changes | changes
        return [Case('cpu', 'main', 'food10', 6, name, option, seed, changes) for seed in seeds]

    table = tmp_path / plan.RUNS
    diverges = {'batch_norm': 'batch', 'optimizer.learning_rate': 1e30}
    groups = [group(PROBE, batch_norm='batch'), group('xmixup', batch_norm='batch')]
    groups.append(group('finetune', 'fast', (0,), **diverges))
    for each in groups:
        run.make(each, data, tmp_path / 'work', table)
    found = plan.read(table)
    assert [plan.key(each) for each in found] == [case.key for group in groups for case in group]
    *finished, failed = found
    assert [each['steps'] for each in finished] == [0, 0, 4, 4]
    assert all(each['train_images'] == 18 and each['test_images'] == 24 for each in finished)
    assert [each['batch_norm'] for each in found] == ['batch'] * 5
    assert all(0 <= each['top1'] <= 1 and each['device'] for each in finished)
    assert 'loss' in failed['error']
    assert failed['top1'] == ''
    assert not any((tmp_path / 'work' / 'runs').rglob('*.csv'))  # runs.csv has what is needed
