"""`xmixup prepare` does everything slow in advance, and nothing twice."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from xmixup_jax import files
from xmixup_jax.compute import features
from xmixup_jax.compute.step import Sizes, create_task
from xmixup_jax.data.selection import open_split
from xmixup_jax.data.sources import tfds as tfds_source
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.weights.files import save_weights
from xmixup_jax.weights.pretrained import Weights


# Starts a process and trains twice; tests/test_sources.py tests the command alone.
@pytest.mark.slow
def test_prepare_leaves_nothing_slow_to_the_run(config, tmp_path):
    folders = {'data_dir': tmp_path / 'tfds', 'cache_dir': tmp_path / 'cache'}
    values = {'pretrain.steps': 3, 'model.width': 4, 'num_threads': 1} | folders
    overrides = [f'--config.{key}={value}' for key, value in values.items()]
    command = [
        sys.executable, '-m', 'xmixup_jax', 'prepare', '--config=configs/digits.py', *overrides,
        f'--workdir={tmp_path / "run"}',
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].startswith('Prepared. Now run')
    match = json.loads((tmp_path / 'run/match.json').read_text())
    for row in match:
        assert f'{row["target"]}  <-  {row["source"][0]}' in done.stdout
    made = {
        path: path.stat().st_mtime_ns
        for folder in folders.values()
        for path in folder.rglob('*')
        if path.is_file() and not {'xla', '.lock'} & set(path.parts)
    }
    kinds = {path.relative_to(tmp_path).parts[1] for path in made}
    assert {'mnist5k', 'uci_digits', 'labels', 'pretrained', 'features'} <= kinds

    config.update({key: str(folder) for key, folder in folders.items()})
    config.update({'weights': 'source', 'num_threads': 1})
    config.pretrain.steps, config.model.name = 3, 'resnet10'
    config.update({'batch_size': 32, 'eval_batch_size': 256, 'steps': 2})
    train_and_evaluate(config, tmp_path / 'run')
    assert json.loads((tmp_path / 'run/match.json').read_text()) == match
    assert [path for path, stamp in made.items() if path.stat().st_mtime_ns != stamp] == []


class Stopped(Exception):
    pass


def test_class_features_go_on_where_they_stopped(config, tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'SAVE_SECONDS', -1.0)  # after every batch
    config.cache_dir = str(tmp_path)
    config.num_threads = 1  # one of several threads may reach the limit in the first batch
    config.eval_batch_size, config.match.images_per_class = 16, 0
    records = open_split(config.target, 'train', config).select(np.arange(100))
    _, state = create_task(config, Sizes(10))
    save_weights(tmp_path / 'w', config.model.name, state.params, state.batch_stats, {})
    weights = Weights(tmp_path / 'w', config.model.name)

    def part(limit):
        seen = []  # for this part only, since threads of the previous one may still run

        def read(i):
            seen.append(i)
            if len(seen) > limit:
                raise Stopped
            return records.read(i)

        stopping = replace(records, read=read, store=replace(records.store, decoded={}))
        return features.backbone_class_means(config, weights, stopping), len(seen)

    whole, count = part(1000)
    assert count == 100
    (path,) = (tmp_path / 'features').glob('*.npz')
    path.unlink()
    with pytest.raises(Stopped):
        part(70)
    (unfinished,) = (tmp_path / 'features').glob('*.part.npz')
    done = int(np.load(unfinished)['done'])
    assert done == 48  # the fifth batch of 16 is cut off, and the fourth is not added yet
    rest, count = part(1000)
    np.testing.assert_allclose(rest, whole, rtol=1e-6)
    assert count == 100 - done
    assert sorted(p.suffix for p in (tmp_path / 'features').iterdir()) == ['.lock', '.npz']


def test_labels_go_on_where_they_stopped(config, tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'SAVE_SECONDS', -1.0)
    monkeypatch.setattr(tfds_source, '_CHUNK', 100)
    expected = open_split(config.target, 'train', config).labels

    class Source:
        chunks = 0
        limit = 5

        def __len__(self):
            return len(expected)

        def __getitems__(self, numbers):
            self.chunks += 1
            if self.chunks > self.limit:
                raise Stopped
            return [expected[i] for i in numbers]

    def labels(source):
        path = tmp_path / 'labels' / 'digits.npz'
        return tfds_source.split_labels(source, lambda raw: raw, path, 'digits')

    with pytest.raises(Stopped):
        labels(Source())
    (unfinished,) = (tmp_path / 'labels').glob('*.npz')
    assert unfinished.name.endswith('.part.npz')
    rest = Source()
    rest.limit = 13  # of 18
    np.testing.assert_array_equal(labels(rest), expected)
    assert rest.chunks == 13
    (path,) = (tmp_path / 'labels').glob('*.npz')
    np.testing.assert_array_equal(np.load(path)['labels'], expected)
