"""Reports agree with the run, and load nothing from elsewhere."""

import html.parser
import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import sync_playwright
from scipy import stats
from scipy.special import softmax

from xmixup_jax.cli import train
from xmixup_jax.cli.report import report as report_afterwards
from xmixup_jax.compute.augment import denormalize, normalize
from xmixup_jax.data import names
from xmixup_jax.data.selection import Data
from xmixup_jax.errors import DataError
from xmixup_jax.report import comparison
from xmixup_jax.report.scores import reliability
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.run.workdir import damaged_files

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
EVIL = ('<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "'&amp;", '$x$', 'n02123045')


class Page(html.parser.HTMLParser):
    """Tags and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.words = [], []
        self.source = path.read_text()
        self.feed(self.source)
        self.text = ' '.join(' '.join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def check_self_contained(page):
    assert not page.all('script')
    assert page.all('img')
    for image in page.all('img'):
        assert image['src'].startswith('data:image/') and image['alt'].strip()
        assert not any(key.startswith('on') for key in image)
    for link in page.all('link'):
        assert link['href'].startswith('data:')
    assert not re.findall(r'url\(|@import', page.source)


def in_browser(path, width):
    """Opens the page in Chromium; returns (complaints, width of the content, broken images)."""
    complaints = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'],
        )
        page = browser.new_page(viewport={'width': width, 'height': 800})
        page.on('console', lambda message: complaints.append(message.text))
        page.on('pageerror', lambda error: complaints.append(str(error)))
        page.on('dialog', lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on(
            'request',
            lambda request: (
                None
                if request.url.startswith(('file:', 'data:'))
                else complaints.append(request.url)
            ),
        )
        page.goto(f'file://{path}')
        content = page.evaluate('document.documentElement.scrollWidth')
        broken = page.evaluate(
            '[...document.images].filter(i => !i.complete || !i.naturalWidth).length'
        )
        browser.close()
    return complaints, content, broken


@pytest.fixture
def named(records):
    """The digits with class names that would do harm in a page."""
    class_names = (*EVIL, *'56789')
    target, test, source = (replace(part, class_names=class_names) for part in records)
    return Data(target, test.select(np.arange(200)), source)


def check_in_browser(path):
    """Checks a page on a large screen and on a phone, if Chromium is installed."""
    if CHROMIUM:
        for width in (1200, 375):
            complaints, content, broken = in_browser(path, width)
            assert not complaints and content <= width and broken == 0


def test_report_of_a_run(config, named, tmp_path):
    config.update({'report': True, 'eval_every': 4})
    workdir = tmp_path / 'run'
    result = train_and_evaluate(config, workdir, named)
    page = Page(workdir / 'report.html')
    check_self_contained(page)
    check_in_browser(workdir / 'report.html')
    assert f'{100 * result["top1"]:.2f} % top-1 on 200 test images' in page.text
    for name in (*EVIL[:4], 'tabby'):
        assert name in page.text
    assert EVIL[4] not in page.text.split('All values')[0]
    alternatives = [image['alt'] for image in page.all('img')]
    match = json.loads((workdir / 'match.json').read_text())
    for row in match:
        target, source = names.readable([row['target'], *row['source']])
        assert alternatives.count(f'target image: {target}') == 2
        assert alternatives.count(f'source image: {source}') == 2
        assert f'← {source} ({row["similarity"][0]:.3f})' in page.text
    mixed = [words for words in alternatives if words.startswith('mixed image')]
    assert len(mixed) == 16
    for words in mixed:
        lam, rest = re.fullmatch(
            r'mixed image: ([01]\.\d\d) × .+ \+ (0\.\d\d) × .+', words
        ).groups()
        assert float(lam) + float(rest) == pytest.approx(1, abs=0.011)
    assert any(words.startswith('Top-1 accuracy in %') for words in alternatives)
    correct = round(200 * result['top1'])
    assert f'{correct} of 200 test images are on the diagonal' in ' '.join(alternatives)
    assert 'jax 0.' in page.text and '"label_space": "joint"' in page.text
    # Damaged or missing, it is made again.
    before = page.source.split('Configuration and versions')[0]
    (workdir / 'report.html').write_text('damaged')
    assert train_and_evaluate(config, workdir, named)['top1'] == result['top1']
    again = (workdir / 'report.html').read_text().split('Configuration and versions')[0]
    assert len(again) == pytest.approx(len(before), rel=0.1)


def test_report_without_match_and_test(config, records, tmp_path):
    config.update({'report': True, 'method': 'finetune'})
    target, _, _ = records
    train_and_evaluate(config, tmp_path, Data(target, None, None))
    page = Page(tmp_path / 'report.html')
    check_self_contained(page)
    assert 'Training images' in page.text
    assert 'Class match' not in page.text and 'Calibration' not in page.text


def test_report_of_a_comparison(config, tmp_path):
    """The runs are made up; tests/test_compare.py trains real ones."""
    rng = np.random.default_rng(0)
    rows, folders = [], []
    for method, seed in itertools.product(('finetune', 'xmixup', 'cotrain'), range(3)):
        seconds = 20.0 if method == 'cotrain' else 10.0
        row = {'sample_rate': None, 'method': method, 'seed': seed, 'top1': rng.uniform(0.4, 0.6)}
        rows.append(row | {'seconds': seconds + 1, 'first_step_seconds': 1.0})
        folders.append(f'{method}/seed{seed}')
        (tmp_path / folders[-1]).mkdir(parents=True)
        (tmp_path / folders[-1] / 'report.html').touch()
    rows.append({'sample_rate': None, 'method': 'bss', 'seed': 0, 'error': EVIL[0]})
    comparison.write_report(tmp_path, config, rows, [*folders, 'bss/seed0'], {})
    page = Page(tmp_path / 'report.html')
    check_self_contained(page)
    ours, base = ([row['top1'] for row in rows[i : i + 3]] for i in (3, 0))
    gains = 100 * np.subtract(ours, base)
    half = stats.t.ppf(0.975, 2) * stats.sem(gains)
    words = f'xmixup against fine-tuning: {gains.mean():+.2f} ± {half:.2f} points top-1, 3 seeds'
    assert words in page.text
    assert [link['href'] for link in page.all('a')] == [f'{name}/report.html' for name in folders]
    figures = [image['alt'] for image in page.all('img')]
    top1 = 100 * np.mean([row['top1'] for row in rows[6:9]])
    assert f'cotrain {top1:.2f} % at 2.00 times' in figures[0]
    assert EVIL[0] in page.text
    check_in_browser(tmp_path / 'report.html')


def test_calibration_against_its_definition():
    rng = np.random.default_rng(0)
    probabilities = softmax(3 * rng.normal(size=(500, 4)), axis=1)
    label = rng.integers(4, size=500)
    bins = reliability(probabilities, label, bins=10)
    # Guo et al. 2017, eq. 3, image by image.
    error, seen = 0.0, 0
    for m in range(10):
        inside = [
            (p.max(), p.argmax() == y)
            for p, y in zip(probabilities, label, strict=True)
            if m / 10 <= p.max() < (m + 1) / 10 or (m == 9 and p.max() == 1)
        ]
        if inside:
            confidence, correct = np.mean(inside, axis=0)
            error += len(inside) / 500 * abs(correct - confidence)
            seen += len(inside)
    assert seen == bins.count.sum() == 500
    assert bins.ece == pytest.approx(error)
    certain = np.eye(4)[label]
    assert reliability(certain, label).ece == 0.0


@pytest.mark.parametrize('name', ['imagenet', 'inception'])
def test_denormalize_undoes_normalize(config, name):
    config.model.normalization = name
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    np.testing.assert_array_equal(
        denormalize(normalize(images, config.model), config.model), images
    )


def test_names_stay_apart():
    lines = (Path(names.__file__).parent / 'wordnet.txt').read_text().splitlines()
    words = names.readable([line.split('\t')[0] for line in lines])
    assert len(set(words)) == len(lines) == 1000
    assert names.readable(('n02123045', 'cat')) == ['tabby', 'cat']


def test_a_report_asked_for_after_the_run(config, records, tmp_path):
    """It equals the report made in the run, and leaves the run intact."""
    texts = {}
    for name, wanted in (('with', True), ('without', False)):
        config.report = wanted
        result = train_and_evaluate(config, tmp_path / name)
        assert (tmp_path / name / 'report.html').exists() == wanted
        report_afterwards(tmp_path / name)
        page = Page(tmp_path / name / 'report.html')
        check_self_contained(page)
        texts[name] = [image['alt'] for image in page.all('img')]
        assert damaged_files(tmp_path / name) == []
        assert train_and_evaluate(config, tmp_path / name) == result
        assert (tmp_path / name / 'report.html').exists()
    assert texts['with'] == texts['without']
    (tmp_path / 'with/metrics.csv').write_text('damaged')
    with pytest.raises(DataError, match=r'metrics\.csv is not as the run wrote it: run its train'):
        report_afterwards(tmp_path / 'with')
    shutil.rmtree(tmp_path / 'without/checkpoints')
    with pytest.raises(DataError, match=r'has no checkpoint of its last step, 6'):
        report_afterwards(tmp_path / 'without')
    (tmp_path / 'without/result.json').unlink()
    with pytest.raises(DataError, match=r'no finished run \(result\.json is missing\)'):
        report_afterwards(tmp_path / 'without')


def test_a_run_of_one_step_has_no_speed():
    result = {'method': 'finetune', 'steps': 1, 'seconds': 2.04, 'images_per_second': None}
    assert train.summary(result) == 'finetune (1 step, 2.0 s)'
    result |= {'top1': 0.5, 'test_images': 8, 'images_per_second': 3.5}
    words = 'finetune  top1 50.00 %  on 8 images (1 step, 2.0 s, 3.5 images/s)'
    assert train.summary(result) == words
