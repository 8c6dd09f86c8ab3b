"""The model card of an export, and whom to cite: against the run's own files and other programs."""

import csv
import importlib
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch_networks import timm

import xmixup_jax
from configs import digits
from xmixup_jax.cli import export
from xmixup_jax.config import choose_method
from xmixup_jax.data.decode import FITS, square
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods import METHODS
from xmixup_jax.methods.find import method_of
from xmixup_jax.report.card import ROWS, card
from xmixup_jax.report.facts import RunFacts, read_run, wilson
from xmixup_jax.report.papers import PAPERS, XMIXUP
from xmixup_jax.weights.licences import licence_of

ROOT = Path(__file__).parents[1]


def exported(workdir, folder, form, *flags):
    """(text of the card, path of the exported file)."""
    path = folder / export.FILES[form]
    export.run(
        ['export', f'--workdir={workdir}', f'--format={form}', f'--output={folder}/', *flags]
    )
    return path.with_name(path.name + '.md').read_text(encoding='utf-8'), path


def predictions(workdir):
    """(true classes, predicted classes, probabilities [N, K]) in predictions.csv."""
    with (workdir / 'predictions.csv').open(newline='') as file:
        header, *rows = csv.reader(file)
    label, predicted = ([header[3:].index(row[i]) for row in rows] for i in (1, 2))
    return np.array(label), np.array(predicted), np.array([row[3:] for row in rows], float)


def table(text, heading, columns=2):
    """The rows of the first table with so many columns below a heading."""
    lines = text.partition(f'\n## {heading}\n')[2].partition('\n## ')[0].splitlines()
    rows = [re.split(r'(?<!\\)\|', line)[1:-1] for line in lines if line.startswith('|')]
    return [[cell.strip() for cell in row] for row in rows if len(row) == columns][2:]


def by_hand(right, count):
    """Wilson's interval from its formula."""
    z, p = 1.959963984540054, right / count
    middle = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    return middle - half, middle + half


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval(counts):
    assert wilson(*counts) == pytest.approx(by_hand(*counts), abs=1e-9)


def test_numbers_are_those_of_the_run(finished_run, tmp_path):
    config, workdir, result = finished_run
    text, _ = exported(workdir, tmp_path, 'safetensors')
    label, predicted, probabilities = predictions(workdir)
    right = int(np.sum(label == predicted))
    low, high = by_hand(right, len(label))

    shown = dict(table(text, 'Scores'))
    assert shown['test images'] == f'{len(label):,}' == f'{result["test_images"]:,}'
    assert shown['top-1 accuracy'] == f'{100 * right / len(label):.2f} %'
    assert shown['its 95 % interval (Wilson)'] == f'{100 * low:.1f} to {100 * high:.1f} %'
    f1 = []
    for c in range(10):
        both = np.sum((label == c) & (predicted == c))
        f1.append(2 * both / (np.sum(label == c) + np.sum(predicted == c)))
    assert shown['macro F1'] == f'{100 * np.mean(f1):.2f} %'
    sure = probabilities.max(1)
    bins = np.clip(np.ceil(15 * sure) - 1, 0, 14)
    gaps = [np.sum((label == predicted)[bins == b]) - np.sum(sure[bins == b]) for b in range(15)]
    ece = 100 * np.sum(np.abs(gaps)) / len(label)
    assert float(shown['expected calibration error'][:-2]) == pytest.approx(ece, abs=0.02)

    rows = table(text, 'Scores', columns=7)
    with (workdir / 'per_class.csv').open(newline='') as file:
        for row, expected in zip(rows, csv.DictReader(file), strict=True):
            name, training, *figures, confused = row
            assert name == f'`{expected["class"]}`' and training == str(config.target.shots)
            assert figures[0] == expected['images']
            shares = [float(expected[key]) for key in ('precision', 'recall', 'f1')]
            assert list(map(float, figures[1:])) == pytest.approx(shares, abs=6e-4)
            assert confused.startswith(f'`{expected["most_confused_with"]}`'.replace('``', ''))

    data = json.loads((workdir / 'data.json').read_text())
    parts = {row[0]: row[1:] for row in table(text, 'Data', columns=5)}
    assert parts['training'][0] == '`uci_digits`' and parts['source'][0] == '`mnist5k`'
    for part, key in {'training': 'target', 'test': 'test', 'source': 'source'}.items():
        assert parts[part][2].startswith(f'{sum(data[key]["counts"]):,}')
    assert parts['training'][2:] == ['50; 5 of each class, drawn by the seed', '5']

    training = dict(table(text, 'Training'))
    assert training['seed'] == '`0`' and training['steps'] == '`6, of 16 images`'
    assert training['method'].startswith('`xmixup xmixup.alpha=0.2') and XMIXUP in text
    assert f'jax {importlib.import_module("jax").__version__}' in training['versions']


