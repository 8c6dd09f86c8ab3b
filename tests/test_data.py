import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

from xmixup_jax import defaults
from xmixup_jax.data.decode import decode
from xmixup_jax.data.pairing import eval_batches, train_batches
from xmixup_jax.data.selection import (
    Data,
    draw_positions,
    open_split,
    train_and_test,
)
from xmixup_jax.data.sources import problem
from xmixup_jax.errors import DataError
from xmixup_jax.matching import ClassMatch

# Target class i meets source classes (i + 1) % 10 and (i + 2) % 10.
MATCH = ClassMatch(
    np.array([[(i + 1) % 10, (i + 2) % 10] for i in range(10)], np.int32),
    np.ones((10, 2), np.float32),
)


def png(image):
    return cv2.imencode('.png', image)[1].tobytes()


def encoded(records, i):
    return records.read(records.index[i])


def pairs(records, **changes):
    target, _, source = records
    arguments = {'seed': 3, 'batch_size': 16, 'resize': 10, 'num_threads': 2} | changes
    arguments = {'process_index': 0, 'process_count': 1} | arguments
    return iter(train_batches(Data(target, None, source), MATCH, **arguments))


def test_builders_hold_every_digit_of_the_packages(config):
    config.target.shots = 0
    uci = open_split(config.target, 'train', config)
    digits = load_digits()
    expected = sorted(
        np.round(image * 255 / 16).astype(np.uint8).tobytes() for image in digits.images
    )
    stored = [cv2.imdecode(np.frombuffer(encoded(uci, i), np.uint8), -1) for i in range(len(uci))]
    assert sorted(image.tobytes() for image in stored) == expected
    np.testing.assert_array_equal(np.bincount(uci.labels), np.bincount(digits.target))

    mnist = open_split(config.source, 'train', config)
    np.testing.assert_array_equal(np.bincount(mnist.labels), np.full(10, 500))
    assert decode(encoded(mnist, 0), 28, '').shape == (28, 28, 3)
    # The second time, the labels come from an index, which must agree.
    np.testing.assert_array_equal(open_split(config.source, 'train', config).labels, mnist.labels)


