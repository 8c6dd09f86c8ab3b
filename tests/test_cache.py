"""Caches of decoded images: all give the same batches, and no image is decoded twice."""

import csv
import logging
from dataclasses import replace

import jax
import numpy as np
import psutil
import pytest
from test_data import MATCH

from xmixup_jax.compute import step as step_lib
from xmixup_jax.data import cache as cache_lib
from xmixup_jax.data.cache import DiskCache, choose_cache, used_records, with_caches
from xmixup_jax.data.pairing import train_batches
from xmixup_jax.data.pool import fill_pool
from xmixup_jax.data.selection import Data
from xmixup_jax.devices import shard
from xmixup_jax.errors import UserError
from xmixup_jax.matching import ClassMatch
from xmixup_jax.run.train import train_and_evaluate

FEW = ClassMatch(np.full((10, 1), 3, np.int32), np.ones((10, 1), np.float32))


def counted(records, reads):
    def read(number):
        reads.append(number)
        return records.read(number)

    return replace(records, read=read)


def some_batches(config, data, match, count, **options):
    batches = train_batches(
        data, match, seed=0, batch_size=16, resize=config.resize, num_threads=2, **options
    )
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize('kind', ['memory', 'disk'])
def test_each_image_is_decoded_once_and_is_the_same(config, records, kind, tmp_path):
    config.cache_dir = str(tmp_path)
    target, test, source = records
    reads = {'target': [], 'source': []}
    watched = Data(counted(target, reads['target']), test, counted(source, reads['source']))
    expected = some_batches(config, Data(*records), FEW, 200)
    cached = with_caches(config, kind, watched, FEW)
    for batch, plain in zip(some_batches(config, cached, FEW, 200), expected, strict=True):
        for key in plain:
            np.testing.assert_array_equal(batch[key], plain[key])
    # Two threads may decode the same image at the same time.
    assert len(reads['target']) < 1.3 * len(set(reads['target'])) and len(target) == 50
    assert len(reads['source']) < 1.3 * len(set(reads['source']))
    of_class = source.index[source.labels == 3]
    assert set(reads['source']) <= set(of_class) and len(set(reads['source'])) > 400
    if kind == 'disk':  # only the matched class takes space, and a second process can read it
        assert sum(path.stat().st_size for path in (tmp_path / 'decoded').iterdir()) == (
            (50 + len(of_class)) * (3 * config.resize**2 + 4)
        )
        assert test.cache is None
        for names in reads.values():
            names.clear()
        again = with_caches(config, kind, watched, FEW)
        some_batches(config, again, FEW, 50)
        assert reads == {'target': [], 'source': []}


def test_the_tests_images_are_kept_if_they_are_read_again(config, records):
    data = Data(records[0], records[1], None)
    assert with_caches(config, 'memory', data, None).test.cache is None
    config.eval_every = 2
    assert with_caches(config, 'memory', data, None).test.cache is not None


def test_a_damaged_place_on_disk_is_decoded_again(tmp_path):
    numbers, images = np.array([3, 5, 9]), np.arange(3 * 48, dtype=np.uint8).reshape(3, 4, 4, 3)
    path = tmp_path / 'new' / 'images'
    first = DiskCache(path, numbers, 4)
    assert first.get(5) is None
    for number, image in zip(numbers, images, strict=True):
        first.put(number, image)
    content = bytearray(path.read_bytes())
    content[12 + 48 + 7] ^= 1  # the second image
    content[8] ^= 1  # the third image's checksum
    path.write_bytes(content)
    second = DiskCache(path, numbers, 4)
    np.testing.assert_array_equal(second.get(3), images[0])
    assert second.get(5) is None and second.get(9) is None
    second.put(5, images[1])
    np.testing.assert_array_equal(DiskCache(path, numbers, 4).get(5), images[1])


