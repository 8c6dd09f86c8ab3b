"""Real-world image folders: what is read, ignored, reported and refused."""

import json
import os
import shutil
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features
from test_sources import write_images, write_list

from xmixup_jax import defaults
from xmixup_jax.data.inspection import class_table, find_problems, same_images
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import Data, open_split, train_and_test
from xmixup_jax.data.sources import listing, problem
from xmixup_jax.data.sources.splits import find_split
from xmixup_jax.errors import DataError
from xmixup_jax.run.train import train_and_evaluate

CLASSES = ('cat', 'dog', 'ship')
TRAIN = [f'train/{name}/{i}.png' for name in CLASSES for i in range(3)]
TEST = [f'test/{name}/{i}.png' for name in CLASSES for i in range(2)]


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / 'photos', [*TRAIN, *TEST])
    return tmp_path / 'photos'


def data_set(root, test_split='test', **options):
    dataset = defaults.dataset(f'folder:{root}', 'train', test_split)
    dataset.update(options)
    return dataset


def read(root, config, **options):
    return Data(*train_and_test(data_set(root, **options), config), None)


def files(records, root):
    return {os.path.relpath(records.describe(i), root) for i in range(len(records))}


def counts(records):
    return dict(zip(records.class_names, np.bincount(records.labels, minlength=0), strict=True))


# Files that are never data


@pytest.mark.parametrize(
    'name',
    [
        '.ipynb_checkpoints/0-checkpoint.png',
        '.DS_Store',
        '._0.png',
        'Thumbs.db',
        'desktop.ini',
        'DESKTOP.INI',
        '__MACOSX/cat/._0.png',
        '@eaDir/0.png/SYNOFILE_THUMB_M.png',
        'lost+found/0.png',
        '$RECYCLE.BIN/0.png',
        '.git/objects/0.png',
        '.thumbnails/0.png',
    ],
)
@pytest.mark.parametrize('place', ['', 'train', 'train/cat'])
def test_hidden_and_system_files_are_never_data(root, config, name, place):
    before = read(root, config)
    write = root / place / name
    write.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8)).save(write, 'PNG')
    after = read(root, config)
    assert after.target.class_names == CLASSES
    assert files(after.target, root) == set(TRAIN)
    assert [part.identity for part in after[:2]] == [part.identity for part in before[:2]]
    expected = {listing.HIDDEN: 1} if place else {}
    assert after.target.left_out == expected
    assert before.target.left_out == {}


def test_what_is_left_out_is_counted_by_kind(root, config, caplog):
    for name in ('labels.txt', 'notes.TXT', 'video.mp4', 'README'):
        (root / 'train/cat' / name).write_bytes(b'text')
    (root / 'train/readme.md').write_text('text')
    shutil.copy(root / TRAIN[0], root / 'train/loose.png')
    (root / 'train/cat/broken.png').symlink_to('none.png')
    os.mkfifo(root / 'train/cat/pipe.png')
    data = read(root, config)
    assert files(data.target, root) == set(TRAIN)
    assert data.target.left_out == {
        '.txt': 2,
        '.mp4': 1,
        '.md': 1,
        'no suffix': 1,
        'image outside the class folders': 1,
        'broken link': 1,
        'pipe or device': 1,
    }
    with caplog.at_level('INFO', logger='xmixup_jax'):
        data.log_usage()
    (line,) = [each for each in caplog.messages if each.startswith('target: ')]
    assert line.startswith(f'target: 9 of 9 images of folder:{root}; left out: ')
    assert '2 .txt' in line and '1 broken link' in line


def test_a_missing_package_is_named(root, config, monkeypatch):
    monkeypatch.setattr(listing, 'image_suffixes', lambda: frozenset({'.png'}))
    monkeypatch.setattr(
        listing, 'missing_package', lambda suffix: {'.heic': 'pillow-heif'}.get(suffix)
    )
    for name in ('a.heic', 'b.HEIC', 'c.jpg'):
        (root / 'train/cat' / name).write_bytes(b'x')
    left_out = read(root, config).target.left_out
    assert left_out == {'.heic (pip install pillow-heif)': 2, '.jpg': 1}


# Every image is read


