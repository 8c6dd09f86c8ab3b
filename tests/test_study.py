"""The study's plan and tables; that a run of it works, on a network of two stages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax, softmax

from benchmarks.study import plan, run, tables, tasks, variants
from benchmarks.tune import GRIDS
from configs import digits
from tests.method_checks import K_0, LABELS, B, K, make_view, normal, outputs
from xmixup_jax.config import validate
from xmixup_jax.errors import UserError
from xmixup_jax.methods import METHODS


def make_images(data):
    """A Tiny-ImageNet of empty files, and a Caltech-101 of none."""
    every = [name for names in tasks.CATEGORIES.values() for name in names.split()]
    for split, count in (('train', 150), ('validation', 10)):
        for name in [*every, 'n09193705']:
            folder = data / tasks.TINY_IMAGENET / split / name
            folder.mkdir(parents=True)
            for i in range(count if name in every[:2] else 1):
                (folder / f'{split}{i}.JPEG').touch()
    for split in ('train', 'test'):
        (data / tasks.CALTECH / split).mkdir(parents=True)
    return every


def test_no_class_of_a_target_is_in_the_source(tmp_path):
    every = make_images(tmp_path / 'data')
    assert len(set(every)) == len(every)
    for _ in range(2):  # a second time nothing is left to do
        tasks.link_images(tmp_path / 'data', tmp_path / 'images')
    held_out = [name for group in tasks.GROUPS.values() for name in group]
    assert len(set(held_out)) == len(held_out) == 59
    for split in ('train', 'validation'):
        folder = tmp_path / 'images' / 'rest_source' / split
        assert {path.name for path in folder.iterdir()} == {*every, 'n09193705'} - {*held_out}
    target = tmp_path / 'images' / 'animals_target'
    first = tasks.GROUPS['animals'][0]
    train, test = ({p.name for p in (target / s / first).iterdir()} for s in ('train', 'test'))
    assert (len(train), len(test), len(train & test)) == (40, 120, 0)
    assert all(path.exists() for path in (target / 'test' / first).iterdir())


def row(part, task, name, seed, top1, **others):
    values = {'sample_rate': plan.FEW, 'error': '', 'train_top1': 1.0, 'train_images': 10}
    times = {'seconds': 10.0, 'first_step_seconds': 2.0}
    return {'part': part, 'task': task, 'name': name, 'seed': seed, 'top1': top1} | (
        values | times | others
    )


def tuned_rows():
    """The second value of each grid is the best."""
    return [
        row(part, task, plan.text({key: value}), 0, 0.5 + 0.1 * (i == 1))
        for part in ('tune', 'large_tune')
        for task in dict.fromkeys(plan.TUNED_ON.values())
        for key, values in GRIDS.values()
        for i, value in enumerate(values)
    ]


@pytest.fixture
def variant(monkeypatch):
    """A configuration that knows the variants of XMixup."""
    monkeypatch.setitem(METHODS, variants.NAME, variants.METHOD)
    config = digits.get_config()
    config.method = variants.NAME
    return config


def test_every_case_is_one_run_with_a_possible_configuration(tmp_path, variant):
    found = tuned_rows()
    seen = set()
    for part, phases in plan.PARTS.items():
        cases = [
            case
            for phase in phases
            for group in phase(list(tasks.TASKS), [0, 1], found)
            for case in group
        ]
        assert cases, part
        for case in cases:
            assert case.key not in seen
            seen.add(case.key)
            if case.seed == 0:
                config = case.configuration(tmp_path)
                validate(config, 1)
                assert (config.target.test_split == 'rest') == (case.part in plan.HELD_OUT)
                assert (config.model.name == 'resnet18') == (part == 'large')
    for task in tasks.TASKS:
        for method in GRIDS:
            assert ('main', task, plan.FEW, method, 1) in seen


def test_chosen_coefficients_are_the_best_on_held_out_images():
    chosen = plan.chosen('l2sp', 'food', tuned_rows())
    assert chosen == {'method': 'l2sp', 'optimizer.learning_rate': 0.01, 'l2sp.alpha': 0.001}
    found = tuned_rows()
    for best in (row for row in found if row['top1'] == 0.6):
        best |= {'top1': '', 'error': 'diverged'}
    assert plan.chosen('l2sp', 'food', found)['l2sp.alpha'] == GRIDS['l2sp'][1][0]


def test_what_needs_tuning_says_so():
    with pytest.raises(UserError, match=r'no run of animals with .*: begin with --parts=tune'):
        plan.chosen('l2sp', 'food', [])


@pytest.fixture
def study():
    rng = np.random.default_rng(0)
    rows = [
        row('main', task, name, seed, rng.random(), seconds=10.0 if name == 'finetune' else 18.0)
        for task in ('digits', 'food')
        for name in ('finetune', 'xmixup', 'l2sp')
        for seed in range(5)
    ]
    rows.append(row('main', 'food', 'mixup', 0, 0.0) | {'error': 'diverged'})
    return tables.Study(rows)


def test_mean_over_tasks_and_its_intervals(study):
    found = tables.differences(study, 'xmixup')
    table = np.array(
        [
            [
                100 * (study.select('main')[i + 5]['top1'] - study.select('main')[i]['top1'])
                for i in range(start, start + 5)
            ]
            for start in (0, 15)
        ]
    )
    mean, seeds, others = tables.over_tasks(found)
    assert mean == pytest.approx(table.mean())
    for half, values in ((seeds, table.mean(0)), (others, table.mean(1))):
        interval = stats.ttest_1samp(values, 0).confidence_interval()
        assert half == pytest.approx((interval.high - interval.low) / 2)


def test_tables(study):
    lines = tables.differences_table(study).splitlines()
    names = [line.split('`')[1] for line in lines[2:]]
    assert names == ['finetune', 'l2sp', 'xmixup']
    assert lines[-1].endswith('2.00 × |')  # without compilation
    assert sum(tables.ranks(study).values()) == pytest.approx(6)
    top1 = [100 * r['top1'] for r in study.select('main')[:5]]
    expected = f'| `finetune` | {np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f} |'
    assert tables.top1_table(study).splitlines()[2].startswith(expected)


def test_warm_table_compares_with_and_without_mixing(study):
    warm = [row('main', 'food', 'xmixup_warm', s, 0.5 + 0.01 * s) for s in range(5)]
    warm += [row('main', 'food', 'finetune_warm', s, 0.4) for s in range(4)]
    last = tables.warm_table(tables.Study(study.rows + warm)).splitlines()[-1]
    interval = stats.ttest_1samp([10, 11, 12, 13], 0).confidence_interval()
    expected = f'**+11.50 ± {(interval.high - interval.low) / 2:.2f}**'
    assert last == f'| `xmixup_warm` − `finetune_warm` |  | {expected} | {expected} |'


def test_large_table_compares_the_larger_network_alone(study):
    found = [row('large', 'food', 'finetune', s, 0.3 + 0.01 * s) for s in range(3)]
    found += [row('large', 'food', 'xmixup', s, 0.2) for s in range(3)]
    found.append(row('large_tune', 'food', 'xmixup.alpha=0.1', 0, 0.9))
    lines = tables.large_table(tables.Study(study.rows + found)).splitlines()
    interval = stats.ttest_1samp([-10, -11, -12], 0).confidence_interval()
    expected = f'**-11.00 ± {(interval.high - interval.low) / 2:.2f}**'
    assert lines[2:] == [
        '| `finetune` | 31.00 ± 1.00 |  |',
        f'| `xmixup` | {expected} | {expected} |',
    ]


def pairs(progress):
    return {
        'image': normal(B, 8, 8, 3),
        'source_image': 5 + normal(B, 8, 8, 3, seed=1),
        'label': jnp.asarray(LABELS),
        'source_label': jnp.asarray(LABELS[::-1].copy()) % 2,
        'progress': jnp.full(B, progress),
    }


def test_variant_mixes_a_part_of_the_images_in_a_part_of_the_steps(variant):
    keys = jax.random.split(jax.random.key(0), B)
    options = variant.xmixup_variant
    options.until = 0.6
    for progress, share, least in ((0.7, 1.0, 0), (0.5, 0.0, 0), (0.5, 1.0, B)):
        options.share = share
        batch = variants.transform(variant, keys, pairs(progress))
        assert (batch['lam'] < 1).sum() == least
        unmixed = jnp.isclose(batch['image'], pairs(0)['image']).all((1, 2, 3))
        np.testing.assert_array_equal(unmixed, batch['lam'] == 1)


def test_variant_pastes_a_box_of_the_source(variant):
    variant.xmixup_variant.cut, variant.xmixup_variant.alpha = True, 1.0
    keys = jax.random.split(jax.random.key(0), B)
    batch = variants.transform(variant, keys, pairs(0.0))
    own, source = (np.isclose(batch['image'], pairs(0)[k]) for k in ('image', 'source_image'))
    assert (own ^ source).all()
    np.testing.assert_allclose(own.mean((1, 2, 3)), batch['lam'], atol=1e-6)
    assert source.sum() > 0


def test_variant_losses(variant):
    logits, lam = normal(B, K + K_0), np.random.default_rng(0).random(B).astype(np.float32)
    batch = pairs(0.0) | {'lam': jnp.asarray(lam)}
    view = make_view('finetune', outputs=outputs(logits), batch=batch)
    plain = view.config.copy_and_resolve_references()
    plain.xmixup.alpha = 0.2
    as_xmixup = METHODS['xmixup'].loss(view._replace(config=plain))
    assert variants.loss(view._replace(config=variant)) == pytest.approx(float(as_xmixup))

    options, taught = variant.xmixup_variant, normal(B, K_0, seed=2)
    options.weight = 0.5
    target = -log_softmax(logits[:, :K], 1)[np.arange(B), LABELS]
    # Distilled: cross-entropy of softened distributions.
    options.source_label = 'distilled'
    source = -(softmax(taught / 2, 1) * log_softmax(logits[:, K:] / 2, 1)).sum(1)
    found = variants.loss(view._replace(config=variant, taught=taught))
    assert found == pytest.approx(float((lam * target).mean() + 0.5 * source.mean()), rel=1e-5)
    # Translated: the table's row for the target's part, the source's class for the other.
    options.source_label = 'translated'
    table = softmax(normal(K, K_0, seed=3), 1)
    selected = np.array([1, 3])
    soft = lam[:, None] * table[LABELS]
    soft[np.arange(B), selected[np.asarray(batch['source_label'])]] += 1 - lam
    source = -(soft * log_softmax(logits[:, K:], 1)).sum(1)
    constants = {'relationship': jnp.asarray(table), 'selected': jnp.asarray(selected)}
    found = variants.loss(view._replace(config=variant, constants=constants))
    assert found == pytest.approx(float((lam * target).mean() + 0.5 * source.mean()), rel=1e-5)


def test_a_run(tmp_path):
    changes = {'method': 'finetune', 'steps': 4, 'log_every': 2, 'model.name': 'resnet6'}
    changes |= {'pretrain.steps': 2, 'weights': ''}
    cases = [plan.Case('main', 'digits', plan.FEW, 'finetune', seed, changes) for seed in (0, 1)]
    made = run.make(cases, tmp_path)
    run.append(tmp_path / plan.RUNS, plan.COLUMNS, [row for row, _ in made])
    run.append(
        tmp_path / plan.CURVES, plan.CURVE_COLUMNS, [row for _, curve in made for row in curve]
    )
    rows = plan.read(tmp_path / plan.RUNS)
    assert [plan.key(row) for row in rows] == [case.key for case in cases]
    assert [row['steps'] for row in rows] == [4, 4]
    assert rows[0]['test_images'] == 1797 - 359
    assert 0 < rows[0]['top1'] < 1
    assert [float(row['step']) for row in plan.read(tmp_path / plan.CURVES)] == [2, 4] * 2