def test_a_changed_file_has_another_cache(config, records, tmp_path):
    config.cache_dir = str(tmp_path)
    data = Data(records[0], None, None)
    with_caches(config, 'disk', data, None)
    changed = replace(records[0], stamps=records[0].stamps + np.uint64(1))
    with_caches(config, 'disk', Data(changed, None, None), None)
    assert len(list((tmp_path / 'decoded').iterdir())) == 2


def test_no_room(config, records, tmp_path, monkeypatch):
    config.cache_dir = str(tmp_path)

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('os.posix_fallocate', full)
    with pytest.raises(
        UserError, match=r'cannot cache .* No space left on device; free disk space'
    ):
        with_caches(config, 'disk', Data(*records), FEW)
    config.data.cache = 'memory'
    monkeypatch.setattr(cache_lib, '_free_memory', lambda: 1000)
    with pytest.raises(UserError, match=r'config.data.cache=memory: decoded images take .* MB'):
        choose_cache(config, list(used_records(Data(*records), FEW).values()))


def test_the_choice_is_by_what_is_free(config, records, monkeypatch, caplog):
    used = list(used_records(Data(*records), FEW).values())
    needed = 3 * config.resize**2 * (50 + (records[2].labels == 3).sum())
    config.steps = 100
    room = {'device': 0, 'memory': 0, 'disk': 0}
    monkeypatch.setattr(cache_lib, '_free_device_bytes', lambda: room['device'])
    monkeypatch.setattr(cache_lib, '_free_memory', lambda: room['memory'])
    monkeypatch.setattr(
        cache_lib.shutil, 'disk_usage', lambda _: type('Usage', (), {'free': room['disk']})
    )
    with caplog.at_level(logging.INFO, logger='xmixup_jax'):
        assert choose_cache(config, used) == 'none'
        room['disk'] = 2 * needed
        assert choose_cache(config, used) == 'disk'
        room['memory'] = 2 * needed
        assert choose_cache(config, used) == 'memory'
        room['device'] = 5 * needed // jax.device_count() + 8
        assert choose_cache(config, used) == 'device'
        with monkeypatch.context() as on_two_hosts:
            on_two_hosts.setattr(jax, 'process_count', lambda: 2)
            on_two_hosts.setattr(cache_lib, 'all_gather', lambda value: value[None])
            assert choose_cache(config, used) == 'memory'
        config.steps, config.batch_size = 3, 16
        assert choose_cache(config, used) == 'none'
    free = f'device {room["device"] / 1e6:,.0f} MB, memory 1 MB'
    assert f'decoded images: device (automatic choice; free: {free}' in caplog.text
    assert 'decoded images: none (no image is used twice' in caplog.text


def test_free_memory_is_not_more_than_the_systems():
    assert 0 < cache_lib._free_memory() <= psutil.virtual_memory().total


@pytest.mark.devices
def test_devices_look_up_the_images_of_the_batch(config, records):
    data = Data(*records)
    pool = fill_pool(config, used_records(data, MATCH))
    count = jax.device_count()
    assert pool['image'].shape == (count, -(-50 // count), 22, 22, 3)  # 50 images
    look_up = jax.pmap(step_lib.look_up, axis_name='batch')
    plain = some_batches(config, data, MATCH, 5)
    for batch, positions in zip(
        plain, some_batches(config, data, MATCH, 5, positions=True), strict=True
    ):
        found = look_up(pool, shard(positions))
        for key in batch:
            np.testing.assert_array_equal(found[key], shard(batch)[key])


def test_a_run_from_device_memory_in_longer_programs_is_the_same(config, tmp_path):
    """The last program runs only the one step that is left."""
    losses = []
    for kind, count in (('none', 1), ('device', 2)):
        config.data.cache, config.steps_per_dispatch = kind, count
        config.steps, config.log_every = 5, 2
        workdir = tmp_path / f'{kind}{count}'
        train_and_evaluate(config, workdir)
        with (workdir / 'metrics.csv').open(newline='') as file:
            rows = list(csv.DictReader(file))
        assert [int(row['step']) for row in rows] == [2, 4, 5]
        losses.append([float(row['loss']) for row in rows])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