def test_metadata_are_those_of_the_hub(finished_run, tmp_path):
    _, workdir, result = finished_run
    text, _ = exported(workdir, tmp_path, 'onnx')
    read = yaml.safe_load(text.split('---\n')[1])
    assert read['library_name'] == 'onnx' and read['pipeline_tag'] == 'image-classification'
    assert read['license'] == 'unknown' and read['datasets'] == ['uci_digits']
    data = ModelCard(text).data  # raises where the results are not as the Hub has them
    found = {each.metric_name: each.metric_value for each in data.eval_results}
    assert found['top-1 accuracy'] == result['top1'] and found['macro F1'] == result['macro_f1']
    assert {each.task_type for each in data.eval_results} == {'image-classification'}
    assert data.model_name == 'uci_digits-resnet6-xmixup'


@pytest.mark.parametrize('form', export.FILES)
def test_the_snippet_loads_the_file(finished_run, tmp_path, monkeypatch, capsys, form):
    config, workdir, _ = finished_run
    text, _ = exported(workdir, tmp_path, form)
    # Of the size that the network wants: others are scaled a little differently by Pillow.
    pixels = np.random.default_rng(0).integers(
        256, size=(config.resize,) * 2 + (3,), dtype=np.uint8
    )
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    shutil.copy(tmp_path / 'image.png', tmp_path / 'image.jpg')  # the content tells the format
    (code,) = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    names = {}
    exec(code, names)  # noqa: S102
    trained = xmixup_jax.load(workdir)
    if form == 'torch':
        assert names['state_dict']['fc.weight'].shape[0] == 10
    elif form == 'orbax':
        np.testing.assert_array_equal(names['params']['fc']['bias'], trained.params['fc']['bias'])
    else:
        (prediction,) = trained.predict(pixels)
        assert capsys.readouterr().out.split()[0] == prediction.class_names[0]


def test_the_other_networks_of_a_run(finished_run, tmp_path):
    _, workdir, result = finished_run
    text, _ = exported(workdir, tmp_path, 'safetensors', '--network=best')
    shown = dict(table(text, 'Scores'))
    assert shown['top-1 accuracy'] == f'{100 * result["best_top1"]:.2f} %'
    assert 'chosen among several by its accuracy on the test images' in text
    assert 'By class' not in text and 'macro F1' not in text

    # An exported file alone says nothing of its run.
    text, _ = exported(tmp_path / 'model.safetensors', tmp_path / 'again', 'safetensors')
    assert 'this card has no scores' in text and '## Scores' not in text and '## Data' not in text


