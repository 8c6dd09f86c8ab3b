"""Runs, caches and networks pre-trained on a source identify their data by content."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_sources import write_images, write_list

from xmixup_jax import defaults
from xmixup_jax.compute import features
from xmixup_jax.data import cache
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import Data, open_split, train_and_test
from xmixup_jax.data.sources import image_files
from xmixup_jax.errors import ConfigError, DataError
from xmixup_jax.run import data_identity, train
from xmixup_jax.run.data_identity import difference
from xmixup_jax.run.train import backbone_weights, train_and_evaluate
from xmixup_jax.run.workdir import damaged_files

FILES = [f'{c}/{i}.png' for c in ('cat', 'dog') for i in range(5)]


@pytest.fixture
def photos(tmp_path):
    """A folder without splits: two classes with five images each."""
    write_images(tmp_path / 'photos', FILES, side=10)
    return tmp_path / 'photos'


def opened(path, config, split='train'):
    return open_split(defaults.dataset(f'folder:{path}', 'train', 'test'), split, config)


def test_it_does_not_depend_on_where_the_folder_is(photos, config, monkeypatch):
    first = opened(photos, config)
    assert first.summary()['digest'] == first.identity
    monkeypatch.chdir(photos.parent)
    assert opened('photos', config).identity == first.identity
    assert opened('./photos/', config).identity == first.identity
    moved = photos.rename(photos.with_name('moved'))
    assert opened(moved, config).identity == first.identity
    copy = shutil.copytree(moved, photos.with_name('copy'))  # keeps the files' times
    assert opened(copy, config).identity == first.identity


def touch(root):
    os.utime(root / 'cat/1.png', ns=(0, 12345))


def grow(root):
    with (root / 'cat/1.png').open('ab') as file:
        file.write(b'x')


@pytest.mark.parametrize(
    'change',
    [
        touch,
        grow,
        lambda root: write_images(root, ['dog/9.png']),
        lambda root: (root / 'dog/4.png').unlink(),
        lambda root: (root / 'dog/4.png').rename(root / 'dog/5.png'),
        lambda root: (root / 'dog/4.png').rename(root / 'cat/5.png'),
        lambda root: (root / 'dog').rename(root / 'emu'),
    ],
)
def test_it_changes_with_the_images(photos, config, change):
    def identities():
        return [opened(photos, config, split).identity for split in ('train', 'test')]

    first = identities()
    change(photos)
    assert identities() != first


def test_equal_names_sizes_and_times_are_not_equal_data(tmp_path, config):
    """Uncompressed images out of an archive with a fixed date."""
    found = set()
    for turn in range(2):
        write_images(tmp_path / str(turn) / 'set', [f'{c}/0.bmp' for c in 'ab'])
        for path in (tmp_path / str(turn)).rglob('*.bmp'):
            os.utime(path, ns=(0, 12345))
        found.add(opened(tmp_path / str(turn) / 'set', config).identity)
    assert len(found) == 2
    # Two files of the same size and time that are exchanged are noticed too.
    a, b = ((tmp_path / f'0/set/{c}/0.bmp') for c in 'ab')
    contents = a.read_bytes(), b.read_bytes()
    for path, content in zip((b, a), contents, strict=True):
        path.write_bytes(content)
        os.utime(path, ns=(0, 12345))
    assert opened(tmp_path / '0/set', config).identity not in found


def test_what_cannot_be_compared_by_content(photos, config, monkeypatch):
    """For many files, names, sizes and times are compared; for large ones, both ends."""
    monkeypatch.setattr(image_files, '_MAX_FILES_HASHED', 3)
    first = opened(photos, config)
    touch(photos)
    assert opened(photos, config).identity != first.identity
    monkeypatch.setattr(image_files, '_MAX_FILES_HASHED', 100)
    monkeypatch.setattr(image_files, '_MAX_BYTES_HASHED', 0)
    monkeypatch.setattr(image_files, '_END_BYTES', 4)
    path = photos / 'cat/1.png'
    lasting = opened(photos, config).summary()['lasting']
    for place, seen in ((0, True), (-1, True), (20, False)):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        assert (opened(photos, config).summary()['lasting'] != lasting) == seen
        content[place] ^= 1
        path.write_bytes(content)


def test_lists_and_their_images(photos, config, tmp_path):
    def listed(path, rows):
        return open_split(write_list(path, rows), 'train', config).identity

    rows = [(f'photos/{name}', name[:3]) for name in FILES]
    first = listed(tmp_path / 'list.csv', rows)
    absolute = [(str(tmp_path / name), label) for name, label in rows]
    assert listed(tmp_path / 'elsewhere' / 'list.csv', absolute) == first
    assert listed(tmp_path / 'list.csv', [*rows[:-1], (rows[-1][0], 'cat')]) != first
    touch(photos)
    assert listed(tmp_path / 'list.csv', rows) != first


def test_tfds(config, records, tmp_path):
    assert len({each.identity for each in records}) == 3
    source, split = records[2], config.source.split
    config.source.name = 'tfds:mnist5k'
    assert open_split(config.source, split, config).identity == source.identity
    assert open_split(config.source, 'train[:4000]', config).identity != source.identity
    moved = shutil.copytree(Path(config.data_dir) / 'mnist5k', tmp_path / 'mnist5k')
    config.data_dir, config.cache_dir = str(moved.parent), str(tmp_path / 'cache')
    assert open_split(config.source, split, config).identity == source.identity


IMAGES = np.random.default_rng(0).integers(256, size=(12, 9, 9, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3


def in_memory(images=IMAGES, labels=LABELS, names='abc', **options):
    return Records.from_arrays(images, labels, names, **options)


def test_arrays_and_selections():
    first = in_memory()
    assert in_memory(list(IMAGES.copy()), name='other').identity == first.identity
    changed = IMAGES.copy()
    changed[7, 1, 2, 0] ^= 1
    others = [
        in_memory(changed),
        in_memory(IMAGES[::-1]),
        in_memory(labels=(LABELS + 1) % 3),
        in_memory(names='abd'),
        in_memory(names='acb'),
        in_memory(IMAGES[..., :1].repeat(3, -1)),
        first.select(np.arange(11)),
        first.select(np.arange(1, 12)),
        first.restrict(np.array([0, 2])),
        first.restrict(np.array([2, 0])),
        in_memory(changed).select(np.arange(5)),  # the whole split counts
        first.select(np.arange(5)),
    ]
    assert len({first.identity, *(each.identity for each in others)}) == len(others) + 1
    assert len(first.identity) == 32 and set(first.identity) <= set('0123456789abcdef')


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.randoms())
def test_summary_counts_the_classes(labels, random):
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None].repeat(2, 1)
    summary = in_memory(images, np.array(labels), 'abcd').summary()
    assert summary['counts'] == [labels.count(c) for c in range(4)]
    assert summary['class_names'] == list('abcd')
    assert json.loads(json.dumps(summary)) == summary
    order = list(range(len(labels)))
    random.shuffle(order)
    shuffled = in_memory(images[order], np.array(labels)[order], 'abcd').summary()
    assert shuffled['classes'] == summary['classes']


def test_differences_in_words():
    def of(images, labels, names):
        return in_memory(images, np.array(labels), names).summary()

    first = of(IMAGES, LABELS, 'abc')
    assert difference(None, None) == difference(first, dict(first)) == ''
    assert difference(first, None) == 'there are none now'
    assert difference(None, first) == 'there were none before'
    assert difference(first, of(IMAGES, LABELS, 'acd')) == (
        "class 'b' is missing, class 'd' is new, images of class 'c' have changed"
    )
    more = np.concatenate([IMAGES, IMAGES[:2] + 1])
    assert difference(first, of(more, [*LABELS, 0, 1], 'abc')) == (
        "new images: 2 of 2 classes ('a', 'b')"
    )
    assert difference(first, of(IMAGES[:-1], LABELS[:-1], 'abc')) == (
        "missing images: 1 of class 'c'"
    )
    assert difference(first, of(IMAGES, (2 - LABELS), 'cba')) == 'the classes are in another order'
    split = in_memory(), in_memory(np.concatenate([IMAGES[:11], IMAGES[:1]]))
    old, new = (each.select(np.arange(6)).summary() for each in split)
    assert difference(old, new) == 'images of the split outside the selection have changed'


def words_of(error):
    assert '\n' not in str(error.value)
    return str(error.value)


def test_a_run_is_of_its_data(photos, config, tmp_path, caplog):
    """One run is read again from data that is the same, or not."""
    config.method = 'finetune'
    config.target = defaults.dataset(f'folder:{photos}', 'train', 'test')
    workdir, copy = tmp_path / 'run', shutil.copytree(photos, tmp_path / 'copy')
    result = train_and_evaluate(config, workdir)
    stored = json.loads((workdir / 'data.json').read_text())
    assert stored['target']['counts'] == [4, 4] and stored['test']['counts'] == [1, 1]
    assert stored['source'] is None
    assert 'data.json' in (workdir / 'SHA256SUMS').read_text()

    def again(path=photos, in_hand=False):
        dataset = defaults.dataset(f'folder:{path}', 'train', 'test')
        data = Data(*train_and_test(dataset, config), None) if in_hand else None
        return train_and_evaluate(config, workdir, data)

    assert again() == again(in_hand=True) == again(copy, in_hand=True) == result
    with pytest.raises(ConfigError, match=r'target: there were none|data\.json .*source: there w'):
        train_and_evaluate(
            config, workdir, Data(*[opened(photos, config)] * 2, opened(copy, config))
        )

    for in_hand in (False, True):
        write_images(photos, ['dog/9.png'])
        with pytest.raises(ConfigError) as error:
            again(in_hand=in_hand)
        assert 'data.json belongs to a run on other data (target: new images: ' in words_of(error)
        (photos / 'dog/9.png').unlink()
        assert again(in_hand=in_hand) == result
    (photos / 'dog').rename(photos / 'emu')
    with pytest.raises(ConfigError, match=r"class 'dog' is missing, class 'emu' is new"):
        again()
    (photos / 'emu').rename(photos / 'dog')

    # A copy elsewhere, whose files have other times, is the same data.
    moved = tmp_path / 'elsewhere'
    shutil.copytree(photos, moved, copy_function=shutil.copyfile)
    for path in moved.rglob('*.png'):
        os.utime(path, ns=(0, 12345))
    config.target.name = f'folder:{moved}/'
    assert again(moved) == result
    assert (
        json.loads((workdir / 'data.json').read_text())['target']['digest']
        == (stored['target']['digest'])
    )
    # Other content with the same name and size is not the same, whatever the flags.
    content = (moved / 'cat/1.png').read_bytes()
    (moved / 'cat/1.png').write_bytes(content[:-20] + bytes(20))
    config.allow_changes = True
    with pytest.raises(ConfigError, match=r"images of class 'cat' have changed"):
        again(moved)
    config.allow_changes = False
    config.target.name = f'folder:{photos}'

    # If data.json is missing or corrupted, the checkpoints identify the data.
    for damage in (Path.unlink, lambda path: path.write_text('{}')):
        damage(workdir / 'data.json')
        write_images(photos, ['dog/9.png'])
        with pytest.raises(ConfigError, match='on other data'):
            again()
        (photos / 'dog/9.png').unlink()
        assert again() == result
        assert json.loads((workdir / 'data.json').read_text()) == stored
        assert damaged_files(workdir) == []

    # A finished result is available even if its data cannot be read.
    hidden = photos.with_name('hidden')
    photos.rename(hidden)
    photos.mkdir()
    assert again() == result
    photos.rmdir()
    hidden.rename(photos)

    def unreadable(config):
        raise PermissionError(13, 'Permission denied', str(photos))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_identity, 'open_data', unreadable)
        assert again() == result

    # An unfinished run needs its data; a finished result does not.
    shutil.rmtree(photos)
    with caplog.at_level(logging.WARNING):
        assert again() == result
    assert (
        'image folder' in caplog.text
        and 'is finished; cannot check whether its data' in caplog.text
    )
    assert again(copy, in_hand=True) == result


def test_a_refused_run_binds_its_folder_to_nothing(photos, config, tmp_path):
    """The advice in the error leads to the same command with another flag."""
    config.method, config.steps = 'finetune', 2
    config.target = defaults.dataset(f'folder:{photos}', 'train', 'test')
    config.target.shots = 7
    with pytest.raises(DataError, match=r'use --config.target.shots=4'):
        train_and_evaluate(config, tmp_path / 'run')
    config.target.shots = 4
    assert train_and_evaluate(config, tmp_path / 'run')['train_images'] == 8
    config.target.shots = 3
    with pytest.raises(ConfigError, match=r'config.target.shots: 4 -> 3'):
        train_and_evaluate(config, tmp_path / 'run')


def test_an_interrupted_run_goes_on_with_its_arrays_alone(config, tmp_path):
    """Arrays in memory as target, test and source, matched, for several epochs, cached."""
    rng = np.random.default_rng(0)
    target, test, source = (
        Records.from_arrays(
            rng.integers(256, size=(n, 25, 30, 3), dtype=np.uint8), np.arange(n) % k, 'abcdef'[:k]
        )
        for n, k in ((20, 3), (9, 3), (40, 6))
    )
    config.update({'data': {'cache': 'disk'}, 'cache_dir': str(tmp_path / 'cache')})
    config.update({'batch_size': 8, 'eval_batch_size': 16})
    whole, workdir = tmp_path / 'whole', tmp_path / 'run'
    result = train_and_evaluate(config, whole, Data(target, test, source))
    assert (result['train_images'], result['test_images']) == (20, 9)
    match = json.loads((whole / 'match.json').read_text())
    assert [row['target'] for row in match] == list('abc')
    assert {name for row in match for name in row['source']} <= set('abcdef')
    shutil.copytree(whole, workdir)
    for name in ('result.json', 'SHA256SUMS', 'model.safetensors'):
        (workdir / name).unlink()
    shutil.rmtree(workdir / 'checkpoints' / '6')
    with pytest.raises(ConfigError, match=r'source: images of .* have changed'):
        train_and_evaluate(
            config,
            workdir,
            Data(
                target,
                test,
                in_memory(
                    rng.integers(256, size=(40, 8, 8), dtype=np.uint8), np.arange(40) % 6, 'abcdef'
                ),
            ),
        )
    again = train_and_evaluate(config, workdir, Data(target, test, source))
    assert again['loss'] == result['loss']
    expected = load_file(whole / 'model.safetensors')
    for key, value in load_file(workdir / 'model.safetensors').items():
        np.testing.assert_array_equal(value, expected[key])


def test_folders_of_one_name_share_no_cache(config, tmp_path, monkeypatch):
    config.update({'cache_dir': str(tmp_path / 'cache'), 'weights': 'source'})
    config.source = defaults.dataset('folder:data/source', 'train', 'test')
    trained = {}

    def train_instead(pretrain, folder, data):
        trained.setdefault(folder.name, pretrain.to_dict())
        assert trained[folder.name] == pretrain.to_dict()
        folder.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(train, 'train_and_evaluate', train_instead)
    monkeypatch.setattr(train, '_read_weights', lambda name, model: Path(name))
    weights = type('Weights', (), {'digest': 'x'})

    def caches():
        records = open_split(config.source, 'train', config)
        return (
            backbone_weights(config),
            cache._cache_path(config, records),
            features._cache_path(config, weights, records, 'means'),
        )

    found = {}
    for project in ('one', 'two'):
        write_images(tmp_path / project / 'data/source', FILES)
        monkeypatch.chdir(tmp_path / project)
        found[project] = caches()
    assert all(a != b for a, b in zip(*found.values(), strict=True))
    assert all('source-' in path.name for path in found['one'])
    assert caches() == found['two']
    config.source.name = f'folder:{tmp_path}/two/data/source/'
    assert caches() == found['two']
    os.utime('data/source/cat/0.png', ns=(0, 12345))
    assert len({*found['two'], *caches()}) == 6
    assert len(trained) == 3

    # The network is trained on the caller's own source. The configuration's source is the same,
    # whoever opens it.
    config.source.name = 'folder:data/source'
    source = open_split(config.source, 'train', config)
    assert backbone_weights(config, source) == backbone_weights(config)
    assert backbone_weights(config, in_memory(name='mine')).name.startswith('mine-resnet6-')
