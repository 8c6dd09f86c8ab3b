"""Where methods differ: counts, classes and images against pandas, on made-up and real runs."""

import base64
import io
import itertools
import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import recall_score
from test_compare import arguments
from test_report import Page, check_in_browser, check_self_contained

from benchmarks import gallery
from xmixup_jax import defaults
from xmixup_jax.cli import compare
from xmixup_jax.compute import evaluation
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import train_and_test
from xmixup_jax.errors import ConfigError, DataError
from xmixup_jax.files import write_json
from xmixup_jax.report import comparison, examples
from xmixup_jax.report.differences import (
    CLASSES,
    IMAGES,
    Counts,
    Predictions,
    class_changes,
    counts,
    differences_part,
    image_changes,
    paired,
    usual_prediction,
)
from xmixup_jax.report.predictions import Finished, read_predictions, where_they_differ
from xmixup_jax.report.scores import write_scores
from xmixup_jax.run.workdir import seal

CLASS_COUNT = 4


@st.composite
def made_up(draw):
    """Pairs of one seed to four; the test images of each are others, as with the split `rest`."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    label = rng.integers(CLASS_COUNT, size=30)
    pairs = []
    for _ in range(draw(st.integers(1, 4))):
        number = rng.permutation(30)[: draw(st.integers(1, 30))]

        def predictions(number=number):
            number = rng.permutation(number)
            right = rng.random(len(number)) < 0.6
            other = rng.integers(CLASS_COUNT, size=len(number))
            predicted = np.where(right, label[number], other)
            return Predictions(number, label[number], predicted, rng.uniform(0.3, 1, len(number)))

        pairs.append(paired(predictions(), predictions()))
    return pairs


def frame(pairs):
    """A row for each seed, method and image."""
    parts = [
        pd.DataFrame(vars(predictions)).assign(seed=seed, method=method)
        for seed, pair in enumerate(pairs)
        for method, predictions in enumerate(pair)
    ]
    table = pd.concat(parts)
    return table.assign(right=table.predicted == table.label)


def swapped(pairs):
    return [pair._replace(first=pair.second, second=pair.first) for pair in pairs]


@given(made_up())
def test_classes_against_pandas(pairs):
    recall = frame(pairs).groupby(['label', 'seed', 'method']).right.mean().unstack()
    size = frame(pairs).groupby(['label', 'seed']).right.size().div(2).groupby('label').mean()
    changes = class_changes(pairs, CLASS_COUNT)
    assert {change.label for change in changes} == set(size.index)
    gains = (recall[1] - recall[0]).groupby('label')
    for change in changes:
        assert change.images == pytest.approx(size[change.label])
        means = recall.groupby('label').mean().loc[change.label]
        assert [change.first, change.second] == pytest.approx(list(means))
        assert change.difference == pytest.approx(gains.mean()[change.label])
        of_class = gains.get_group(change.label)
        assert (change.better, change.worse) == ((of_class > 0).sum(), (of_class < 0).sum())
    differences = [change.difference for change in changes]
    assert differences == sorted(differences, reverse=True)
    back = {each.label: each.difference for each in class_changes(swapped(pairs), CLASS_COUNT)}
    assert back == {change.label: -change.difference for change in changes}
    if len(pairs) == 1:  # what the classes gain is what the network gains
        total = sum(change.images * change.difference for change in changes)
        table = counts(pairs[0])
        assert total == pytest.approx(table.second - table.first, abs=1e-9)


@given(made_up())
def test_images_against_pandas(pairs):
    table = frame(pairs)
    share = table.groupby(['number', 'method']).right.mean().unstack()
    images = image_changes(pairs)
    np.testing.assert_array_equal(images.number, share.index)
    np.testing.assert_array_equal(images.label, table.groupby('number').label.first())
    np.testing.assert_array_equal(images.tests, table.groupby('number').seed.nunique())
    np.testing.assert_allclose(images.right / images.tests, share.T)
    # Rounded: equal gains of thirds differ in floating point.
    sure = table[table.right & (table.method == 1)].groupby('number').probability.mean()
    won = share.assign(gain=(share[1] - share[0]).round(9), sure=sure)
    won = won[(share[1] > 0.5) & (share[0] < 0.5)]
    won = won.reset_index().sort_values(['gain', 'sure'], ascending=False, kind='stable')
    assert list(images.number[images.won]) == list(won.number)
    other = image_changes(swapped(pairs))
    assert list(images.lost) == list(other.won) and list(images.won) == list(other.lost)
    for number in share.index[:4]:
        for method, wrong in itertools.product((0, 1), (False, True)):
            rows = table[(table.number == number) & (table.method == method)]
            kept = rows[~rows.right] if wrong else rows
            if kept.empty:
                continue
            kinds = kept.groupby('predicted').probability.agg(['size', 'mean'])
            best = kinds.sort_values(['size', 'mean']).iloc[-1]
            usual = usual_prediction([pair[method] for pair in pairs], number, wrong)
            assert usual.tests == len(rows) and usual.given == best['size']
            assert usual.probability == pytest.approx(best['mean'])
            assert usual.probability == pytest.approx(kinds['mean'][usual.predicted])


@given(made_up())
def test_counts_against_pandas(pairs):
    for pair in pairs:
        right = frame([pair]).pivot(index='number', columns='method', values='right')
        table = pd.crosstab(right[0], right[1])
        table = table.reindex(index=[True, False], columns=[True, False], fill_value=0)
        assert list(counts(pair)) == table.to_numpy().ravel().tolist()


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemars_test_against_its_definition(first, second):
    total, fewer = first + second, min(first, second)
    tail = sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total
    p = Counts(both=7, first=first, second=second, neither=3).p_value
    assert p == pytest.approx(min(1.0, 2 * tail))


def test_seeds_that_cancel_out_are_neither_won_nor_lost():
    """Thirds do not add up to 0 in floating point."""
    rows = [(0, 1), (2, 1), (1, 1)]  # right of three, first and second method, for each seed
    label = np.zeros(3, int)

    def predictions(right):
        return Predictions(np.arange(3), label, (np.arange(3) >= right).astype(int), np.ones(3))

    pairs = [paired(predictions(first), predictions(second)) for first, second in rows]
    (change,) = class_changes(pairs, 2)
    assert (change.difference, change.better, change.worse) == (0.0, 1, 1)


def arrays(names, count, side=8):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(count, side, side, 3), dtype=np.uint8)
    return Records.from_arrays(images, np.arange(count) % len(names), names)


@pytest.mark.parametrize('classes', [3, 201])
def test_predictions_are_those_that_the_run_wrote(classes, tmp_path):
    names = ['class1', 'probability1', 'two\nlines, "quoted"', *map(str, range(classes - 3))]
    records = arrays(names, 4 * classes).select(np.arange(5, 4 * classes))
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(len(records), classes)).astype(np.float32)
    tested = evaluation.Tested(logits, records.labels, np.arange(len(records)))
    write_scores(tmp_path, tested, records)
    predictions = read_predictions(tmp_path, records)
    np.testing.assert_array_equal(predictions.number, records.index)
    np.testing.assert_array_equal(predictions.label, records.labels)
    np.testing.assert_array_equal(predictions.predicted, logits.argmax(axis=1))
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(predictions.probability, probability.max(axis=1), rtol=1e-5)
    # Two images could not be decoded.
    kept = np.delete(np.arange(len(records)), [1, 4])
    write_scores(tmp_path, evaluation.Tested(logits[kept], records.labels[kept], kept), records)
    np.testing.assert_array_equal(read_predictions(tmp_path, records).number, records.index[kept])


def test_predictions_that_cannot_be_read(tmp_path):
    records = arrays('abc', 9)
    with pytest.raises(DataError, match=r'predictions\.csv is missing: the run had no test images'):
        read_predictions(tmp_path, records)
    tested = evaluation.Tested(np.eye(9, 3, dtype=np.float32), records.labels, np.arange(9))
    write_scores(tmp_path, tested, records)
    for other in (records.select(np.arange(7)), records.select(np.roll(np.arange(9), 1))):
        with pytest.raises(DataError, match=r'of other images than arrays: restore those'):
            read_predictions(tmp_path, other)
    with pytest.raises(DataError, match=r'is damaged, or its classes are not those of arrays'):
        read_predictions(tmp_path, arrays('abd', 9))
    path = tmp_path / 'predictions.csv'
    for text in ('', path.read_text()[:-40]):
        path.write_text(text)
        with pytest.raises(DataError, match=r'is damaged'):
            read_predictions(tmp_path, records)


def colours(uris):
    """The mean RGB of each picture."""
    images = (Image.open(io.BytesIO(base64.b64decode(uri.split(',')[1]))) for uri in uris)
    return [np.asarray(image.convert('RGB')).mean(axis=(0, 1)) for image in images]


@pytest.fixture
def folder(config, tmp_path):
    """A configuration with 12 test images of 2 classes in a folder, each of one grey value."""
    for split, count in (('train', 1), ('test', 6)):
        for c, name in enumerate('ab'):
            (tmp_path / 'data' / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new('RGB', (24, 24), (20 * (6 * c + i),) * 3)
                image.save(tmp_path / 'data' / split / name / f'{i}.png')
    config.target = defaults.dataset(f'folder:{tmp_path / "data"}', 'train', 'test')
    return config


def invented(workdir, config, predicted, sure=0.9):
    """A run with these predictions for the test images."""
    _, test = train_and_test(config.target, config)
    logits = np.full((len(test), len(test.class_names)), 0.0, np.float32)
    logits[np.arange(len(test)), predicted] = np.log(sure / (1 - sure))
    workdir.mkdir(parents=True)
    write_scores(workdir, evaluation.Tested(logits, test.labels, np.arange(len(test))), test)
    return Finished(workdir, config)


def test_pictures_are_those_of_the_images_that_differ(folder, tmp_path):
    truth = np.repeat([0, 1], 6)
    first, second = truth.copy(), truth.copy()
    first[[1, 3, 8]] ^= 1
    second[10] ^= 1
    runs = [
        {0: invented(tmp_path / name, folder, predictions)}
        for name, predictions in (('first', first), ('second', second))
    ]
    # The data have moved since; their order is the same.
    shutil.move(tmp_path / 'data', tmp_path / 'moved')
    folder.target.name = f'folder:{tmp_path / "moved"}'
    part = where_they_differ(*runs, ('mine', 'yours'), {})
    assert part['seeds'] == [{'seed': 0, 'counts': [8, 1, 3, 0], 'p': '0.62'}]
    won, lost = part['images']
    assert (won['count'], lost['count']) == (3, 1)
    pictured = np.array(colours([card['uri'] for card in won['cards']]))[:, 0] / 20
    assert sorted(np.rint(pictured)) == [1, 3, 8]
    assert np.rint(colours([lost['cards'][0]['uri']])[0] / 20).tolist() == [10] * 3
    assert lost['cards'][0]['name'] == 'b'
    words = [(line['method'], line['words']) for line in lost['cards'][0]['lines']]
    assert words == [('mine', 'b (90%)'), ('yours', 'a (90%)')]
    classes = [[row['name'] for row in group['rows']] for group in part['classes']]
    assert classes == [['a'], []]  # of b, each method gets one image right alone
    (tmp_path / 'moved/test/b/4.png').write_bytes(b'damaged')
    part = where_they_differ(*runs, ('mine', 'yours'), {})
    assert part['images'][1]['count'] == 1 and part['images'][1]['cards'] == []


def test_the_page_is_bounded():
    classes, each = 30, 20
    label = np.repeat(np.arange(classes), each)
    number, sure = np.arange(len(label)), np.full(len(label), 0.8)
    right = Predictions(number, label, label, sure)
    half = np.where(number % 2, label, (label + 1) % classes)
    opened = []

    def picture(number):
        opened.append(number)
        return 'data:image/jpeg;base64,'

    pairs = {7: paired(Predictions(number, label, half, sure), right)}
    part = differences_part(pairs, ('a', 'b'), list(map(str, range(classes))), picture)
    won, lost = part['classes']
    assert (won['count'], len(won['rows']), lost['count']) == (classes, CLASSES, 0)
    assert {row['difference'] for row in won['rows']} == {'+50.0'}
    assert part['images'][0]['count'] == classes * each / 2
    assert len(part['images'][0]['cards']) == len(opened) == IMAGES


def report_of(folder, tmp_path, methods, rates=(None,)):
    """report.html of a comparison of invented runs, two seeds of each method."""
    rng, rows, runs = np.random.default_rng(0), [], []
    truth = np.repeat([0, 1], 6)
    for rate, (strength, method), seed in itertools.product(rates, enumerate(methods), range(2)):
        predicted = np.where(rng.random(12) < 0.4 + 0.05 * strength, truth, 1 - truth)
        runs.append(invented(tmp_path / f'{rate}' / method / f'seed{seed}', folder, predicted))
        row = {'sample_rate': rate, 'method': method, 'seed': seed, 'seconds': 2.0}
        row |= {'top1': 0.4 + 0.05 * strength, 'first_step_seconds': 1.0}
        rows.append(row)
    rows.append({'sample_rate': rates[0], 'method': 'rifle', 'seed': 0, 'error': 'no'})
    runs.append(Finished(tmp_path / 'none', folder))
    folders = [str(run.workdir.relative_to(tmp_path)) for run in runs]
    configs = [run.config for run in runs]
    comparison.write_report(tmp_path, folder, rows, folders, {}, configs)
    return Page(tmp_path / 'report.html')


def test_a_comparison_shows_xmixup_and_the_best(folder, tmp_path, caplog):
    methods = ['xmixup', 'finetune', 'bss', 'delta', 'l2sp']
    page = report_of(folder, tmp_path, methods)
    titles = re.findall('<summary>(.* against .*)</summary>', page.source)
    assert titles == [f'{name} against finetune' for name in ('xmixup', 'l2sp', 'delta')]
    assert len(page.source) < 1e6
    check_self_contained(page)
    check_in_browser(tmp_path / 'report.html')
    # A run of an earlier version has no predictions.csv.
    (tmp_path / 'None/l2sp/seed1/predictions.csv').unlink()
    _, *rest = titles
    shutil.rmtree(tmp_path / 'None' / 'xmixup')
    page = rewritten(folder, tmp_path, methods)
    assert re.findall('<summary>(.* against .*)</summary>', page.source) == rest[1:]
    assert 'no differences of finetune and xmixup: ' in caplog.text


def rewritten(folder, tmp_path, methods):
    rows = [
        {'sample_rate': None, 'method': method, 'seed': seed, 'top1': 0.4 + 0.05 * strength}
        for (strength, method), seed in itertools.product(enumerate(methods), range(2))
    ]
    folders = [f'None/{row["method"]}/seed{row["seed"]}' for row in rows]
    comparison.write_report(tmp_path, folder, rows, folders, {}, [folder] * len(rows))
    return Page(tmp_path / 'report.html')


def test_a_comparison_of_several_sample_rates(folder, tmp_path):
    page = report_of(folder, tmp_path, ['bss', 'xmixup', 'delta'], (0.1, 0.5))
    titles = re.findall('<summary>(.* against .*)</summary>', page.source)
    assert titles == [f'xmixup against bss, {n} % of the training set' for n in (10, 50)]


@pytest.fixture(scope='module')
def digits(folders, tmp_path_factory):
    """The folder of a comparison of fine-tuning and XMixup, and what the test images are."""
    workdir = tmp_path_factory.mktemp('comparison')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, 'measure', lambda configs, workdirs: {})  # of the steps' cost
        flags = ['--methods=finetune,xmixup', '--seeds=0,1']
        compare.run(arguments(folders, workdir, *flags))
    return workdir


def test_a_real_comparison(digits):
    page = Page(digits / 'report.html')
    check_self_contained(page)
    check_in_browser(digits / 'report.html')
    assert 'xmixup against finetune' in page.text
    tables = {
        (method, seed): pd.read_csv(digits / method / f'seed{seed}' / 'predictions.csv')
        for method, seed in itertools.product(('finetune', 'xmixup'), range(2))
    }
    rights = {key: table.predicted == table['class'] for key, table in tables.items()}
    shown = re.findall(r'<td class="number">([^<]*)</td>', page.source)
    for seed in range(2):
        a, b = rights['finetune', seed], rights['xmixup', seed]
        expected = [str(seed), *(str(sum(x)) for x in (a & b, a & ~b, ~a & b, ~a & ~b))]
        assert shown[6 * seed : 6 * seed + 5] == expected
    share = {
        method: pd.concat([rights[method, seed] for seed in range(2)])
        .groupby(pd.concat([tables[method, seed].image for seed in range(2)]))
        .mean()
        for method in ('finetune', 'xmixup')
    }
    won = ((share['xmixup'] > 0.5) & (share['finetune'] < 0.5)).sum()
    assert f'Images won by xmixup: {won}' in page.text


def test_two_finished_runs(digits, capsys, tmp_path):
    first, second = (digits / name / 'seed0' for name in ('finetune', 'xmixup'))
    compare.run(['compare', str(first), str(second), f'--output={tmp_path / "page.html"}'])
    page = Page(tmp_path / 'page.html')
    check_self_contained(page)
    check_in_browser(tmp_path / 'page.html')
    tables = [pd.read_csv(run / 'predictions.csv') for run in (first, second)]
    top1 = [100 * json.loads((run / 'result.json').read_text())['top1'] for run in (first, second)]
    words = f'finetune {top1[0]:.2f} %, xmixup {top1[1]:.2f} % top-1 on {len(tables[0])} test imag'
    assert words in page.text and words in capsys.readouterr().out
    assert 'config.xmixup.label_space joint' in page.text
    recalls = [
        recall_score(table['class'], table.predicted, labels=range(10), average=None)
        for table in tables
    ]
    gains = 100 * (recalls[1] - recalls[0])
    assert f'>{gains.max():+.1f}<' in page.source and f'>{gains.min():+.1f}<' in page.source
    compare.run(['compare', str(first), str(first)])
    page = Page(first / 'differences.html')
    assert 'Both runs have the same configuration.' in page.text
    assert 'Images won by' in page.text and not page.all('img')
    (first / 'differences.html').unlink()


def test_runs_that_cannot_be_compared(digits, tmp_path):
    ours = digits / 'xmixup/seed0'
    copy = shutil.copytree(digits / 'finetune/seed0', tmp_path / 'copy')

    def refused(error, words, *runs):
        with pytest.raises(error, match=words) as info:
            compare.run(['compare', *map(str, runs)])
        assert '\n' not in str(info.value)

    refused(ConfigError, r'were tested on different images', ours, digits / 'xmixup/seed1')
    refused(DataError, r'is no folder: name the folder of a finished run', ours, tmp_path / 'none')
    refused(DataError, r'contains no finished run \(config.json is missing\)', tmp_path, ours)
    refused(ConfigError, r'name two run folders, not 1', ours)
    refused(ConfigError, r'there is no flag --methods', ours, copy, '--methods=bss')
    data = json.loads((copy / 'data.json').read_text())

    def write_test(test):
        write_json(copy / 'data.json', data | {'test': test})

    write_test(None)
    refused(DataError, r'data.json is not as the run wrote it', ours, copy)
    seal(copy)
    refused(DataError, r'had no test images', ours, copy)
    other = data['test'] | {'digest': 'other', 'lasting': 'other'}
    write_test(other | {'class_names': [f'class {i}' for i in range(10)]})
    seal(copy)
    refused(ConfigError, r"have different classes \(.*'class 0'", ours, copy)
    write_test(other | {'counts': [count + 1 for count in other['counts']]})
    seal(copy)
    refused(ConfigError, r'seed0 and .* were tested on different images \(new images', ours, copy)
    refused(ConfigError, r'no longer those .* \(missing images: 10 of 10 classes', copy, copy)


def test_gallery(digits, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in digits.rglob('*')}
    gallery.main([f'--runs={digits}', f'--out={tmp_path}'])
    assert {path: path.stat().st_mtime_ns for path in digits.rglob('*')} == before
    assert {path.name for path in tmp_path.iterdir()} == {'index.html', 'uci_digits.html'}
    page = Page(tmp_path / 'uci_digits.html')
    for path in tmp_path.iterdir():
        check_self_contained(Page(path))
        check_in_browser(path)
    alternatives = [image['alt'] for image in page.all('img')]
    for row in json.loads((digits / 'xmixup/seed0/match.json').read_text()):
        assert alternatives.count(f'source image: {row["source"][0]}') == examples.IMAGES
        assert f'← {row["source"][0]} ({row["similarity"][0]:.3f})' in page.text
    assert sum(words.startswith('mixed image: ') for words in alternatives) == examples.INPUTS
    assert 'Images won by xmixup' in page.text
    index = Page(tmp_path / 'index.html')
    assert [link['href'] for link in index.all('a')] == ['uci_digits.html']
    results = {
        method: [
            json.loads((digits / method / f'seed{seed}/result.json').read_text())['top1']
            for seed in range(2)
        ]
        for method in ('finetune', 'xmixup')
    }
    for values in results.values():
        assert f'{100 * np.mean(values):.2f}' in index.text
    assert (
        f'{100 * np.subtract(results["xmixup"], results["finetune"]).mean():+.2f} ±' in index.text
    )


def test_gallery_finds_the_runs_of_each_task(digits, tmp_path):
    for task, option, seed in (('a', 'none', 0), ('a', 'freeze', 1), ('b', 'none', 1)):
        for method in ('finetune', 'xmixup'):
            run = tmp_path / task / method / option / f'seed{seed}'
            shutil.copytree(digits / method / f'seed{seed}', run)
    shutil.copytree(tmp_path / 'a', tmp_path / 'c')
    (tmp_path / 'c/finetune/none/seed0/SHA256SUMS').unlink()  # not finished
    found = gallery.find_runs(tmp_path)
    assert {task: list(group['xmixup']) for task, group in found.items()} == {'a': [0], 'b': [1]}
    assert gallery.find_runs(tmp_path, 'freeze').keys() == {'a', 'c'}
    with pytest.raises(DataError, match=r'has no finished runs of finetune and xmixup'):
        gallery.find_runs(tmp_path / 'a/xmixup')
