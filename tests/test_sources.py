"""The kinds of data sets: their interface, lists of files in CSV, and arrays in memory."""

import csv
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from xmixup_jax import defaults
from xmixup_jax.cli import prepare
from xmixup_jax.data.pairing import eval_batches
from xmixup_jax.data.records import Records, Store
from xmixup_jax.data.selection import open_split, train_and_test
from xmixup_jax.data.sources import KINDS, file_list, find_source, problem, short_name
from xmixup_jax.errors import DataError

RNG = np.random.default_rng(0)


def write_images(root, names, side=6):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(256, size=(side, side + 3, 3), dtype=np.uint8)).save(
            root / name
        )


def write_list(path, rows, columns=('path', 'label'), encoding='utf-8'):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', newline='', encoding=encoding) as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return defaults.dataset(f'csv:{path}', 'train', 'test')


def contents(records):
    """(class, bytes) of every record, from the files themselves."""
    return [
        (records.class_names[label], Path(records.describe(i)).read_bytes())
        for i, label in enumerate(records.labels)
    ]


# The interface


@pytest.mark.parametrize(
    ('name', 'module', 'what', 'short'),
    [
        ('cifar10', 'tfds', 'cifar10', 'cifar10'),
        ('tfds:cifar10', 'tfds', 'cifar10', 'cifar10'),
        ('imagenet_resized/64x64:0.1.0', 'tfds', 'imagenet_resized/64x64:0.1.0', '64x64:0.1.0'),
        ('cifar10:3.*.*', 'tfds', 'cifar10:3.*.*', 'cifar10:3.*.*'),
        ('tfds:huggingface:mnist', 'tfds', 'huggingface:mnist', 'huggingface:mnist'),
        ('folder:data/photos/', 'folder', 'data/photos/', 'photos'),
        ('folder:a:b', 'folder', 'a:b', 'a:b'),
        ('folder:1.0.0', 'folder', '1.0.0', '1.0.0'),
        ('csv:/x/list.csv', 'file_list', '/x/list.csv', 'list.csv'),
        ('folder:.', 'folder', '.', 'data'),
    ],
)
def test_a_name_gives_the_kind(name, module, what, short):
    source, found = find_source(name)
    assert (source.__name__.rpartition('.')[2], found) == (module, what)
    assert short_name(name) == short


def test_every_kind_keeps_the_contract():
    for kind in KINDS:
        source, _ = find_source(f'{kind}:x')
        assert all(callable(getattr(source, name)) for name in ('problem', 'open', 'prepare'))


def test_an_unknown_kind_is_one_line_that_lists_them(config):
    config.target.name = 'fodler:photos'
    words = problem('fodler:photos', config)
    assert "there is no kind of data set called 'fodler'; use tfds:..., folder:..., csv:" in words
    assert '\n' not in words
    with pytest.raises(DataError, match="called 'fodler'"):
        open_split(config.target, 'train', config)


