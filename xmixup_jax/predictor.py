"""Loads a trained network from a run folder and predicts with it."""

import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image
from scipy.special import softmax
from tqdm import tqdm

from xmixup_jax.compute import augment
from xmixup_jax.compute.evaluation import Tested, collect
from xmixup_jax.compute.views import VIEWS, over_views
from xmixup_jax.config import from_stored
from xmixup_jax.data.decode import MAX_BYTES, decode, rgb, square
from xmixup_jax.data.names import readable
from xmixup_jax.data.pairing import eval_batches, worker_threads
from xmixup_jax.data.records import Records
from xmixup_jax.errors import ConfigError, DataError
from xmixup_jax.files import AVERAGE, BEST
from xmixup_jax.models import create_model, forward
from xmixup_jax.models.cpu import any_platform
from xmixup_jax.optimizer import HEAD
from xmixup_jax.text import one_line
from xmixup_jax.weights.files import read_metadata
from xmixup_jax.weights.find import WEIGHTS_FILE
from xmixup_jax.weights.pretrained import Weights

# This program itself reports images that cannot be decoded, with their names.
logging.getLogger('PIL').setLevel(logging.CRITICAL)

PyTree = Any
Picture = str | os.PathLike | bytes | np.ndarray | Image.Image
"""A path, the content of an image file, uint8 RGB [H, W, 3] or grey [H, W], or a Pillow image."""

NETWORKS = {'final': WEIGHTS_FILE, 'best': BEST, 'ema': AVERAGE}
"""The networks that a run saves: its result, the best one in the tests during training, and the
moving average of the weights."""
_WRITTEN_WITH = {'best': 'config.eval_every', 'ema': 'config.ema_decay'}


class Prediction(NamedTuple):
    """The classes of one image, the most probable first."""

    class_names: tuple[str, ...]
    """K names, with WordNet ids replaced by words."""
    probabilities: np.ndarray
    """float32 [K], descending."""


