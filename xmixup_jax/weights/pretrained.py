"""Loads pre-trained networks: reads a weights file and fills a network with it."""

import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from xmixup_jax.data.names import imagenet_ids, readable
from xmixup_jax.errors import DataError
from xmixup_jax.integrity import arrays_digest, json_array
from xmixup_jax.models import MODELS, create_head, create_model
from xmixup_jax.models.vit import resize_positions
from xmixup_jax.optimizer import HEAD
from xmixup_jax.weights.files import (
    from_torch,
    read_metadata,
    read_tensors,
    tensor_key,
)
from xmixup_jax.weights.find import find_weights, split_entry
from xmixup_jax.weights.kinds import kind_of
from xmixup_jax.weights.layouts import best_prefix, to_timm

PyTree = Any
_SHOWN = 5  # mismatches in an error message
_WITHOUT_COLUMNS = (
    'do without: --config.match.similarity=cosine, --config.xmixup.source_head=random and, for '
    'Co-Tuning, --config.cotuning.temperature=1'
)
# Parts of keys in files that are not a complete float32 network.
_NO_NETWORK = {
    'lora_A lora_B lora_down lora_up': 'these are LoRA adapters; merge them into the network first '
    "(peft's merge_and_unload) and save it",
    '.SCB .qweight .qzeros .weight_scale .absmax': 'these weights are quantised; '
    'save float32 weights',
}


class Weights:
    """The tensors of a weights file, for the network `model`."""

    def __init__(self, path: Path, model: str):
        """Reads the file, or the folder of an orbax checkpoint.

        Args:
          path: from `find_weights`, perhaps with #ENTRY.
          model: config.model.name.

        Raises:
          DataError: the weights cannot be read; says why.
        """
        self.path = path
        self.model = model
        file, entry = split_entry(path)
        found = read_tensors(file, model, entry)
        self._set = found.name
        self.tensors, self._prefix = to_timm(found.tensors, model, file, found.part)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all tensors and the name of the model."""
        return arrays_digest({**self.tensors, 'model': json_array(self.model)})

    @property
    def head(self) -> dict[str, np.ndarray] | None:
        """The head: float32 'kernel' [D, K] and 'bias' [K]; None if the file has none."""
        name = MODELS[self.model].head
        kernel, bias = self.tensors.get(f'{name}.weight'), self.tensors.get(f'{name}.bias')
        if kernel is None or bias is None or (kernel.ndim, bias.ndim) != (2, 1) or not bias.size:
            return None
        kernel = from_torch(kernel).astype(np.float32)
        return {'kernel': kernel, 'bias': bias.astype(np.float32)}

    def head_columns(self, class_names: Sequence[str]) -> np.ndarray:
        """Finds the columns of the pre-trained head for the given classes.

        Names match exactly, or else as words: a WordNet id and its words are the same class; case
        does not matter, and '_' stands for ' '.

        Args:
          class_names: K names, for example of a source data set.

        Returns:
          int32 [K].

        Raises:
          DataError: the file has no head or does not name its columns, or a class has no column.
        """
        if self.head is None:
            raise DataError(f'weights {self.path} have no head: give weights with their head')
        known = _head_classes(self.path, len(self.head['bias']))
        if known is None:
            raise DataError(
                f'weights {self.path} do not name the {len(self.head["bias"])} classes of their '
                f'head, which are not the 1,000 of ImageNet: {_WITHOUT_COLUMNS}'
            )
        words = readable(known)
        folded = [_folded(word) for word in words]
        exact = {name: i for names in (words, known) for i, name in enumerate(names)}
        # Only unambiguous words: 'Cardigan' is a dog, 'cardigan' a garment.
        similar = {word: i for i, word in enumerate(folded) if folded.count(word) == 1}
        found = [exact.get(name, similar.get(_folded(name))) for name in class_names]
        missing = [name for name, i in zip(class_names, found, strict=True) if i is None]
        if missing:
            raise DataError(
                f'{len(missing)} of {len(class_names)} source classes have no column in the head '
                f'of {self.path} (for example {missing[0]!r}; it has, for example, {known[0]!r}): '
                f'name the class folders by WordNet id, or {_WITHOUT_COLUMNS}'
            )
        return np.array(found, np.int32)

    def fill(
        self, params: PyTree, batch_stats: PyTree, *, with_head: bool = False
    ) -> tuple[PyTree, PyTree]:
        """Fills a network with these weights.

        The positions of a vision transformer are resized to the network's image size.

        Args:
          params, batch_stats: of the network. Of the leaves that are filled only the shapes are
            used, so that they may be `jax.ShapeDtypeStruct`.
          with_head: whether to fill the head too.

        Returns:
          (params, batch_stats), float32.

        Raises:
          DataError: the tensors do not fit this network; counts those that are missing, unexpected
            or of the wrong shape, and names the first ones.
        """

        head = f'{MODELS[self.model].head}.'

        def is_wanted(key: str) -> bool:
            return with_head or not key.startswith(head)

        theirs = {key: from_torch(each) for key, each in self.tensors.items() if is_wanted(key)}
        leaves = jax.tree.leaves_with_path(params) + jax.tree.leaves_with_path(batch_stats)
        shapes = {tensor_key(self.model, path): leaf.shape for path, leaf in leaves}
        ours = {key: shape for key, shape in shapes.items() if is_wanted(key)}
        if 'pos_embed' in ours and _can_resize(theirs.get('pos_embed')):
            theirs['pos_embed'] = np.asarray(
                resize_positions(theirs['pos_embed'], ours['pos_embed'])
            )
        mismatches = _mismatches(ours, theirs)
        if any(mismatches):
            count = sum(map(len, mismatches))
            raise DataError(
                f'weights {self.path} do not fit config.model.name={self.model} '
                f'({count} {"tensor differs" if count == 1 else "tensors differ"}): '
                f'{_summary(mismatches)}{self._advice(mismatches)}'
            )

        def value(path, array):
            key = tensor_key(self.model, path)
            return np.asarray(theirs[key], np.float32) if key in theirs else array

        return jax.tree.map_with_path(value, params), jax.tree.map_with_path(value, batch_stats)

    def _advice(self, mismatches: list[list[str]]) -> str:
        """What to do about weights that do not fit, after a ': '; '' if that is unknown."""
        for marks, words in _NO_NETWORK.items():
            if any(mark in key for key in self.tensors for mark in marks.split()):
                return f': {words}'
        file, _ = split_entry(self.path)
        if self._prefix and len(mismatches[1]) == sum(map(len, mismatches)):
            prefix = self._prefix  # the unexpected tensors are outside of it
        else:
            prefix = best_prefix(self.tensors, self.model)
        if not prefix:
            return ''
        entry = '/'.join(part for part in (self._set, prefix.removesuffix('.')) if part)
        return f': to use only the keys under {prefix[:80]!r}, give {file.name}#{entry[:80]}'


def _can_resize(array: np.ndarray | None) -> bool:
    """Whether an array can be resized as positions: floating-point numbers [1, n, D]."""
    if array is None or array.ndim != 3 or not jnp.issubdtype(array.dtype, jnp.floating):
        return False
    return array.shape[0] == 1 and min(array.shape) > 0


def _mismatches(ours: dict[str, tuple[int, ...]], theirs: dict[str, np.ndarray]) -> list[list[str]]:
    """Lists tensors that are missing, unexpected, of the wrong shape, and of the wrong type."""
    shared = sorted(ours.keys() & theirs.keys())
    return [
        [f'missing {key}' for key in sorted(ours.keys() - theirs.keys())],
        [f'unexpected {key[:80]}' for key in sorted(theirs.keys() - ours.keys())],
        [
            f'{key} has shape {theirs[key].shape}, not {ours[key]}'
            for key in shared
            if theirs[key].shape != ours[key]
        ],
        [
            f'{key} has type {theirs[key].dtype}, not float32'
            for key in shared
            if theirs[key].shape == ours[key]
            and not jnp.issubdtype(theirs[key].dtype, jnp.floating)
        ],
    ]


def _summary(mismatches: list[list[str]]) -> str:
    """The first mismatches, with some of each kind, and the number of the others."""
    turns = [each for turn in itertools.zip_longest(*mismatches) for each in turn if each]
    rest = len(turns) - _SHOWN
    return '; '.join(turns[:_SHOWN]) + (f'; and {rest} more' if rest > 0 else '')


def _head_classes(path: Path, num_logits: int) -> tuple[str, ...] | None:
    """The classes of the head's first columns; None if they are unknown."""
    file, _ = split_entry(path)
    content = read_metadata(file) if kind_of(file) == 'safetensors' else {}
    if 'class_names' in content:
        return tuple(content['class_names'])
    return imagenet_ids() if num_logits == len(imagenet_ids()) else None


