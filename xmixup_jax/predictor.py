"""A trained network: read from the folder of a run, and asked for predictions."""

import io
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps
from scipy.special import softmax

from xmixup_jax.compute import augment
from xmixup_jax.data.decode import MAX_BYTES, MAX_PIXELS, decode, middle_square
from xmixup_jax.data.names import readable
from xmixup_jax.data.pairing import worker_threads
from xmixup_jax.errors import DataError
from xmixup_jax.models import create_model, forward
from xmixup_jax.optimizer import HEAD
from xmixup_jax.weights.files import read_metadata
from xmixup_jax.weights.find import WEIGHTS_FILE
from xmixup_jax.weights.pretrained import Weights

# What cannot be decoded is reported by this program, with the file's name.
logging.getLogger('PIL').setLevel(logging.CRITICAL)

PyTree = Any
Picture = str | os.PathLike | bytes | np.ndarray | Image.Image
"""A file, its content, uint8 RGB [H, W, 3] or grey [H, W], or a Pillow image."""


class Prediction(NamedTuple):
    """What a network says of one image, the most probable first."""

    class_names: tuple[str, ...]
    """K names; words in the place of WordNet ids."""
    probabilities: np.ndarray
    """float32 [K], descending."""


@dataclass(frozen=True)
class TrainedModel:
    """The network of a finished run, with the target's head alone."""

    config: ConfigDict
    """Of the run."""
    class_names: tuple[str, ...]
    """K names, in the order of the logits."""
    graphdef: Any
    params: PyTree
    batch_stats: PyTree

    def logits(self, images: jax.Array) -> jax.Array:
        """uint8 RGB [B, S, S, 3], S = config.image_size, to logits float32 [B, K]; a pure
        function, to be used inside `jax.jit`."""
        images = augment.normalize(images, self.config.model)
        outputs, _ = forward(self.graphdef, self.params, self.batch_stats, images, train=False)
        return outputs.logits

    def predict(
        self, images: Picture | Iterable[Picture], batch_size: int = 64
    ) -> list[Prediction]:
        """Predicts the classes of images.

        Args:
          images: one or more, each as in `Picture`; also uint8 [N, H, W, 3].
          batch_size: images that go through the network at a time.

        Returns:
          a `Prediction` for each image.

        Raises:
          DataError: an image cannot be decoded.
        """
        if isinstance(images, Picture) and not (
            isinstance(images, np.ndarray) and images.ndim == 4
        ):
            images = [images]
        results = []
        for result in self.stream(images, batch_size):
            if isinstance(result, DataError):
                raise result
            results.append(result)
        return results

    def stream(
        self, images: Iterable[Picture], batch_size: int = 64
    ) -> Iterator[Prediction | DataError]:
        """As `predict`, one after the other; what cannot be decoded gives the error instead."""
        names = readable(self.class_names)
        with ThreadPoolExecutor(worker_threads(self.config.num_threads)) as threads:
            rest = iter(images)
            while batch := list(islice(rest, batch_size)):
                prepared = list(threads.map(self._prepare, batch))
                whole = [x for x in prepared if isinstance(x, np.ndarray)]
                logits = iter(self._run(whole, batch_size))
                for each in prepared:
                    yield each if isinstance(each, DataError) else _ranked(next(logits), names)

    def _prepare(self, picture: Picture) -> np.ndarray | DataError:
        """uint8 [S, S, 3], as in the tests of the run, whatever it is given as."""
        try:
            square = _decoded(picture, self.config.resize)
        except DataError as error:
            return error
        return augment.center_crop(square[None], self.config.image_size)[0]

    def _run(self, images: list[np.ndarray], batch_size: int) -> np.ndarray:
        """Logits; of a power of two of images, or a whole batch, so that few programs are compiled
        and one image does not cost as much as a batch."""
        size = self.config.image_size
        padded = min(batch_size, 1 << max(0, len(images) - 1).bit_length())
        batch = np.zeros((padded, size, size, 3), np.uint8)
        if not images:
            return batch[:0]
        batch[: len(images)] = images
        return np.asarray(self._jitted(batch))[: len(images)]

    @cached_property
    def _jitted(self):
        return jax.jit(self.logits)


def _ranked(logits: np.ndarray, names: list[str]) -> Prediction:
    probabilities = softmax(logits)
    order = np.argsort(-probabilities, kind='stable')
    return Prediction(tuple(names[c] for c in order), probabilities[order])


def _decoded(picture: Picture, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of an image in any form.

    Raises:
      DataError: it is none.
    """
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert('RGB'))
    if isinstance(picture, np.ndarray):
        if picture.ndim == 2:
            picture = np.repeat(picture[..., None], 3, axis=2)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise DataError(
                f'an image of shape {picture.shape} and type {picture.dtype}: it must be uint8 '
                '[H, W, 3] or [H, W]'
            )
        return middle_square(picture, size)
    if isinstance(picture, bytes):
        return _decode_any(picture, size, 'the image')
    path = Path(picture)
    try:
        with path.open('rb') as file:
            encoded = file.read(MAX_BYTES)
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error.strerror}') from error
    return _decode_any(encoded, size, str(path))


def _decode_any(encoded: bytes, size: int, where: str) -> np.ndarray:
    """By OpenCV, as in training; what it does not know, by Pillow."""
    try:
        return decode(encoded, size, where)
    except DataError as unknown:
        try:
            with Image.open(io.BytesIO(encoded), formats=pillow_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise unknown
                upright = ImageOps.exif_transpose(image)
                return middle_square(np.asarray(upright.convert('RGB')), size)
        except Exception:  # Pillow has no common class for what its decoders raise
            raise unknown from None


def pillow_formats() -> list[str]:
    """All that Pillow reads by itself."""
    Image.init()
    # PostScript is a program, which Pillow would have Ghostscript run; JPEG and PNG are OpenCV's,
    # and what it refused of them is damaged.
    return sorted(set(Image.OPEN) - {'EPS', 'JPEG', 'PNG'})


def load(run: str | os.PathLike) -> TrainedModel:
    """Reads what a finished run left.

    Args:
      run: the folder of the run, or a .safetensors file that this program wrote.

    Raises:
      DataError: there is no finished run in the folder, or its weights cannot be read.

    >>> model = load('runs/example')
    >>> (prediction,) = model.predict('image.png')
    >>> prediction.class_names[0], bool(prediction.probabilities[0] > 0.5)
    ('cat', True)
    """
    path = Path(run)
    if path.is_dir() or not path.suffix:
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise DataError(f'{run} holds no finished run ({path.name} is missing)')
    content = read_metadata(path)
    if not {'config', 'class_names'} <= content.keys():
        raise DataError(f'{path} does not say what its classes are: name the folder of a run')
    config, names = ConfigDict(content['config']), tuple(content['class_names'])
    weights = Weights(path, config.model.name)
    if weights.head is None:
        raise DataError(f'{path} holds no head')
    width = len(weights.head['bias'])
    _, params, batch_stats = create_model(config.model, width, config.image_size, 0)
    params, batch_stats = weights.fill(params, batch_stats, with_head=True)
    params[HEAD] = {key: leaf[..., : len(names)] for key, leaf in params[HEAD].items()}
    graphdef, _, _ = create_model(config.model, len(names), config.image_size, 0)
    return TrainedModel(config, names, graphdef, params, batch_stats)