FORMATS = {
    '.jpg': 'JPEG',
    '.JPEG': 'JPEG',
    '.jfif': 'JPEG',
    '.jpe': 'JPEG',
    '.PNG': 'PNG',
    '.bmp': 'BMP',
    '.gif': 'GIF',
    '.webp': 'WEBP',
    '.tif': 'TIFF',
    '.TIFF': 'TIFF',
    '.ppm': 'PPM',
}
FORMATS |= {'.jp2': 'JPEG2000', '.j2k': 'JPEG2000'} if features.check('jpg_2000') else {}
FORMATS |= {'.avif': 'AVIF'} if features.check('avif') else {}


def test_every_format_is_read(root, config):
    colour = (200, 40, 90)
    for i, (suffix, name) in enumerate(FORMATS.items()):
        Image.new('RGB', (20, 20), colour).save(root / f'train/cat/{i + 10}{suffix}', name)
    Image.new('RGB', (20, 20), colour).save(root / 'train/cat/without', 'JPEG')
    target = read(root, config).target
    assert counts(target)['cat'] == 3 + len(FORMATS) + 1
    for i in range(len(target)):
        if target.describe(i).endswith((*FORMATS, 'without')) and '/cat/1' in target.describe(i):
            image = target.image(i, 16)
            np.testing.assert_allclose(image, np.broadcast_to(colour, image.shape), atol=12)
    assert target.left_out == {}


def test_sub_folders_of_a_class_are_read(root, config):
    deep = ['train/cat/day1/0.png', 'train/cat/day1/cam/0.png', 'train/dog/x/0.png']
    write_images(root, deep)
    data = read(root, config)
    assert files(data.target, root) == {*TRAIN, *deep}
    assert counts(data.target) == {'cat': 5, 'dog': 4, 'ship': 3}
    assert data.target.notes == ('3 images are in sub-folders of their class',)
    shutil.copytree(root, root.with_name('copy'), copy_function=shutil.copy2)
    assert read(root.with_name('copy'), config).target.identity == data.target.identity


def test_classes_of_sub_folders_alone(tmp_path, config):
    names = [f'{c}/{day}/{i}.png' for c in ('cat', 'dog') for day in 'ab' for i in range(3)]
    write_images(tmp_path, names)
    data = read(tmp_path, config)
    assert data.target.class_names == ('cat', 'dog')
    assert files(data.target, tmp_path) | files(data.test, tmp_path) == set(names)


def test_links_are_followed_and_loops_end(root, config):
    write_images(root.parent, ['other/a.png', 'other/b.png'])
    (root / 'train/cat/linked').symlink_to(root.parent / 'other', target_is_directory=True)
    (root / 'train/emu').symlink_to(root.parent / 'other', target_is_directory=True)
    (root / 'train/dog/loop').symlink_to(root / 'train', target_is_directory=True)
    target = open_split(data_set(root), 'train', config)
    assert counts(target)['cat'] == 5 and counts(target)['emu'] == 2
    assert target.left_out['link to a folder above'] > 0


@given(st.lists(st.sampled_from('éüåñ가Åﬁ'), min_size=1, max_size=4).map(''.join))
def test_one_unicode_form(name):
    forms = {unicodedata.normalize(form, name) for form in ('NFC', 'NFD')}
    assert len({listing.nfc(form) for form in forms}) == 1


def test_class_names_are_compared_in_one_unicode_form(root, config):
    composed, apart = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))
    assert composed != apart
    write_images(root, [f'train/{composed}/0.png', f'train/{apart}/1.png', f'test/{apart}/0.png'])
    data = read(root, config)
    assert data.target.class_names == data.test.class_names == (composed, *CLASSES)
    assert counts(data.target)[composed] == 2
    listed = write_list(
        root / 'list.csv',
        [
            (f'train/{composed}/0.png', composed, 'train'),
            (f'test/{apart}/0.png', apart, 'test'),
        ],
        ('path', 'label', 'split'),
    )
    train, test = train_and_test(listed, config)
    assert train.class_names == test.class_names == (composed,)
    # The list and the files have different Unicode forms of the name.
    listed = write_list(
        root / 'list.csv',
        [(f'train/{composed}/0.png', 'a', 'train'), (f'test/{composed}/0.png', 'a', 'test')],
        ('path', 'label', 'split'),
    )
    assert [len(part) for part in train_and_test(listed, config)] == [1, 1]


