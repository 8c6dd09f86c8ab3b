import csv
import json

import numpy as np
import pytest
import scipy.stats

from xmixup_jax.cli import compare
from xmixup_jax.compute import cost
from xmixup_jax.compute.cost import StepCost
from xmixup_jax.errors import ConfigError, UserError
from xmixup_jax.report import tables


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """Measures steps in only two rounds."""
    monkeypatch.setattr(cost, 'ROUNDS', (2, 2))


def arguments(config, workdir, *flags):
    folders = [f'--config.{key}={config[key]}' for key in ('data_dir', 'cache_dir')]
    small = ['--config.weights=', '--config.model.name=resnet6']
    small += ['--config.model.width=4', '--config.steps=4', '--config.report=False']
    small += ['--config.batch_size=16', '--config.checkpoint_every=4']
    command = ['compare', '--config=configs/digits.py', f'--workdir={workdir}']
    return [*command, *folders, *small, *flags]


def read(workdir):
    with (workdir / tables.CSV).open(newline='') as file:
        return list(csv.DictReader(file))


def test_comparison_runs_once_and_can_be_extended(config, tmp_path, capsys):
    compare.run(arguments(config, tmp_path, '--methods=finetune,cotrain', '--seeds=0'))
    rows = read(tmp_path)
    assert [(row['method'], row['seed']) for row in rows] == [('finetune', '0'), ('cotrain', '0')]
    for row in rows:
        result = json.loads(
            (tmp_path / row['method'] / f'seed{row["seed"]}' / 'result.json').read_text()
        )
        assert float(row['top1']) == result['top1']
        assert float(row['seconds']) > float(row['first_step_seconds']) > 0
    assert '| `cotrain` |' in capsys.readouterr().out
    assert (tmp_path / tables.FIGURE).read_bytes().startswith(b'\x89PNG')
    assert 'cotrain against fine-tuning: ' in (tmp_path / 'report.html').read_text()
    costs = json.loads((tmp_path / 'step_costs.json').read_text())
    assert costs['cotrain']['memory_mb'] > costs['finetune']['memory_mb'] > 0
    assert all(cost['step_ms'] > 0 and cost['compile_seconds'] > 0 for cost in costs.values())

    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('result.json')}
    compare.run(arguments(config, tmp_path, '--methods=finetune,cotrain', '--seeds=0,1'))
    assert [(row['method'], row['seed']) for row in read(tmp_path)] == [
        ('finetune', '0'),
        ('cotrain', '0'),
        ('finetune', '1'),
        ('cotrain', '1'),
    ]
    for path, stamp in stamps.items():
        assert path.stat().st_mtime_ns == stamp


def test_sample_rates_are_shares_of_every_class(config, tmp_path):
    flags = ['--methods=finetune', '--seeds=0', '--sample_rates=0.02,0.1']
    compare.run(arguments(config, tmp_path, *flags))
    rows = read(tmp_path)
    assert [row['sample_rate'] for row in rows] == ['0.02', '0.1']
    # The UCI digits have 174 to 183 images in each class.
    assert [int(row['train_images']) for row in rows] == [39, 179]
    assert [int(row['test_images']) for row in rows] == [1758, 1618]
    assert '10 % of the training set' in (tmp_path / tables.MARKDOWN).read_text()


def test_a_diverged_run_is_reported_and_the_others_go_on(config, tmp_path):
    flags = ['--methods=finetune,l2sp', '--seeds=0', '--config.l2sp.alpha=4e9', '--config.steps=8']
    with pytest.raises(UserError, match=r'1 of 2 runs failed: comparison.csv'):
        compare.run(arguments(config, tmp_path, *flags, '--config.l2sp.beta=4e9'))
    rows = read(tmp_path)
    assert rows[0]['error'] == '' and float(rows[0]['top1']) > 0
    assert 'the loss is' in rows[1]['error'] and rows[1]['top1'] == ''
    assert '| `l2sp` | failed |' in (tmp_path / tables.MARKDOWN).read_text()


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--methods=finetune,magic'], "config.method='magic': must be one of"),
        (['--config.nonsense=1'], 'there is no such key'),
        (['--sample_rates=1.5'], 'config.target.sample_rate=1.5: must be from 0 to 1'),
        (['--sample_rates=0'], 'sample_rate=0: must be more than 0'),
    ],
)
def test_mistakes(config, tmp_path, flags, words):
    with pytest.raises(ConfigError) as info:
        compare.run(arguments(config, tmp_path, *flags))
    assert words in str(info.value)


def test_paired_difference_against_scipy():
    rng = np.random.default_rng(0)
    ours, base = rng.normal(size=(2, 5))
    mean, half = tables.paired_difference(dict(enumerate(ours)), dict(enumerate(base)))
    interval = scipy.stats.ttest_rel(ours, base).confidence_interval(0.95)
    np.testing.assert_allclose((mean - half, mean + half), interval, rtol=1e-9)
    # Only seeds that both methods have are paired.
    mean, half = tables.paired_difference({0: 3.0, 7: 1.0}, {0: 1.0, 8: 5.0})
    assert mean == 2.0 and np.isnan(half)


@pytest.mark.parametrize(
    'text', ['', '{', '[]', '{"finetune": 3}', '{"finetune": {"gflop": 1.0}}', '{"better": [1]}']
)
def test_costs_that_cannot_be_read_are_measured_again(text, tmp_path, monkeypatch):
    costs = {'finetune': StepCost(2.0, 10.0, 1.0, 50.0)}
    monkeypatch.setattr(compare, 'measure', lambda configs, workdirs: costs)
    (tmp_path / 'step_costs.json').write_text(text)
    runs = [compare.Run(None, tmp_path / 'run', {'method': 'finetune'})]
    assert compare.step_costs(runs, [], tmp_path) == costs
    monkeypatch.setattr(compare, 'measure', None)
    assert compare.step_costs(runs, [], tmp_path) == costs


def test_table():
    def row(method, seed, top1, seconds):
        return {
            'sample_rate': None,
            'method': method,
            'seed': seed,
            'top1': top1,
            'seconds': seconds,
            'first_step_seconds': 1.0,
        }

    rows = [row('finetune', i, 0.5 + 0.01 * i, 11.0) for i in range(3)]
    rows += [row('better', i, 0.6 + 0.01 * i + 0.001 * (i == 1), 16.0) for i in range(3)]
    costs = {'finetune': StepCost(2.0, 10.0, 1.0, 50.0), 'better': StepCost(3.0, 15.0, 1.0, 80.0)}
    text = tables.markdown(rows, costs)
    half = scipy.stats.t.ppf(0.975, 2) * np.std([10, 10.1, 10], ddof=1) / np.sqrt(3)
    assert '| `finetune` | 51.00 ± 1.00 | 3 |  | 10.0 | 1.00 × | 1.00 × | 50 | 2.0 |' in text
    expected = f'3 | **+10.03 ± {half:.2f}** | 15.0 | 1.50 × | 1.50 × | 80 | 3.0 |'
    assert expected in text
