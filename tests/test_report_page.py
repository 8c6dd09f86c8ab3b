"""The page of a run: its order, its use without a mouse, dark screens, and a thousand classes."""

import json
import shutil

import cv2
import numpy as np
import pytest
from playwright.sync_api import sync_playwright
from test_palette import contrast, rgb
from test_report import CHROMIUM, Page, check_in_browser, check_self_contained

from configs import digits
from xmixup_jax.compute import evaluation
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import Data
from xmixup_jax.matching import ClassMatch
from xmixup_jax.report import palette, run

CLASSES, IMAGES = 1000, 2


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    """The folder of a made-up run on a thousand classes."""
    workdir = tmp_path_factory.mktemp('many')
    config = digits.get_config()
    config.target.name = 'folder:many'
    rng = np.random.default_rng(0)
    label = np.arange(CLASSES).repeat(IMAGES)
    names = [f'class number {c}' for c in range(CLASSES)]

    def records():
        return Records.from_arrays(
            rng.integers(256, size=(len(label), 22, 22), dtype=np.uint8), label, names
        )

    logits = rng.normal(size=(len(label), CLASSES)).astype(np.float32)
    logits[np.arange(len(label)), label] += 3
    tested = evaluation.Tested(logits, label.astype(np.int32), np.arange(len(label)))
    similarity = rng.uniform(size=(CLASSES, 1)).astype(np.float32)
    match = ClassMatch(np.arange(CLASSES, dtype=np.int32)[:, None], similarity)
    inputs = {
        'image': rng.integers(256, size=(32, 20, 20, 3), dtype=np.uint8),
        'label': np.arange(32),
        'source_label': np.arange(32),
        'lam': rng.uniform(0.5, 1, size=32),
    }
    lines = ['step,loss,top1,learning_rate,images_per_second']
    lines += [f'{step},{100 / step},{step / 10_000},0.01,100' for step in range(1, 10_000)]
    (workdir / 'metrics.csv').write_text('\n'.join(lines))
    environment = {'versions': {'jax': '0'}, 'command': ['xmixup', 'train']}
    (workdir / 'environment.json').write_text(json.dumps([environment]))
    result = {
        'method': 'xmixup',
        'seed': 0,
        **tested.metrics,
        'macro_top1': tested.metrics['top1'],
        'steps': 10_000,
        'images_per_second': 100.0,
        'first_step_seconds': 1.0,
        'seconds': 4000.0,
        'train_images': len(label),
        'test_images': len(label),
        'skipped_images': 0,
        'num_classes': CLASSES,
        'devices': '1 x cpu',
        'commit': None,
    }
    data = Data(records(), records(), records())
    run.write_report(workdir, config, result, data, match, inputs, tested)
    return workdir


def test_a_thousand_classes_fit_on_a_page(many):
    page = Page(many / 'report.html')
    check_self_contained(page)
    check_in_browser(many / 'report.html')
    # 200 pairs of two classes, two images each; mixed images; 8 mistakes of 6 classes; plots.
    assert len(page.all('img')) <= 200 * 4 + 16 + 6 * 8 + 5
    assert len(page.tags) < 15_000
    pictures = sum(len(image['src']) for image in page.all('img') if image['class'] == 'thumb')
    plots = sum(len(image['src']) for image in page.all('img') if image['class'] == 'plot')
    assert plots < 500_000
    assert len(page.source) - pictures - plots < 500_000
    # The table and most pairs are folded.
    opened = [attributes for attributes in page.all('details') if 'open' in attributes]
    assert len(page.all('details')) == 4 and opened == []
    assert page.text.count('class number 999') >= 1


def test_reading_order(many):
    page = Page(many / 'report.html')
    sections = [attributes['id'] for name, attributes in page.tags if name == 'h2']
    assert sections == [
        *('training', 'advice', 'inputs', 'match', 'mistakes'),
        *('classes', 'confusion', 'calibration', 'configuration'),
    ]
    contents = [link['href'] for link in page.all('a')]
    assert contents == [f'#{section}' for section in sections]
    facts = page.text[: page.text.index('Expected calibration')]
    for words in ('Test images 2000', 'Steps 10000', 'Time 1 h 7 min', 'Method xmixup'):
        assert words in facts


def test_structure_for_screen_readers_and_keyboards(many):
    page = Page(many / 'report.html')
    tags = [name for name, _ in page.tags]
    assert page.all('html')[0]['lang'] == 'en'
    assert [tags.count(name) for name in ('h1', 'header', 'main', 'nav')] == [1] * 4
    ids = [attributes['id'] for _, attributes in page.tags if 'id' in attributes]
    assert len(ids) == len(set(ids))
    targets = [link['href'].removeprefix('#') for link in page.all('a')]
    assert targets and set(targets) <= set(ids)
    levels = [int(name[1]) for name in tags if name in ('h1', 'h2', 'h3')]
    assert levels[0] == 1 and max(np.diff(levels)) <= 1  # none is skipped
    for header in page.all('th'):
        assert header['scope'] in ('row', 'col')
    for _, attributes in page.tags:
        if attributes.get('class') == 'scroll':
            assert attributes['tabindex'] == '0' and attributes['aria-labelledby'] in ids
    assert all(meter['aria-label'] for meter in page.all('meter'))
    assert all(image['alt'] for image in page.all('img'))


@pytest.mark.skipif(not CHROMIUM, reason='needs Chromium')
@pytest.mark.parametrize('mode', ['light', 'dark'])
def test_pages_and_plots_follow_the_colour_scheme(many, mode, tmp_path):
    colours = {'light': palette.LIGHT, 'dark': palette.DARK}[mode]
    path = shutil.copy(many / 'report.html', tmp_path)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu']
        )
        page = browser.new_page(viewport={'width': 1200, 'height': 800}, color_scheme=mode)
        page.goto(f'file://{path}')
        tops = page.eval_on_selector_all(
            '.plot',
            'plots => plots.map(p => p.getBoundingClientRect()).map(r => [r.top, r.bottom])',
        )
        shots = [plot.screenshot() for plot in page.locator('.plot').all()]
        background = page.evaluate('getComputedStyle(document.body).backgroundColor')
        browser.close()
    # The curves are one row of the first screen.
    assert len({round(top) for top, _ in tops[:3]}) == 1 and tops[0][1] < 800
    paper = rgb(colours['paper'])
    assert background == f'rgb({", ".join(str(round(255 * x)) for x in paper)})'
    assert len(shots) == 5
    for shot in shots:
        pixels = cv2.imdecode(np.frombuffer(shot, np.uint8), cv2.IMREAD_COLOR)[..., ::-1] / 255
        np.testing.assert_allclose(pixels[2, 2], paper, atol=0.01)
        shades = np.unique(pixels.reshape(-1, 3), axis=0)
        assert max(contrast(shade, paper) for shade in shades) > 7  # its text