# Splits and classes


@pytest.mark.parametrize('name', ['val', 'valid', 'validation', 'Val', 'TEST', 'dev', 'testing'])
def test_another_split_serves_as_the_test(root, config, name):
    (root / 'test').rename(root / name)
    data = read(root, config)
    assert files(data.test, root) == {each.replace('test/', f'{name}/', 1) for each in TEST}
    assert f"there is no split 'test': using '{name}' instead" in data.test.notes


def test_a_test_split_comes_before_a_validation_split(root, config):
    shutil.copytree(root / 'train', root / 'val')
    data = read(root, config)
    assert files(data.test, root) == set(TEST) and data.test.notes == ()
    assert files(open_split(data_set(root), 'valid', config), root) == {
        each.replace('train/', 'val/', 1) for each in TRAIN
    }


@given(st.sampled_from(['train', 'test', 'val', 'validation', 'valid']), st.randoms())
def test_a_split_of_that_name_is_taken_whatever_else_there_is(split, random):
    present = ['train', 'training', 'test', 'val', 'valid', 'validation', 'extra']
    random.shuffle(present)
    assert find_split(split, present) == split
    assert find_split(split, ['extra']) is None


@pytest.mark.parametrize('names', [('train', 'bus', 'car'), ('test', 'exam'), ('train', 'test')])
def test_classes_may_be_called_like_splits(tmp_path, config, names):
    write_images(tmp_path, [f'{name}/{i}.png' for name in names for i in range(5)])
    data = read(tmp_path, config)
    assert data.target.class_names == tuple(sorted(names))
    assert len(data.target) == 4 * len(names) and len(data.test) == len(names)
    called_like_splits = all(name in ('train', 'test') for name in names)
    assert called_like_splits == any('named like splits' in each for each in data.target.notes)


def test_a_class_of_a_split_may_be_called_train(tmp_path, config):
    write_images(tmp_path, [f'{s}/{c}/0.png' for s in ('train', 'test') for c in ('train', 'bus')])
    assert read(tmp_path, config).target.class_names == ('bus', 'train')


def test_what_may_be_a_split_or_a_class_is_refused(tmp_path, config):
    write_images(tmp_path, ['train/monday/0.png', 'bus/monday/0.png', 'bus/0.png'])
    with pytest.raises(
        DataError, match=r'contains train, .* and bus, .*: is train a split or a class\?'
    ):
        open_split(data_set(tmp_path), 'train', config)


def test_a_class_without_test_images_is_said(root, config):
    shutil.rmtree(root / 'test/dog')
    for image in (root / 'test/ship').iterdir():
        image.unlink()
    data = read(root, config)
    assert data.test.class_names == CLASSES
    assert np.bincount(data.test.labels, minlength=3).tolist() == [2, 0, 0]
    assert data.test.notes == ("no test images of 2 classes ('dog', 'ship')",)


def test_other_labels_than_by_position(root, config):
    """If the test lacks the first class, its labels are still those of training."""
    shutil.rmtree(root / 'test/cat')
    test = read(root, config).test
    for i in range(len(test)):
        assert f'/{test.class_names[test.labels[i]]}/' in test.describe(i)


# Errors name a remedy


def refused(root, config, **options):
    with pytest.raises(DataError) as error:
        read(root, config, **options)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_no_test_split(root, config):
    shutil.rmtree(root / 'test')
    config.target = data_set(root)
    words = refused(root, config)
    assert '--config.target.test_split=rest with --config.target.sample_rate=0.8' in words
    assert f'--config.target.name=folder:{root}/train, which is then split at random' in words
    (root / 'train').rename(root / 'extra')
    shutil.copytree(root / 'extra', root / 'train')
    assert '--config.target.test_split=extra' in refused(root, config)
    # Each remedy works.
    read(root, config, test_split='rest', sample_rate=0.8)
    read(root / 'train', config)
    read(root, config, test_split='extra')


def test_no_training_split(root, config):
    (root / 'train').rename(root / 'fold1')
    assert 'use --config.target.split=fold1' in refused(root, config)


def test_a_class_that_is_only_tested(root, config):
    write_images(root, ['test/emu/0.png'])
    assert "class 'emu' of " in refused(root, config)


