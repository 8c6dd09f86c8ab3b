"""Colours: contrasts by the WCAG formula, and plots that follow the reader's colour scheme."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmixup_jax.report import figures, palette
from xmixup_jax.report.scores import reliability

TEXT, MARK = 4.5, 3.0  # WCAG 2.2, success criteria 1.4.3 (AA) and 1.4.11
MODES = {'light': palette.LIGHT, 'dark': palette.DARK}
TEMPLATES = sorted(Path(palette.__file__).parent.glob('*.html'))


def rgb(colour):
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def luminance(channels):
    """Relative luminance, WCAG 2.2."""
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one, other):
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_the_formula_gives_published_values():
    white = rgb('#ffffff')
    assert contrast(white, rgb('#000000')) == pytest.approx(21)
    # The two greys on either side of AA: https://webaim.org/resources/contrastchecker
    assert contrast(white, rgb('#767676')) == pytest.approx(4.54, abs=0.005)
    assert contrast(white, rgb('#777777')) == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize('mode', MODES)
def test_contrast(mode):
    colours = {name: rgb(value) for name, value in MODES[mode].items()}
    for name in ('text', 'note', 'link', 'target', 'source'):
        assert contrast(colours[name], colours['paper']) >= TEXT, name
    for name in ('text', 'note'):
        assert contrast(colours[name], colours['panel']) >= TEXT, name
    for name in ('text', 'target', 'source', 'axis', 'note'):
        assert contrast(colours[name], colours['paper']) >= MARK, name
    # Numbers in a confusion matrix stand on a cell of any opacity.
    for share in np.linspace(0, 1, 101):
        cell = share * colours['cell'] + (1 - share) * colours['paper']
        assert contrast(colours['text'], cell) >= TEXT, share
    assert contrast(rgb(palette.MATRIX), colours['paper']) >= MARK


def test_both_modes_have_the_same_colours():
    assert palette.LIGHT.keys() == palette.DARK.keys()
    # `figures.svg` finds the name of a colour by its value.
    assert len(set(palette.LIGHT.values())) == len(palette.LIGHT)


def test_pages_use_no_other_colours():
    used = set()
    for path in TEMPLATES:
        text = path.read_text()
        assert not re.findall(r'#[0-9a-fA-F]{3,8}\b(?=[;} ])|rgba?\(', text), path.name
        used |= set(re.findall(r'var\(--(\w+)\)', text))
    assert used and used <= palette.LIGHT.keys()


def documents():
    rng = np.random.default_rng(0)
    points = [(step, 1 / (1 + step)) for step in range(5)]
    names = ['<b>', '$x$', 'fill: #1c1c1e', '&amp;']
    probabilities = rng.dirichlet(np.ones(4), size=50)
    return {
        'curves': figures.curves({'training': points, 'test': points[-1:]}, 'loss', log=True),
        'few': figures.confusion(rng.integers(9, size=(4, 4)), names),
        'many': figures.confusion(rng.integers(9, size=(30, 30)), list('abcdefghij' * 3)),
        'reliability': figures.reliability(reliability(probabilities, rng.integers(4, size=50))),
        'trade-off': figures.trade_off({'finetune': (1, 50, 1), 'xmixup': (2, 60, 1)}, 'finetune'),
    }


@pytest.mark.parametrize('name, document', documents().items())
def test_plots_take_their_colours_from_the_palette(name, document):
    root = ET.fromstring(document)  # noqa: S314  (our own)
    style = root.find('.//{*}style').text
    light, dark = style.split('@media (prefers-color-scheme: dark)')
    assert palette.properties(palette.LIGHT) in light
    assert palette.properties(palette.DARK) in dark
    styles = ' '.join(element.get('style', '') for element in root.iter())
    literal = {*palette.LIGHT.values(), '#000000', '#ffffff'}
    assert not literal & set(re.findall(r'#[0-9a-f]{6}', styles))
    assert set(re.findall(r'var\(--(\w+)\)', styles)) <= palette.LIGHT.keys()
    words = [element.text for element in root.iter('{http://www.w3.org/2000/svg}text')]
    if name == 'few':  # names are shown as they are
        assert words.count('<b>') == words.count('$x$') == words.count('&amp;') == 2


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_a_large_confusion_matrix_loses_no_class(side, count, seed):
    """The largest value of each block, against a loop over its cells."""
    values = np.random.default_rng(seed).random((count, count))
    found = figures.block_maximum(values, side)
    assert found.shape == (-(-count // side),) * 2
    for i, j in np.ndindex(found.shape):
        cells = [
            values[a, b]
            for a in range(i * side, min(count, (i + 1) * side))
            for b in range(j * side, min(count, (j + 1) * side))
        ]
        assert found[i, j] == max(cells)


def test_size_of_a_large_confusion_matrix():
    document = figures.confusion(np.eye(1000, dtype=int), [str(c) for c in range(1000)])
    assert len(document) < 200_000
    assert 'the largest of 7 × 7 classes' in document