def test_opening_a_module_imports_no_heavy_library():
    code = (
        'import sys, xmixup_jax.data.selection, xmixup_jax.data.sources.folder\n'
        'print([m for m in ("tensorflow_datasets", "cv2", "jax") if m in sys.modules])'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


def test_a_kind_of_another_package(tmp_path, monkeypatch, config):
    """The example of docs/howto/data_sources.md."""
    page = (Path(__file__).parents[1] / 'docs' / 'howto' / 'data_sources.md').read_text()
    (tmp_path / 'zipped.py').write_text(re.search('```python\n(.*?)```', page, re.DOTALL)[1])
    monkeypatch.syspath_prepend(tmp_path)
    point = importlib.metadata.EntryPoint('zip', 'zipped', 'xmixup_jax.sources')
    monkeypatch.setattr(
        importlib.metadata, 'entry_points', lambda group: [point] if group == point.group else []
    )
    names = ['train/b/1.png', 'train/a/2.png', 'train/a/1.png', 'test/a/3.png', 'test/b/4.png']
    write_images(tmp_path, names)
    with zipfile.ZipFile(tmp_path / 'images.zip', 'w') as archive:
        for name in names:
            archive.write(tmp_path / name, name)
    zipped = defaults.dataset(f'zip:{tmp_path}/images.zip', 'train', 'test')
    folder = defaults.dataset(f'folder:{tmp_path}', 'train', 'test')
    for a, b in zip(train_and_test(zipped, config), train_and_test(folder, config), strict=True):
        assert (a.class_names, a.labels.tolist()) == (b.class_names, b.labels.tolist())
        for i in range(len(a)):
            np.testing.assert_array_equal(a.image(i, 6), b.image(i, 6))
    assert len(train_and_test(zipped, config)[0]) == 3
    assert 'none.zip does not exist: make it first' in problem('zip:none.zip', config)
    assert 'csv:..., zip:...' in problem('zap:x', config)


def test_prepare_says_all_that_is_missing(tmp_path, monkeypatch, config, capsys):
    """`prepare` lists everything that is missing, and prepares the rest."""
    config.data_dir, config.target.name = str(tmp_path), 'uci_digits'
    config.source.name = 'fgvc_aircraf'
    monkeypatch.setattr(prepare, 'read_command', lambda argv: (config, tmp_path / 'run'))
    with pytest.raises(DataError, match=r'fgvc_aircraf: .*did you mean fgvc_aircraft'):
        prepare.run(['prepare'])
    assert list(tmp_path.glob('uci_digits/*/dataset_info.json'))
    config.target.name = f'folder:{tmp_path}/none'
    config.source.name = f'csv:{tmp_path}/none.csv'
    with pytest.raises(DataError, match=r'config.target.name: image folder .*\n.*list of images'):
        prepare.run(['prepare'])


# Lists of files


def test_a_list_with_splits(tmp_path, config):
    files = {'x/1.png': 'dog', 'x/2.png': 'cat', 'y.png': 'Ünï, "quoted"', 'z.png': 'cat'}
    write_images(tmp_path, files)
    splits = ['train', 'train', 'train', 'test']
    rows = [
        (str(tmp_path / name) if i % 2 else name, label, split)
        for i, ((name, label), split) in enumerate(zip(files.items(), splits, strict=True))
    ]
    columns = ('path', 'label', 'split')
    dataset = write_list(tmp_path / 'list.csv', rows, columns, 'utf-8-sig')
    train, test = train_and_test(dataset, config)
    assert train.class_names == test.class_names == ('cat', 'dog', 'Ünï, "quoted"')
    for records, split in ((train, 'train'), (test, 'test')):
        with (tmp_path / 'list.csv').open(encoding='utf-8-sig', newline='') as file:
            expected = [
                (row['label'], (tmp_path / row['path']).read_bytes())
                for row in csv.DictReader(file)
                if row['split'] == split
            ]
        assert sorted(contents(records)) == sorted(expected)
    pixels = np.asarray(Image.open(tmp_path / 'z.png'))[:, 1:7]
    np.testing.assert_array_equal(test.image(0, 6), pixels)


def test_a_list_without_splits_is_divided_as_the_folder_is(tmp_path, config):
    names = [f'{c}/{i}.png' for c, n in {'a': 10, 'b': 3, 'c': 1}.items() for i in range(n)]
    write_images(tmp_path / 'images', names)
    rows = [(f'images/{name}', name[0]) for name in reversed(names)]
    listed = write_list(tmp_path / 'list.csv', rows)
    folder = defaults.dataset(f'folder:{tmp_path}/images', 'train', 'test')
    listed.test_share = folder.test_share = 0.3
    for a, b in zip(train_and_test(listed, config), train_and_test(folder, config), strict=True):
        assert (a.class_names, a.labels.tolist()) == (b.class_names, b.labels.tolist())
        assert contents(a) == contents(b)


@given(st.permutations(range(9)))
def test_the_order_of_the_rows_has_no_effect(tmp_path_factory, order):
    root = tmp_path_factory.getbasetemp() / 'permuted'
    names = [f'{i}.png' for i in range(9)]
    if not root.exists():
        write_images(root, names)
    rows = [(name, 'ab'[i % 2]) for i, name in enumerate(names)]
    dataset = write_list(root / 'list.csv', [rows[i] for i in order])
    config = defaults.get_config()
    for records, count in zip(train_and_test(dataset, config), (7, 2), strict=True):
        assert len(records) == count
        plain = write_list(root / 'plain.csv', rows)
        same = open_split(plain, 'train' if count == 7 else 'test', config)
        assert records.identity == same.identity


BAD = {
    'a column is missing': (
        'path;label\n1.png;a\n',
        r"no column 'path': its first line is 'path;label' and should be path,label or path,label",
    ),
    'nothing': ('', r"no column 'path': its first line is '' and"),
    'no rows': ('path,label\n', r'lists no images: add rows below its header'),
    'no label': ('path,label\n1.png,a\n2.png, \n', r'rows without a label: 1 \(line 3\)'),
    'a short row': ('path,label\n1.png\n', r'rows without a label: 1 \(line 2\)'),
    'a comma': ('path,label\n1,5.png,a\n', r'with more values than the header has columns: 1'),
    'no path': ('path,label\n,a\n', r'rows without a path: 1 \(line 2\)'),
    'a row twice': (
        'path,label\n1.png,a\n./1.png,b\n2.png,a\n',
        r'lists 1 files more than once \(.*1\.png\): keep one row each',
    ),
    'files are missing': (
        'path,label,split\n1.png,a,train\n' + ''.join(f'none{i}.png,a,train\n' for i in range(8)),
        r'8 of 9 files listed in .* are missing \(.*none0\.png, .*, \.\.\.\): paths are relative',
    ),
    'a folder': ('path,label\n.,a\n', r'1 of 1 files listed in .* are missing'),
    'an unknown split': (
        'path,label,split\n1.png,a,fold1\n2.png,a,val\n',
        r"no split 'train': it has fold1, val: use --config.target.split=fold1 or",
    ),
    'a class is not trained': (
        'path,label,split\n1.png,a,train\n2.png,b,test\n',
        r"no images of b in the split 'train'",
    ),
    'another encoding': (b'path,label\n1.png,\xff\xfe\n', r'not a comma-separated table in UTF-8'),
    'a null byte': (b'path,label\n\x00.png,a\n', r'1 of 1 files .* are missing'),
}


@pytest.mark.parametrize('name', BAD)
def test_a_bad_list_ends_in_one_line(tmp_path, config, name):
    content, words = BAD[name]
    write_images(tmp_path, ['1.png', '2.png'])
    path = tmp_path / 'list.csv'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=words) as info:
        open_split(defaults.dataset(f'csv:{path}', 'train', 'test'), 'train', config)
    assert '\n' not in str(info.value) and str(path) in str(info.value)