@pytest.mark.parametrize('beside', [(), ('__MACOSX/x.png',), ('annotations/a.txt',)])
@pytest.mark.parametrize('inner', ['archive', 'archive/images'])
def test_one_split_in_folders_above(tmp_path, config, inner, beside):
    write_images(tmp_path, [f'{inner}/train/{c}/{i}.png' for c in 'ab' for i in range(3)])
    for name in beside:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b'x')
    assert f'--config.target.name=folder:{tmp_path}/archive' in refused(tmp_path, config)


@pytest.mark.parametrize('names', [('fold_0', 'fold_1'), ('images', 'masks')])
def test_folders_that_all_hold_the_same_folders(tmp_path, config, names):
    write_images(tmp_path, [f'{n}/{c}/{i}.png' for n in names for c in 'ab' for i in range(5)])
    data = read(tmp_path, config)
    (note,) = [note for note in data.target.notes if note.startswith('all classes')]
    flags = f'--config.target.split={names[0]} --config.target.test_split={names[1]}'
    assert 'contain the same folders (a, b)' in note and flags in note
    assert note in find_problems(data)
    dataset = data_set(tmp_path, test_split=names[1])
    dataset.split = names[0]
    assert train_and_test(dataset, config)[0].class_names == ('a', 'b')


def test_classes_that_differ_in_case(tmp_path, config):
    write_images(tmp_path, [f'{c}/{i}.png' for c in ('cat', 'Cat') for i in range(30)])
    assert "class names differ only in case: 'Cat', 'cat'" in find_problems(read(tmp_path, config))


def test_a_class_of_another_case_in_the_test(root, config):
    (root / 'test/cat').rename(root / 'test/Cat')
    words = refused(root, config)
    assert "class 'Cat' of the split 'test'" in words and "is called 'cat' in 'train'" in words


def test_a_link_to_the_split_is_a_loop(root, config):
    (root / 'train/dog/all').symlink_to(root / 'train', target_is_directory=True)
    data = read(root, config)
    assert files(data.target, root) == set(TRAIN)
    assert data.target.left_out == {'link to a folder above': 1}


def test_what_is_kept_for_the_test_is_said(tmp_path, config):
    write_images(tmp_path, [f'{c}/{i}.png' for c in 'ab' for i in range(10)])
    assert (
        '4 more are set aside for the test (test_share=0.2)' in read(tmp_path, config).target.notes
    )


def test_a_split_without_class_folders_is_named(root, config):
    (root / 'test').rename(root / 'val')
    write_images(root, ['test/0.png'])
    notes = read(root, config).test.notes
    assert "'test' has no class folders: using 'val' instead" in notes


def test_lists_as_programs_write_them(root, config):
    rows = [(f'train/{c}/{i}.png', c, s) for c in CLASSES for i, s in enumerate(('train', 'TRAIN'))]
    rows += [(f'test/{c}/0.png', c, 'Test') for c in CLASSES]
    rows.append(('train/cat/.DS_Store', 'cat', 'train'))
    listed = write_list(root / 'list.csv', rows, ('Path', 'LABEL', 'Split'))
    train, test = train_and_test(listed, config)
    assert (len(train), len(test)) == (6, 3)
    assert train.left_out == {listing.HIDDEN: 1}
    listed = write_list(root / 'list.csv', [('a', 'b', 'c')], ('path', 'label', 'Label'))
    with pytest.raises(DataError, match="2 columns named 'label': keep one"):
        train_and_test(listed, config)
    small = [(f'train/{c}/0.png', c) for c in CLASSES]
    with pytest.raises(DataError, match=r'use --config\.target\.test_share=0\.5'):
        train_and_test(write_list(root / 'list.csv', small), config)


@pytest.mark.parametrize('place', ['', 'train'])
def test_a_folder_above_the_classes(root, config, place):
    """Many archives have one more folder around everything."""
    inner = root / place
    inner.rename(root.parent / 'moved')
    (inner / 'archive').parent.mkdir(parents=True, exist_ok=True)
    (root.parent / 'moved').rename(inner / 'archive')
    assert f'use --config.target.name=folder:{inner}/archive' in refused(root, config)


def test_splits_within_classes(tmp_path, config):
    write_images(tmp_path, [f'{c}/{s}/0.png' for c in ('cat', 'dog') for s in ('Train', 'val')])
    assert 'cat contains Train and val, as if the splits were inside the classes' in refused(
        tmp_path, config
    )


