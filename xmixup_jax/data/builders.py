"""tfds builders of the data sets that tfds has none for, or none that works any more.

They are built without TensorFlow. The encoded images are stored as they came.
"""

import hashlib
import logging
import lzma
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from scipy.io import loadmat

from xmixup_jax.errors import DataError

log = logging.getLogger('xmixup_jax')

# An archive of images hardly shrinks when it is compressed, one of lists and tables by some tens.
_MAX_GROWTH = 100
_ALWAYS_ALLOWED = 2**26
Examples = Iterator[tuple[str, dict[str, Any]]]


def _info(builder, classes: int, description: str, homepage: str, citation: str, licence: str):
    """Images and labels; the classes' names come from a file of the archive."""
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict(
            {
                'image': tfds.features.Image(),
                'label': tfds.features.ClassLabel(num_classes=classes),
            }
        ),
        supervised_keys=('image', 'label'),
        homepage=homepage,
        citation=citation,
        license=licence,
    )


def _unpack(archive: Path) -> Path:
    """The folder of the files in a tar archive; it appears whole or not at all.

    tfds would unpack it with TensorFlow. Nothing is written outside the folder: names that lead out
    of it are refused, links and devices left out.

    Raises:
      DataError: the archive is damaged, or not what it seems.
    """
    folder = archive.with_name(archive.name + '.unpacked')
    if not folder.is_dir():
        partial = folder.with_name(folder.name + '.part')
        shutil.rmtree(partial, ignore_errors=True)
        limit = _MAX_GROWTH * archive.stat().st_size + _ALWAYS_ALLOWED
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(partial, filter=_TarFilter(limit))  # noqa: S202  (filtered)
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise DataError(
                f'{archive} cannot be unpacked ({error}): it is damaged or not the original; get '
                'it once more'
            ) from error
        partial.rename(folder)
    return folder