@pytest.mark.parametrize('fit', FITS)
def test_the_snippet_prepares_images_as_the_run_did(fit, tmp_path):
    text = made_card(['a', 'b'], form='onnx', fit=fit, resize=24, image_size=20)
    code = re.search(r'^image = .*?(?=^start = )', text, re.DOTALL | re.MULTILINE)[0]
    coarse = np.random.default_rng(1).integers(256, size=(3, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((160, 96), Image.Resampling.BICUBIC)
    image.save(tmp_path / 'image.png')
    code = code.replace("'image.jpg'", repr(str(tmp_path / 'image.png')))
    names = {'Image': Image, 'ImageOps': ImageOps, 'resize': 24}
    exec(code, names)  # noqa: S102
    difference = np.asarray(names['square'], int) - square(np.asarray(image), 24, fit)
    assert np.abs(difference).mean() < 2 and difference.shape == (24, 24, 3)


def test_an_edited_card_is_kept(finished_run, tmp_path):
    _, workdir, _ = finished_run
    text, path = exported(workdir, tmp_path, 'safetensors')
    assert exported(workdir, tmp_path, 'safetensors')[0] == text  # its own card is written anew
    own = path.with_name(path.name + '.md')
    own.write_text('mine')
    path.unlink()
    with pytest.raises(ConfigError, match=r'model\.safetensors\.md is not, or no longer, a card'):
        exported(workdir, tmp_path, 'safetensors')
    assert own.read_text() == 'mine' and not path.exists()


def made_up(names, **changes):
    """(configuration, facts) of a run that was never made: one right image of each class in two."""
    config = digits.get_config()
    config.target.name = 'folder:/home/alice/secret/my photos'
    config.source.name = 'csv:/home/alice/secret/list.csv'
    config.weights = '/home/alice/secret/weights.pth'
    choose_method(config, 'finetune')
    config.update_from_flattened_dict(changes)
    count = len(names)
    rows = [
        {'class': name, 'images': '2', 'precision': '0.5', 'recall': '0.5', 'f1': f'{c / count}'}
        | {'most_confused_with': names[0], 'confused': '1'}
        for c, name in enumerate(names)
    ]
    used = {part: {'data': config.target.name, 'notes': []} for part in ('target', 'test')}
    result = {'top1': 0.5, 'loss': 1.0, 'steps': config.steps, 'test_images': 2 * count}
    result |= {'data': used, 'commit': None, 'devices': '1 x cpu', 'macro_f1': 0.5}
    counts = {'target': [3] * count, 'test': [2] * count}
    host = {'host': 'alices-machine', 'versions': {}, 'command': ['/home/alice/xmixup']}
    return config, RunFacts(result, host, counts, rows, None)


def made_card(names, network='final', form='torch', **changes):
    config, run = made_up(names, **changes)
    return card(config, names, network, run, licence_of(config.weights), form, 'x.pth', '1.2')


def test_nothing_private(tmp_path):
    text = made_card(['a', 'b'])
    for word in ('alice', 'secret', '/home'):
        assert word not in text
    assert '`my photos`' in text and '`weights.pth`' in text


def test_names_cannot_break_the_card():
    names = ['a|b', '`x`', 'two\nlines', '<script>', 'caf\udce9', '**bold**', '---', 'a`b``c']
    text = made_card(names)
    assert '\n---\n' not in text.partition('\n---\n')[2]
    rows = table(text, 'Scores', columns=7)
    assert len(rows) == len(names)
    assert [row[0] for row in rows[:3]] == [r'`a\|b`', '`` `x` ``', r'`two\nlines`']
    assert rows[7][0] == '``` a`b``c ```'
    text.encode()


def test_a_long_table_has_the_worst_classes():
    names = [f'class{c}' for c in range(ROWS + 20)]
    rows = table(made_card(names), 'Scores', columns=7)
    assert [row[0] for row in rows] == [f'`class{c}`' for c in range(ROWS)]
    assert f'all {ROWS + 20} are in the run\'s `per_class.csv`' in made_card(names)  # fmt: skip


def test_licences_are_in_the_card():
    text = made_card(['a', 'b'], weights='timm/resnet50.tv_in1k', **{'model.name': 'resnet50'})
    read = yaml.safe_load(text.split('---\n')[1])
    assert (read['license'], read['base_model']) == ('bsd-3-clause', 'timm/resnet50.tv_in1k')
    assert licence_of('timm/resnet50.tv_in1k').statement in text
    text = made_card(['a', 'b'])
    assert yaml.safe_load(text.split('---\n')[1])['license'] == 'unknown'
    assert 'weights `weights.pth`: Unknown: check it where you got the weights.' in text


def test_limits_follow_from_the_facts():
    text = made_card(['a', 'b'], test_views=10, precision='bfloat16')
    assert '2 of 2 classes have fewer than 10 training images (`a`, `b`).' in text
    assert 'average 10 views' in text and 'tested in bfloat16' in text
    text = made_card(['a', 'b'])
    assert 'views' not in text and 'bfloat16' not in text and 'stopped' not in text
    low, high = by_hand(2, 4)
    assert f'Its 95 % interval, {100 * low:.1f} to {100 * high:.1f} %, covers' in text
    assert 'views' not in made_card(['a', 'b'], form='safetensors', test_views=10)
    assert 'this card has no scores' in made_card(['a', 'b'], network='ema')
    text = made_card(['a', 'b'], freeze='backbone')
    assert 'linear classifier of the features' in text
    assert dict(table(text, 'Training'))['method'] == '`linear probe`'


@pytest.mark.parametrize('method', METHODS)
def test_papers_are_those_of_the_methods(method):
    authors, title, where = PAPERS[method]
    text = ' '.join(importlib.import_module(f'xmixup_jax.methods.{method}').__doc__.split())
    text = text.replace('arXiv: ', 'arXiv ')
    assert authors.split(',')[0].split(' ')[0] in text
    assert where.split()[-1] in text
    assert title.split(':')[0] in text
    assert method == 'finetune' or title in text
    config = digits.get_config()
    config.method = method
    assert method_of(config) is METHODS[method]


def test_licences_are_those_that_timm_states():
    matched = 0
    for name in timm.list_pretrained():
        licence = licence_of(f'timm/{name}')
        stated = timm.get_pretrained_cfg(name).license
        if licence.identifier and not name.endswith('.openai'):  # OpenAI's own repository: MIT
            assert licence.identifier == stated, name
            matched += 1
    assert matched > 50
    assert licence_of('timm/resnet50.tv_in1k').identifier == 'bsd-3-clause'
    assert licence_of('timm/resnet50.fb_ssl_yfcc100m_ft_in1k').identifier == 'cc-by-nc-4.0'
    assert licence_of('timm/vit_small_patch14_dinov2.lvd142m').identifier == 'apache-2.0'
    assert licence_of('timm/vit_base_patch16_clip_quickgelu_224.openai').identifier == 'mit'
    assert licence_of('timm/convnext_base.dinov3_lvd1689m')[1] == ''


@pytest.mark.parametrize(
    ('field', 'file', 'identifier', 'words'),
    [
        ('License-Expression: MIT', '', 'mit', '"MIT", by the metadata'),
        ('License: UNKNOWN', 'Apache Software License 2.0\n\nmore', 'apache-2.0', 'licence file'),
        ('Classifier: License :: OSI Approved :: BSD License', 'x', '', '"OSI Approved :: BSD'),
        ('License: free for friends', 'x', '', '"free for friends", by the metadata'),
        ('Summary: weights', '', '', 'Unknown: check it where you got the weights.'),
    ],
)
def test_licence_of_a_package(tmp_path, monkeypatch, field, file, identifier, words):
    info = tmp_path / 'some_weights-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(
        f'Metadata-Version: 2.4\nName: some-weights\nVersion: 1.0\n{field}\n'
    )
    (info / 'LICENSE').write_text(file)
    (info / 'RECORD').write_text(f'{info.name}/LICENSE,,\n')
    monkeypatch.syspath_prepend(tmp_path)
    licence = licence_of('some-weights')
    assert licence.identifier == identifier and words in licence.statement


def test_unknown_licences(tmp_path):
    for name in ('no-such-package', 'weights.pth', str(tmp_path / 'w.pth'), '~/w.pth#ema'):
        licence = licence_of(name)
        assert licence.identifier == '' and licence.statement.startswith('Unknown')
        assert '/' not in licence.weights and not licence.on_hub
    assert 'https://huggingface.co/me/mine' in licence_of('me/mine').statement


def test_citation_file():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['cff-version'] == '1.2.0'
    assert citation['version'] == xmixup_jax.__version__
    assert citation['license'] == 'Apache-2.0'
    (paper,) = citation['references']
    assert paper['url'] == 'https://arxiv.org/abs/2007.10252'
    assert [each['family-names'] for each in paper['authors']] == PAPERS['xmixup'][0].split(', ')
    assert paper['title'] == PAPERS['xmixup'][1] and f'{{{paper["title"]}}}' in XMIXUP


def test_the_numbers_in_the_documents_are_those_of_the_study():
    cited = (ROOT / 'docs/explanation/cite.md').read_text()
    results = ROOT / 'benchmarks/study/RESULTS.md', ROOT / 'docs/explanation/results.md'
    measured = ' '.join(' '.join(path.read_text() for path in results).split())
    numbers = re.findall(r'[+−][\d.]+ ± [\d.]+\d', cited)
    assert len(numbers) == 6
    assert [number for number in numbers if number not in measured] == []
    assert XMIXUP in cited


def test_a_folder_without_a_run(tmp_path):
    assert read_run(tmp_path) is None
