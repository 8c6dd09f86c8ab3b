"""The project's builders, on small archives in the official layouts, fetched over HTTP."""

import functools
import hashlib
import http.server
import importlib.util
import io
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.io import savemat

from configs import aircraft, cars, cub, indoor67
from xmixup_jax.data import builders
from xmixup_jax.data.decode import decode
from xmixup_jax.data.selection import open_split, train_and_test
from xmixup_jax.data.sources import tfds as tfds_source
from xmixup_jax.errors import DataError
from xmixup_jax.run.inputs import check_inputs


def jpeg(value):
    """A grey image of this brightness."""
    pixels = np.full((9, 12, 3), value, np.uint8)
    return cv2.imencode('.jpg', pixels, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()


def brightness(records, i):
    image = decode(records.read(int(records.index[i])), 9, '')
    return round(float(image.mean()))


def archive(path, files, mode='w:gz'):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def site(tmp_path):
    """(folder, URL) of a web server for this test."""
    root = tmp_path / 'site'
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=root)
    server = http.server.ThreadingHTTPServer(('localhost', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield root, f'http://localhost:{server.server_port}'
    server.shutdown()
    server.server_close()


def with_folders(config, tmp_path):
    config.data_dir, config.cache_dir = str(tmp_path / 'tfds'), str(tmp_path / 'cache')
    return config


def labels_by_brightness(records):
    """The class of each image, by the brightness that the test gave it."""
    return {
        brightness(records, i): records.class_names[label] for i, label in enumerate(records.labels)
    }


VARIANTS = ['707-320', 'F/A-18', 'Falcon 900', *(f'variant {i}' for i in range(97))]


def aircraft_archive(path):
    files = {'variants.txt': '\n'.join(VARIANTS) + '\n'}
    number = 0
    for split, count in {'train': 100, 'val': 3, 'test': 2}.items():
        lines = []
        for i in range(count):
            number += 1
            lines.append(f'{number:07d} {VARIANTS[i]}')
            files[f'images/{number:07d}.jpg'] = jpeg(number)
        files[f'images_variant_{split}.txt'] = '\n'.join(lines) + '\n'
    contents = {
        f'fgvc-aircraft-2013b/data/{name}': value if isinstance(value, bytes) else value.encode()
        for name, value in files.items()
    }
    return archive(path, contents)


def test_fgvc_aircraft(site, tmp_path, monkeypatch):
    root, address = site
    path = aircraft_archive(root / 'fgvc-aircraft-2013b.tar.gz')
    monkeypatch.setattr(builders.FgvcAircraft, 'URL', f'{address}/{path.name}')
    config = with_folders(aircraft.get_config(), tmp_path)
    with pytest.raises(DataError, match=r'MD5 .* the download is corrupted'):
        tfds_source.build('fgvc_aircraft', config.data_dir)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(builders.FgvcAircraft, 'MD5', md5)
    tfds_source.build('fgvc_aircraft', config.data_dir)
    train, test = train_and_test(config.target, config)
    assert len(train) == 103  # training and validation, as the configuration says
    assert train.class_names == test.class_names == tuple(VARIANTS)
    assert labels_by_brightness(test) == {104: '707-320', 105: 'F/A-18'}
    assert labels_by_brightness(train) == {
        **{i + 1: VARIANTS[i] for i in range(100)},
        **{i + 101: VARIANTS[i] for i in range(3)},
    }
    # Built once: the archive is not needed any more.
    path.unlink()
    assert len(open_split(config.target, 'validation', config)) == 3


SCENES = [f'scene{i:02d}' for i in range(67)]


def test_mit_indoor67(site, tmp_path, monkeypatch):
    root, address = site
    train = [f'{scene}/a b.jpg' if i == 5 else f'{scene}/a.jpg' for i, scene in enumerate(SCENES)]
    test = [f'{scene}/b.jpg' for scene in SCENES[:4]]
    files = {f'Images/{name}': jpeg(i) for i, name in enumerate(train + test)}
    files['Images/scene00/not in a list.jpg'] = jpeg(200)
    archive(root / 'indoorCVPR_09.tar', files, 'w')
    (root / 'TrainImages.txt').write_text('\n'.join(train))
    (root / 'TestImages.txt').write_text('\r\n'.join(test) + '\r\n')
    urls = {key: f'{address}/{Path(url).name}' for key, url in builders.MitIndoor67.URLS.items()}
    monkeypatch.setattr(builders.MitIndoor67, 'URLS', urls)
    config = with_folders(indoor67.get_config(), tmp_path)
    tfds_source.build('mit_indoor67', config.data_dir)
    train_records, test_records = train_and_test(config.target, config)
    assert train_records.class_names == tuple(SCENES)
    assert labels_by_brightness(train_records) == dict(enumerate(SCENES))
    assert labels_by_brightness(test_records) == {67 + i: SCENES[i] for i in range(4)}


MODELS = [f'Model {i} 2012' for i in range(196)]


def cars_files(manual, packed):
    """Three cars for training and two for the test, as the archives have them."""
    rows = {'train': [(1, '00001.jpg'), (196, '00002.jpg'), (7, '00003.jpg')]}
    rows['test'] = [(7, '00001.jpg'), (2, '00002.jpg')]
    manual.mkdir(parents=True, exist_ok=True)

    def mat(values):
        buffer = io.BytesIO()
        savemat(buffer, values)
        return buffer.getvalue()

    def annotations(split):
        fields = ('bbox_x1', 'bbox_y1', 'bbox_x2', 'bbox_y2')
        kinds = [(name, 'O') for name in (*fields, 'class', 'fname')]
        values = np.zeros((1, len(rows[split])), dtype=kinds)
        for i, (label, name) in enumerate(rows[split]):
            values[0, i] = (1, 1, 5, 5, label, name)
        return mat({'annotations': values})

    names = np.array([[np.array([name], 'O') for name in MODELS]], 'O')
    trees = {
        'car_devkit.tgz': {
            'devkit/cars_meta.mat': mat({'class_names': names}),
            'devkit/cars_train_annos.mat': annotations('train'),
        }
    }
    for split, first in {'train': 10, 'test': 20}.items():
        trees[f'cars_{split}.tgz'] = {
            f'cars_{split}/{name}': jpeg(first + i) for i, (_, name) in enumerate(rows[split])
        }
    for name, files in trees.items():
        archive(manual / name, files)
        if not packed:
            with tarfile.open(manual / name) as tar:
                tar.extractall(manual, filter='data')
            (manual / name).unlink()
    (manual / 'cars_test_annos_withlabels.mat').write_bytes(annotations('test'))


@pytest.mark.parametrize('packed', [True, False])
def test_stanford_cars_brought_by_hand(tmp_path, packed):
    config = with_folders(cars.get_config(), tmp_path)
    manual = tmp_path / 'tfds/downloads/manual'
    with pytest.raises(DataError, match=r'put its archives into .*manual \(cars_train\.tgz, cars'):
        tfds_source.build('stanford_cars', config.data_dir)
    manual.mkdir(parents=True)
    (manual / 'cars_train.tgz').write_text('')
    with pytest.raises(DataError, match=r'car_devkit\.tgz is missing: put it there'):
        tfds_source.build('stanford_cars', config.data_dir)
    (manual / 'cars_train.tgz').unlink()
    cars_files(manual, packed)
    tfds_source.build('stanford_cars', config.data_dir)
    train, test = train_and_test(config.target, config)
    assert train.class_names == tuple(MODELS)
    assert labels_by_brightness(train) == {10: MODELS[0], 11: MODELS[195], 12: MODELS[6]}
    assert labels_by_brightness(test) == {20: MODELS[6], 21: MODELS[1]}


def test_download_that_fails(site, tmp_path, monkeypatch):
    monkeypatch.setattr(builders.FgvcAircraft, 'URL', f'{site[1]}/not-there.tar.gz')
    with pytest.raises(DataError, match=r'data set fgvc_aircraft cannot be prepared: .*404'):
        tfds_source.build('fgvc_aircraft', str(tmp_path / 'tfds'))


def test_tensorflow_is_asked_for_only_where_tfds_needs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    config = with_folders(cub.get_config(), tmp_path)
    config.weights, config.method = '', 'finetune'
    with pytest.raises(DataError, match=r'not prepared in .*run  xmixup prepare '):
        check_inputs(config)
    with pytest.raises(DataError, match=r'needs TensorFlow .* pip install tensorflow-cpu'):
        tfds_source.build('caltech_birds2011', config.data_dir)
    builder = tfds_source.make_builder('imagenet_resized/8x8', str(tmp_path))
    assert tfds_source._manual_dir(builder) == tmp_path / 'downloads/manual'
    with pytest.raises(DataError, match=r'no data set catlech_birds: did you mean caltech_birds20'):
        tfds_source.build('catlech_birds', config.data_dir)


def test_no_builder_of_the_project_imports_tensorflow(tmp_path):
    cars_files(tmp_path / 'tfds/downloads/manual', True)
    code = (
        'import sys\n'
        'from xmixup_jax.data.sources import tfds as tfds_source\n'
        f'builder = tfds_source.build("stanford_cars", {str(tmp_path / "tfds")!r})\n'
        'print(len(builder.as_data_source(split="train")), "tensorflow" in sys.modules)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ['3', 'False']