def test_builders_need_no_tensorflow(folders):
    code = (
        'import sys\n'
        'from xmixup_jax.data import digits\n'
        f'builder = digits.UciDigits(data_dir={folders["data_dir"] + "-alone"!r}, '
        'file_format="array_record")\n'
        'builder.download_and_prepare()\n'
        'print(len(builder.as_data_source(split="train")), "tensorflow" in sys.modules)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ['1797', 'False']


def test_few_shot_and_rest_part_the_split(config, records):
    target, test, _ = records
    np.testing.assert_array_equal(np.bincount(target.labels), np.full(10, 5))
    assert len(target) + len(test) == 1797
    assert not set(target.index) & set(test.index)
    np.testing.assert_array_equal(train_and_test(config.target, config)[0].index, target.index)
    config.seed = 1
    assert set(train_and_test(config.target, config)[0].index) != set(target.index)


def test_too_few_images_for_the_shots(records):
    target, _, _ = records
    with pytest.raises(DataError, match=r"class '0' of uci_digits has 5 training .*shots=6"):
        draw_positions(target, 6, 1.0, seed=0)


def test_every_target_meets_one_of_its_matched_classes(records):
    batches = pairs(records)
    seen = set()
    for _ in range(20):
        batch = next(batches)
        assert batch['image'].shape == batch['source_image'].shape == (16, 10, 10, 3)
        assert batch['image'].dtype == batch['source_image'].dtype == np.uint8
        for label, source_label in zip(batch['label'], batch['source_label'], strict=True):
            source_class = MATCH.selected[source_label]
            assert source_class in MATCH.classes[label]
            seen.add((int(label), int(source_class)))
    assert len(seen) == 20


def test_only_records_of_matched_classes_are_read(records):
    target, _, source = records
    few = ClassMatch(np.full((10, 1), 3, np.int32), np.ones((10, 1), np.float32))
    read = []
    watched = replace(source, read=lambda i: (read.append(i), source.read(i))[1])
    arguments = {'seed': 0, 'batch_size': 16, 'resize': 11, 'num_threads': 2}
    batches = iter(train_batches(Data(target, None, watched), few, **arguments))
    for _ in range(5):
        next(batches)
    position = {number: i for i, number in enumerate(source.index)}
    assert {int(source.labels[position[number]]) for number in read} == {3}


def test_the_source_label_is_the_source_images_class(records):
    _, _, source = records
    by_pixels = {
        decode(encoded(source, i), 28, '').tobytes(): source.labels[i] for i in range(len(source))
    }
    batch = next(pairs(records, resize=28))
    for image, label in zip(batch['source_image'], batch['source_label'], strict=True):
        assert by_pixels[image.tobytes()] == MATCH.selected[label]


def test_an_epoch_holds_every_target_once(records):
    target = records[0]
    batches = pairs(records, batch_size=len(target))
    epochs = [next(batches) for _ in range(2)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.bincount(epoch['label']), np.bincount(target.labels))
    assert not np.array_equal(epochs[0]['label'], epochs[1]['label'])


def test_order_follows_from_seed_and_step(records):
    first, again, other = pairs(records), pairs(records), pairs(records, seed=4)
    for _ in range(3):
        a, b, c = next(first), next(again), next(other)
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
        assert not np.array_equal(a['seed'], c['seed'])
    resumed = pairs(records)
    resumed.set_state(first.get_state())
    np.testing.assert_array_equal(next(resumed)['source_image'], next(first)['source_image'])


def test_two_processes_share_the_batches_of_one(records):
    whole = pairs(records)
    parts = [pairs(records, process_index=p, process_count=2) for p in range(2)]
    for _ in range(5):
        batch, shares = next(whole), [next(part) for part in parts]
        for key in batch:
            assert len(shares[0][key]) == 8
            together = np.concatenate([share[key] for share in shares])
            np.testing.assert_array_equal(together, batch[key])


@pytest.mark.parametrize('process_count', [1, 3])
def test_evaluation_sees_every_record_once(records, process_count):
    target = records[0]  # 50 records in batches of 12
    seen, lengths = [], []
    for process in range(process_count):
        batches = list(
            eval_batches(
                target,
                batch_size=12,
                resize=8,
                num_threads=1,
                process_index=process,
                process_count=process_count,
            )
        )
        lengths.append([len(batch['label']) for batch in batches])
        for batch in batches:
            seen += [im.tobytes() for im, m in zip(batch['image'], batch['mask'], strict=True) if m]
    assert all(length == [12 // process_count] * 5 for length in lengths)
    assert sorted(seen) == sorted(decode(encoded(target, i), 8, '').tobytes() for i in range(50))


def test_decode_scales_the_short_side_and_cuts_the_middle():
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30] = (255, 0, 0)  # blue in OpenCV's order
    decoded = decode(png(image), 10, '')
    np.testing.assert_array_equal(decoded, np.broadcast_to([0, 0, 255], (10, 10, 3)))


def test_decode_makes_grey_images_rgb():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    np.testing.assert_array_equal(decode(png(grey), 8, ''), np.repeat(grey[..., None], 3, axis=2))


def make_folder(root, files):
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(np.full((9, 12, 3), len(name), np.uint8)))
    return defaults.dataset(f'folder:{root}', 'train', 'test')


def test_image_folder(tmp_path, config):
    dataset = make_folder(
        tmp_path,
        ['train/b/1.png', 'train/a/1.png', 'train/a/2.PNG', 'test/a/3.png', 'test/b/4.png'],
    )
    train, test = train_and_test(dataset, config)
    assert train.class_names == test.class_names == ('a', 'b')
    assert train.labels.tolist() == [0, 0, 1]
    assert train.describe(2) == str(tmp_path / 'train/b/1.png')
    assert decode(encoded(test, 1), 6, '').shape == (6, 6, 3)


def test_folder_without_splits(tmp_path, config):
    files = [f'{name}/{i}.png' for name, n in {'a': 10, 'b': 3, 'c': 1}.items() for i in range(n)]
    dataset = make_folder(tmp_path, files)
    dataset.test_share = 0.3
    train, test = train_and_test(dataset, config)
    assert train.class_names == test.class_names == ('a', 'b', 'c')
    assert np.bincount(test.labels).tolist() == [3, 1]  # the only image of c is used for training
    assert np.bincount(train.labels).tolist() == [7, 2, 1]
    paths = [part.describe(i) for part in (train, test) for i in range(len(part))]
    assert sorted(paths) == sorted(str(tmp_path / name) for name in files)
    config.seed = 7  # the test split does not depend on the seed
    np.testing.assert_array_equal(
        [test.describe(i) for i in range(4)],
        [train_and_test(dataset, config)[1].describe(i) for i in range(4)],
    )
    with pytest.raises(DataError, match=r"no split 'validation': it has train, test"):
        open_split(dataset, 'validation', config)


def test_image_folder_faults(tmp_path, config):
    dataset = make_folder(tmp_path, ['train/a/1.png', 'test/a/1.png', 'test/new/1.png'])
    with pytest.raises(
        DataError, match=r"class 'new' of .* images in the split 'test' but none in 'train'"
    ):
        train_and_test(dataset, config)
    with pytest.raises(DataError, match=r"no split 'extra': it has test, train"):
        open_split(dataset, 'extra', config)
    (tmp_path / 'train/empty').mkdir()
    with pytest.raises(DataError, match=r"empty' contains no images"):
        open_split(dataset, 'train', config)
    assert 'does not exist' in problem(f'folder:{tmp_path}/none', config)