class _TarFilter:
    """What `extractall` asks about each member: tarfile's 'data' filter, and less trust.

    (That filter has let links lead out of the folder in several versions of Python.)
    """

    def __init__(self, limit: int):
        self._left = limit

    def __call__(self, member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        self._left -= member.size + tarfile.BLOCKSIZE
        if self._left < 0:
            raise tarfile.TarError(
                f'it unpacks to more than {_MAX_GROWTH} times its size at {member.name!r}'
            )
        if not (member.isfile() or member.isdir()):
            log.warning('Left out: %r, which is neither a file nor a folder', member.name)
            return None
        return tarfile.data_filter(member, folder)


def _check_md5(path: Path, expected: str) -> None:
    with path.open('rb') as file:
        found = hashlib.file_digest(file, 'md5').hexdigest()
    if found != expected:
        raise DataError(
            f'{path} has MD5 {found}, not {expected}: the download was damaged; remove the file '
            'and run the same command again'
        )


class FgvcAircraft(tfds.core.GeneratorBasedBuilder):
    """FGVC-Aircraft: 10,000 photographs of 100 variants of aircraft, in three equal splits."""

    VERSION = tfds.core.Version('1.0.0')
    URL = 'https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz'
    MD5 = 'd4acdd33327262359767eeaa97a4f732'  # as the data set's page gives it

    def _info(self):
        return _info(
            self,
            100,
            '10,000 photographs of 100 variants of aircraft (2013b): 3,334 for training, 3,333 for '
            'validation, 3,333 for the test. The 20 lowest rows of each are a copyright notice.',
            'https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/',
            'Maji, Rahtu, Kannala, Blaschko, Vedaldi: Fine-Grained Visual Classification of '
            'Aircraft. arXiv:1306.5151, 2013.',
            'Non-commercial research only; the photographs belong to airliners.net and their '
            'photographers.',
        )

    def _split_generators(self, dl_manager):
        archive = Path(dl_manager.download(self.URL))
        _check_md5(archive, self.MD5)
        data = _unpack(archive) / 'fgvc-aircraft-2013b' / 'data'
        self.info.features['label'].names = (data / 'variants.txt').read_text().splitlines()
        official = {'train': 'train', 'validation': 'val', 'test': 'test'}
        return {
            split: self._generate_examples(data, f'images_variant_{name}.txt')
            for split, name in official.items()
        }

    def _generate_examples(self, data: Path, names: str) -> Examples:
        for line in (data / names).read_text().splitlines():
            number, variant = line.split(' ', 1)
            yield number, {'image': data / 'images' / f'{number}.jpg', 'label': variant}


class MitIndoor67(tfds.core.GeneratorBasedBuilder):
    """MIT Indoor-67: scenes inside buildings, 80 for training and 20 for the test of each class."""

    VERSION = tfds.core.Version('1.0.0')
    URLS = {  # noqa: RUF012  (never written to)
        'images': 'http://groups.csail.mit.edu/vision/LabelMe/NewImages/indoorCVPR_09.tar',
        'train': 'http://web.mit.edu/torralba/www/TrainImages.txt',
        'test': 'http://web.mit.edu/torralba/www/TestImages.txt',
    }

    def _info(self):
        return _info(
            self,
            67,
            'Photographs of 67 kinds of indoor scenes: the 5,360 of the official training list '
            'and the 1,340 of the official test list, of 15,620 in the archive.',
            'https://web.mit.edu/torralba/www/indoor.html',
            'Quattoni, Torralba: Recognizing Indoor Scenes. CVPR 2009.',
            'For research; the photographs come from search engines, Flickr and LabelMe.',
        )

    def _split_generators(self, dl_manager):
        paths = dl_manager.download(self.URLS)
        images = _unpack(Path(paths['images'])) / 'Images'
        lists = {
            split: Path(paths[split]).read_text().strip().splitlines()
            for split in ('train', 'test')
        }
        self.info.features['label'].names = sorted(
            {line.split('/')[0] for lines in lists.values() for line in lines}
        )
        return {split: self._generate_examples(images, lines) for split, lines in lists.items()}

    def _generate_examples(self, images: Path, lines: list[str]) -> Examples:
        for line in lines:
            yield line, {'image': images / line, 'label': line.split('/')[0]}


class StanfordCars(tfds.core.GeneratorBasedBuilder):
    """Stanford Cars: 16,185 photographs of 196 models of cars. To be brought by hand."""

    VERSION = tfds.core.Version('1.0.0')
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
        cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat, whose
        original address is gone; copies are for example on Kaggle and in the Internet Archive.
        Unpacked folders cars_train, cars_test and devkit will do, too"""

    def _info(self):
        return _info(
            self,
            196,
            '16,185 photographs of 196 models of cars: 8,144 for training, 8,041 for the test.',
            'https://ai.stanford.edu/~jkrause/cars/car_dataset.html',
            'Krause, Stark, Deng, Fei-Fei: 3D Object Representations for Fine-Grained '
            'Categorization. 3dRR workshop, ICCV 2013.',
            'For research only, by the terms of ImageNet.',
        )

    def _split_generators(self, dl_manager):
        manual = Path(dl_manager.manual_dir)

        def folder(name: str, archive: str) -> Path:
            unpacked = manual / name
            if unpacked.is_dir():
                return unpacked
            if not (manual / archive).is_file():
                raise DataError(
                    f'{manual / archive} is missing: put it there, or the unpacked folder {name}'
                )
            return _unpack(manual / archive) / name

        devkit = folder('devkit', 'car_devkit.tgz')
        test = manual / 'cars_test_annos_withlabels.mat'
        annotations = {'train': devkit / 'cars_train_annos.mat', 'test': test}
        meta = loadmat(devkit / 'cars_meta.mat', squeeze_me=True)
        names = [str(name) for name in meta['class_names']]
        self.info.features['label'].names = names
        return {
            split: self._generate_examples(
                folder(f'cars_{split}', f'cars_{split}.tgz'), path, names
            )
            for split, path in annotations.items()
        }

    def _generate_examples(self, images: Path, annotations: Path, names: list[str]) -> Examples:
        for row in loadmat(annotations, squeeze_me=True)['annotations']:
            name = str(row['fname'])
            yield name, {'image': images / name, 'label': names[int(row['class']) - 1]}