def test_missing_files_are_counted_and_five_are_named(tmp_path, config):
    write_images(tmp_path, ['1.png'])
    rows = [('1.png', 'a', 'train')] + [(f'none{i}.png', 'a', 'train') for i in range(9)]
    dataset = write_list(tmp_path / 'list.csv', rows, ('path', 'label', 'split'))
    with pytest.raises(DataError, match=r'9 of 10 files') as info:
        open_split(dataset, 'train', config)
    assert [f'none{i}.png' in str(info.value) for i in range(9)] == [True] * 5 + [False] * 4


def test_a_list_that_does_not_exist(tmp_path, config):
    assert 'none.csv does not exist' in problem(f'csv:{tmp_path}/none.csv', config)
    assert file_list.prepare('x', config) is None


# Arrays


def test_arrays_are_decoded_as_files_of_the_same_pixels(tmp_path, config):
    sizes = [(20, 30), (9, 9), (41, 17), (8, 8)]
    images = [RNG.integers(256, size=(*size, 3), dtype=np.uint8) for size in sizes]
    images[3] = images[3][..., 0]
    for i, image in enumerate(images):
        (tmp_path / 'train/a').mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / f'train/a/{i}.png')
    dataset = defaults.dataset(f'folder:{tmp_path}', 'train', '')
    files = Records.from_arrays(images, np.zeros(4, np.int64), ['a'])
    for side in (8, 13):
        for a, b in zip(
            *(
                list(eval_batches(records, batch_size=2, resize=side, num_threads=1))
                for records in (files, open_split(dataset, 'train', config))
            ),
            strict=True,
        ):
            np.testing.assert_array_equal(a['image'], b['image'])
            np.testing.assert_array_equal(a['label'], b['label'])


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.booleans(), st.data())
def test_arrays_of_one_size(count, height, width, grey, data):
    shape = (count, height, width) if grey else (count, height, width, 3)
    images = np.random.default_rng(count).integers(256, size=shape, dtype=np.uint8)
    labels = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    records = Records.from_arrays(images, np.array(labels, np.uint8), 'abc', name='mine')
    assert (records.labels.tolist(), records.labels.dtype) == (labels, np.int32)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    for i in range(count):
        middle = images[i, top : top + side, left : left + side]
        expected = np.stack([middle] * 3, axis=-1) if grey else middle
        np.testing.assert_array_equal(records.image(i, side), expected)
    assert records.describe(count - 1) == f'image {count - 1} of mine'


def images(*shape, kind=np.uint8):
    return np.zeros(shape, kind)


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ((images(0, 4, 4), images(0), 'a'), 'has no images'),
        ((images(2, 4, 4), images(3, kind=int), 'a'), r'labels of t are int64 \[3\]: .* \[2\]'),
        ((images(2, 4, 4), images(2, kind=float), 'a'), r'labels of t are float64 \[2\]'),
        (
            (images(2, 4, 4), np.array([0, 2]), 'ab'),
            r'from 0 to 2: they must be indices into class_names, from 0 to 1',
        ),
        ((images(2, 4, 4), np.array([0, -1]), 'ab'), r'from -1 to 0'),
        ((images(1, 4, 4), [0], 'aa'), 'name twice'),
        ((images(1, 4, 4, 3, kind=np.float32), [0], 'a'), r'image 0 of t is float32: .*uint8'),
        ((images(1, 3, 4, 4), [0], 'a'), r'shape \[3, 4, 4\]: it must be \[H, W, 3\]'),
        (([images(4, 4), images(0, 4)], [0, 0], 'a'), r'image 1 of t has shape \[0, 4\]'),
        (([[[1]]], [0], 'a'), r'image 0 of t is list'),
    ],
)
def test_bad_arrays_end_in_one_line(arguments, words):
    with pytest.raises(DataError, match=words):
        Records.from_arrays(*arguments, name='t')


def test_selections_share_what_is_bad_and_kept():
    records = Records.from_arrays(images(3, 4, 4), [0, 0, 1], 'ab')
    assert isinstance(records.store, Store)
    assert records.select(np.array([2])).store is records.store