def _folded(name: str) -> str:
    return name.replace('_', ' ').casefold()


class Network(NamedTuple):
    """A network, in the order of the first arguments of `models.forward`."""

    graphdef: nnx.GraphDef
    params: PyTree
    """Nested dicts of float32 arrays; the head is params['fc']."""
    batch_stats: PyTree


def load_weights(
    weights: str,
    model: str,
    *,
    num_classes: int = 0,
    image_size: int = 224,
    width: int = 64,
    stem: str = 'imagenet',
) -> Network:
    """Loads a pre-trained network, for `models.forward(*network, images, train=False)`.

    Args:
      weights: a weights file (see "Networks and weights" for formats and key layouts), the folder
        of a run, OWNER/NAME on the Hugging Face Hub, or an installed package. A final #ENTRY
        chooses among several sets of weights in a file.
      model: a key of `models.MODELS`, for example 'resnet50'.
      num_classes: width of a new, random head; 0 keeps the head of the weights.
      image_size: side of the images in px; only vision transformers depend on it.
      width, stem: of a ResNet that is not the usual one, as in config.model.

    Returns:
      a `Network` with float32 parameters.

    Raises:
      DataError: there are no such weights, or they do not fit the network.

    >>> from xmixup_jax.models import forward
    >>> form = {'width': 4, 'stem': 'cifar'}
    >>> network = load_weights('weights.safetensors', 'resnet10', num_classes=3, **form)
    >>> outputs, _ = forward(*network, np.zeros((2, 32, 32, 3), np.float32), train=False)
    >>> outputs.logits.shape, outputs.features.shape
    ((2, 3), (2, 32))
    """
    found = Weights(find_weights(weights), model)
    config = ConfigDict({'name': model, 'width': width, 'stem': stem})
    logits = num_classes or (1 if found.head is None else len(found.head['bias']))
    graphdef, params, batch_stats = nnx.eval_shape(
        lambda: create_model(config, logits, image_size, 0)
    )
    if num_classes:
        params[HEAD] = create_head(config, num_classes, image_size, 0)
    if not num_classes and found.head is None:
        found.fill(params, batch_stats)  # if the backbone does not fit, say that instead
        raise DataError(f'weights {weights} have no head: give num_classes for a new one')
    return Network(graphdef, *found.fill(params, batch_stats, with_head=not num_classes))
