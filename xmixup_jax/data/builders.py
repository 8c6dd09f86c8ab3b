"""tfds builders for data sets that tfds lacks, or whose builders in tfds no longer work.

They do not need TensorFlow, and they store the encoded images unchanged.
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

# Limits on what an archive unpacks to. Compression hardly shrinks images; it shrinks lists and
# tables by a factor of a few tens.
_MAX_GROWTH = 100
_ALWAYS_ALLOWED = 2**26
Examples = Iterator[tuple[str, dict[str, Any]]]


def _info(builder, classes: int, description: str, homepage: str, citation: str, licence: str):
    """Describes images with labels. The class names are read from the archive later."""
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
    """Unpacks a tar archive atomically, and returns the folder.

    (tfds would use TensorFlow for this.) Nothing is written outside the folder: names that lead out
    of it are refused, links and devices skipped.

    Raises:
      DataError: the archive is corrupted, or not the original.
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
                f'{archive} cannot be unpacked ({error}): it is corrupted or not the original; '
                'download it again'
            ) from error
        partial.rename(folder)
    return folder


class _TarFilter:
    """Filters the members for `extractall`: stricter than tarfile's 'data' filter.

    (In several versions of Python, that filter let links lead out of the folder.)
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
            log.warning('Skipped %r, which is neither a file nor a folder', member.name)
            return None
        return tarfile.data_filter(member, folder)


def _check_md5(path: Path, expected: str) -> None:
    with path.open('rb') as file:
        found = hashlib.file_digest(file, 'md5').hexdigest()
    if found != expected:
        raise DataError(
            f'{path} has MD5 {found}, not {expected}: the download is corrupted; remove the file '
            'and run the same command again'
        )


class FgvcAircraft(tfds.core.GeneratorBasedBuilder):
    """FGVC-Aircraft: 10,000 photographs of 100 variants of aircraft, in three equal splits."""

    VERSION = tfds.core.Version('1.0.0')
    URL = 'https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz'
    MD5 = 'd4acdd33327262359767eeaa97a4f732'  # from the data set's page

    def _info(self):
        return _info(
            self,
            100,
            '10,000 photographs of 100 variants of aircraft (2013b): 3,334 training, 3,333 '
            'validation and 3,333 test images. The bottom 20 rows of each are a copyright notice.',
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
    """MIT Indoor-67: 67 classes of indoor scenes, each with 80 training and 20 test images."""

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
            'Photographs of 67 kinds of indoor scenes: the 5,360 images of the official training '
            'list and the 1,340 of the official test list, out of 15,620 in the archive.',
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
    """Stanford Cars: 16,185 photographs of 196 models of cars. Needs a manual download."""

    VERSION = tfds.core.Version('1.0.0')
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
        cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat. The
        original site is gone; there are copies on Kaggle and in the Internet Archive, for example.
        The unpacked folders cars_train, cars_test and devkit work as well"""

    def _info(self):
        return _info(
            self,
            196,
            '16,185 photographs of 196 models of cars: 8,144 training and 8,041 test images.',
            'https://ai.stanford.edu/~jkrause/cars/car_dataset.html',
            'Krause, Stark, Deng, Fei-Fei: 3D Object Representations for Fine-Grained '
            'Categorization. 3dRR workshop, ICCV 2013.',
            'For research only, under the terms of ImageNet.',
        )

    def _split_generators(self, dl_manager):
        manual = Path(dl_manager.manual_dir)

        def folder(name: str, archive: str) -> Path:
            unpacked = manual / name
            if unpacked.is_dir():
                return unpacked
            if not (manual / archive).is_file():
                raise DataError(
                    f'{manual / archive} is missing: put it there, or put its unpacked folder '
                    f'{name} there'
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