def test_an_unlabelled_test_split(root, config):
    shutil.rmtree(root / 'test')
    write_images(root, ['test/1.png', 'test/2.png'])
    assert "no split 'test': it has train: use --config.target.test_split=rest" in refused(
        root, config
    )


def test_a_list_with_backslashes(root, config):
    listed = write_list(root / 'list.csv', [('train\\cat\\0.png', 'cat')])
    with pytest.raises(DataError, match=r'use /, not \\, between folders'):
        train_and_test(listed, config)


def test_an_empty_class_says_what_is_there_instead(root, config):
    (root / 'train/emu').mkdir()
    (root / 'train/emu/a.mp4').write_bytes(b'x')
    assert "emu' contains no images, but 1 .mp4: add images to it, or remove it" in refused(
        root, config
    )


def test_a_file_for_a_folder(tmp_path, config):
    (tmp_path / 'photos.zip').write_bytes(b'PK')
    assert 'is a file, not an image folder: unpack it' in problem(
        f'folder:{tmp_path}/photos.zip', config
    )


# The dry run


def test_suspicions(root, config):
    write_images(root, [f'train/cat/{i + 10}.png' for i in range(40)])
    shutil.copy(root / TRAIN[0], root / 'test/ship/copied.png')
    data = read(root, config)
    lines = find_problems(data)
    assert "imbalanced: 43 training images of 'cat', 3 of 'dog'" in lines[0]
    assert "3 classes have fewer than 5 test images: 'cat' (2), 'dog' (2), 'ship' (3)" in lines[1]
    assert lines[2].startswith('1 test images are also training images: ')
    assert same_images(data.target, data.test) == [
        (str(root / TRAIN[0]), str(root / 'test/ship/copied.png'))
    ]
    rows = [line.split() for line in class_table(data).splitlines()]
    assert rows == [
        ['class', 'train', 'test'],
        ['cat', '43', '2'],
        ['dog', '3', '2'],
        ['ship', '3', '3'],
        ['all', '49', '7'],
    ]


def test_one_class_alone(config):
    images = np.random.default_rng(0).integers(256, size=(12, 8, 8), dtype=np.uint8)
    records = Records.from_arrays(images, np.zeros(12, int), ['cat'])
    data = Data(records.select(np.arange(6)), records.select(np.arange(6, 12)), None)
    assert find_problems(data) == ["there is one class, 'cat': a classifier needs at least two"]
    assert find_problems(Data(records, None, None)) == find_problems(data)


def test_the_result_says_what_was_used(root, config, tmp_path):
    (root / 'train/cat/notes.txt').write_text('x')
    write_images(root, ['train/cat/day/0.png'])
    config.method, config.steps, config.eval_every = 'finetune', 2, 0
    config.target = data_set(root, shots=2)
    train_and_evaluate(config, tmp_path / 'run')
    used = json.loads((tmp_path / 'run/result.json').read_text())['data']
    assert used['target'] == {
        'data': f'folder:{root}',
        'images': 6,
        'found': 10,
        'left_out': {'.txt': 1},
        'notes': ['1 images are in sub-folders of their class'],
        'digest': read(root, config, shots=2).target.identity,
    }
    assert (used['test']['images'], used['test']['left_out']) == (6, {})
    assert 'source' not in used


def test_a_test_of_which_nothing_can_be_decoded(root, config, tmp_path):
    for image in (root / 'test').rglob('*.png'):
        image.write_bytes(b'x')
    config.method, config.steps, config.eval_every = 'finetune', 1, 0
    config.target = data_set(root)
    with pytest.raises(
        DataError, match=r'none of the 6 test images of .*config\.target\.test_split'
    ):
        train_and_evaluate(config, tmp_path / 'run')


def test_flags_are_those_of_the_part(tmp_path, config):
    """Messages about the source name the flags of the source."""
    write_images(tmp_path, [f'{n}/{c}/{i}.png' for n in ('f0', 'f1') for c in 'ab' for i in '012'])
    config.source = data_set(tmp_path)
    records = open_split(config.source, 'train', config)
    assert '--config.source.split=f0 --config.source.test_split=f1' in records.doubts[0]
    assert records.doubts[0] in records.notes