@dataclass(frozen=True)
class TrainedModel:
    """The network of a finished run, with a head for the target classes only."""

    config: ConfigDict
    """The configuration of the run."""
    class_names: tuple[str, ...]
    """K names, in the order of the logits."""
    graphdef: Any
    params: PyTree
    batch_stats: PyTree
    path: Path
    """The file from which it was read."""
    score: dict[str, Any]
    """'best_step', 'best_top1' and 'best_loss' for the best network of a run; {} for others."""

    def describe(self) -> str:
        """Describes the network in one line."""
        words = f'the network in {one_line(self.path)}'
        if self.score:
            return (
                f'{words}, the best of the run (step {self.score["best_step"]}, '
                f'{100 * self.score["best_top1"]:.2f} % top-1 in the '
                f'{self.score.get("best_by", "test")} there)'
            )
        if self.path.name == WEIGHTS_FILE and self.path.with_name(BEST).is_file():
            if self.config.target.get('validation_share'):
                return f'{words}, the best of the run on its validation images'
            return f'{words}, the final one of the run (which also has a best one)'
        return words

    def logits(self, images: jax.Array) -> jax.Array:
        """Computes the logits of one view of each image; a pure function, for use in `jax.jit`.

        It can be exported for every platform, see `jax.export`.

        Args:
          images: uint8 RGB [B, S, S, 3], S = config.image_size.

        Returns:
          float32 [B, K].
        """
        with any_platform():
            return self._logits_of(augment.normalize(images, self.config.model))

    def _logits_of(self, views: jax.Array) -> jax.Array:
        outputs, _ = forward(self.graphdef, self.params, self.batch_stats, views, train=False)
        return outputs.logits

    def predict(
        self, images: Picture | Iterable[Picture], batch_size: int = 64
    ) -> list[Prediction]:
        """Predicts the classes of images.

        Args:
          images: one or more, each as in `Picture`; or an array, uint8 [N, H, W, 3].
          batch_size: the number of images in each forward pass.

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
        """Yields predictions one by one; for an image that cannot be decoded, yields the error.

        Args:
          images: each as in `Picture`.
          batch_size: the number of images in each forward pass.
        """
        names = readable(self.class_names)
        with ThreadPoolExecutor(worker_threads(self.config.num_threads)) as threads:
            rest = iter(images)
            while batch := list(islice(rest, batch_size)):
                prepared = list(threads.map(self._prepare, batch))
                decoded = [x for x in prepared if isinstance(x, np.ndarray)]
                logits = iter(self._run(decoded, batch_size))
                for each in prepared:
                    yield each if isinstance(each, DataError) else _rank(next(logits), names)

    def test(self, records: Records, batch_size: int = 64) -> Tested:
        """Tests the network on labelled images, as `evaluation.evaluate` does in a run.

        Args:
          records: with the classes of the network, in its order; see `selection.renumber`.
          batch_size: the number of images in each forward pass.
        """
        batches = []
        with tqdm(
            total=len(records), desc='evaluate', unit='image', disable=None, leave=False
        ) as bar:
            for batch in eval_batches(
                records,
                batch_size=batch_size,
                resize=self.config.resize,
                fit=self.config.fit,
                num_threads=self.config.num_threads,
                process_index=0,
                process_count=1,
            ):
                outputs = {key: batch[key] for key in ('label', 'index', 'mask')}
                batches.append(outputs | {'logits': np.asarray(self._jitted(batch['image']))})
                bar.update(min(batch_size, len(records) - bar.n))
        return collect(batches)

    def _prepare(self, picture: Picture) -> np.ndarray | DataError:
        """Reads an image as the tests of the run do: uint8 [R, R, 3], R = config.resize."""
        try:
            return _decode(picture, self.config.resize, self.config.fit)
        except DataError as error:
            return error

    def _run(self, images: list[np.ndarray], batch_size: int) -> np.ndarray:
        """Computes the logits of uint8 [N, R, R, 3], N <= batch_size.

        Batches are padded to a power of two (at most batch_size), so that few programs are compiled
        and a single image does not cost as much as a full batch.
        """
        size = self.config.resize
        padded = min(batch_size, 1 << max(0, len(images) - 1).bit_length())
        batch = np.zeros((padded, size, size, 3), np.uint8)
        if not images:
            return batch[:0]
        batch[: len(images)] = images
        return np.asarray(self._jitted(batch))[: len(images)]

    @cached_property
    def _jitted(self):
        return jax.jit(lambda images: over_views(self.config, self._logits_of, images))


def _rank(logits: np.ndarray, names: list[str]) -> Prediction:
    probabilities = softmax(logits)
    order = np.argsort(-probabilities, kind='stable')
    return Prediction(tuple(names[c] for c in order), probabilities[order])


def _decode(picture: Picture, size: int, fit: str) -> np.ndarray:
    """Reads an image in any form as training would: uint8 [size, size, 3].

    Raises:
      DataError: it is not an image.
    """
    if isinstance(picture, Image.Image):
        return square(rgb(picture), size, fit)
    if isinstance(picture, np.ndarray):
        return square(_as_rgb(picture), size, fit)
    if isinstance(picture, bytes):
        return decode(picture, size, 'the image', fit)
    path = Path(picture)
    try:
        if not (path.is_file() or path.is_dir()) and path.exists():
            raise DataError(f'{one_line(path)} is not a regular file: name image files')
        with path.open('rb') as file:
            encoded = file.read(MAX_BYTES)
    except (OSError, ValueError) as error:  # a zero byte in a path raises ValueError
        why = getattr(error, 'strerror', None) or error
        raise DataError(f'{one_line(path)} cannot be read: {why}') from error
    return decode(encoded, size, one_line(path), fit)


def _as_rgb(image: np.ndarray) -> np.ndarray:
    """Converts uint8 [H, W] to [H, W, 3], and checks the array.

    Raises:
      DataError: the array has another dtype or shape, or is empty.
    """
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise DataError(
            f'an image has shape {image.shape} and type {image.dtype}: it must be uint8 [H, W, 3] '
            'or [H, W], with values from 0 to 255'
        )
    return image


def load(
    run: str | os.PathLike,
    network: Literal['final', 'best', 'ema'] = 'final',
    views: Literal[1, 2, 10] | None = None,
) -> TrainedModel:
    """Loads a network of a finished run.

    Args:
      run: the folder of the run, or a .safetensors file that a run wrote.
      network: which network of the folder. 'final' is the result of the run: the last network, or
        the best one if the run has config.target.validation_share. 'best' is the best one in the
        tests during training, if the run has config.eval_every. 'ema' is the moving average of the
        weights, if the run has config.ema_decay.
      views: views of an image to average, 1, 2 or 10; by default the run's config.test_views.

    Raises:
      ConfigError: the run has no such network, or the number of views is impossible.
      DataError: the folder has no finished run, or its weights cannot be read.

    >>> model = load('runs/example')
    >>> (prediction,) = model.predict('image.png')
    >>> prediction.class_names[0], bool(prediction.probabilities[0] > 0.5)
    ('cat', True)
    """
    path = _network_file(Path(run), network)
    content = read_metadata(path)
    if not {'config', 'class_names'} <= content.keys():
        raise DataError(
            f'{path} does not name its classes, so no run wrote it: name the folder of a run'
        )
    config, names = from_stored(content['config']), tuple(content['class_names'])
    if views is not None:
        config.test_views = views
    if config.test_views not in VIEWS:
        raise ConfigError(f'views={views}: must be 1, 2 or 10')
    weights = Weights(path, config.model.name)
    if weights.head is None:
        raise DataError(f'{path} has no head: name the folder of a run')
    graphdef, params, batch_stats = nnx.eval_shape(
        lambda: create_model(config.model, len(names), config.image_size, 0)
    )
    params, batch_stats = weights.fill(params, batch_stats)
    params[HEAD] = {key: leaf[..., : len(names)] for key, leaf in weights.head.items()}
    score = content.get('score') or {}
    return TrainedModel(config, names, graphdef, params, batch_stats, path, score)


def _network_file(run: Path, network: str) -> Path:
    """The file of a network: one of `NETWORKS` in the folder of a run, or the file `run` itself."""
    if network not in NETWORKS:
        raise ConfigError(f'network={network!r}: must be one of {", ".join(NETWORKS)}')
    is_folder = run.is_dir() or not run.suffix
    if not is_folder and network != 'final':
        raise ConfigError(
            f'{run} is a single network: to choose network={network}, name the folder of the run'
        )
    path = run / NETWORKS[network] if is_folder else run
    if path.is_file():
        return path
    if is_folder and (run / WEIGHTS_FILE).is_file():
        raise ConfigError(
            f'{run} has no {path.name}, which only runs with {_WRITTEN_WITH[network]} write: use '
            'the final network, --network=final'
        )
    if not run.exists():
        raise DataError(f'{run} does not exist: name the folder of a finished run')
    raise DataError(
        f'{run} contains no finished run ({path.name} is missing): name the folder of a finished '
        'run, or run the training command again, which resumes it'
    )
