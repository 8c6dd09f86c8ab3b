"""Weights in and out, by their keys in timm's layout (for ResNets also torchvision's).

`layer1.0.conv1.weight` [O, I, kH, kW] here is `layer1` / 0 / `conv1` / `kernel` [kH, kW, I, O];
`bn1.weight`, `.bias`, `.running_mean` and `.running_var` are scale, bias, mean and var. The head,
`fc` here, has timm's name in files.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from xmixup_jax.data.names import imagenet_ids, readable
from xmixup_jax.errors import DataError, UserError, first_line
from xmixup_jax.files import atomic_write, read_json
from xmixup_jax.integrity import arrays_digest, json_array, network_digest
from xmixup_jax.models import MODELS, create_model
from xmixup_jax.models.vit import resize_positions
from xmixup_jax.optimizer import HEAD
from xmixup_jax.trees import read_tree
from xmixup_jax.weights.find import TORCH_SUFFIXES, find_weights
from xmixup_jax.weights.torch_file import TorchFileError, read_torch_file

PyTree = Any
_HEADER = 'xmixup_jax'  # entry of a file's header
_NAMES = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}


def _key(model: str, path) -> str:
    *parents, leaf = [str(entry.key) for entry in path]
    if parents and parents[0] == HEAD:
        parents[0] = MODELS[model].head
    return '.'.join([*parents, _NAMES.get(leaf, leaf)])


def _to_torch(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 2:
        array = array.T
    return np.ascontiguousarray(array)


def _from_torch(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 else array


def torch_tensors(model: str, params: PyTree, batch_stats: PyTree) -> dict[str, np.ndarray]:
    """All parameters and statistics by timm's keys, with PyTorch's axes.

    Args:
      model: config.model.name.
    """
    tensors = {}
    for tree in (params, batch_stats):
        for path, array in jax.tree.leaves_with_path(tree):
            tensors[_key(model, path)] = _to_torch(np.asarray(array))
    return tensors


def save_weights(
    path: Path, model: str, params: PyTree, batch_stats: PyTree, metadata: dict[str, Any]
) -> None:
    """Writes a safetensors file; it appears whole or not at all, and holds a digest of itself.

    `metadata`, JSON values, becomes one entry of the file's header: safetensors writes several in
    an order that changes, and equal runs should leave equal files.

    Raises:
      UserError: it cannot be written.
    """
    tensors = torch_tensors(model, params, batch_stats)
    header = {'content': metadata, 'digest': _digest(tensors, metadata)}
    with atomic_write(path) as partial:
        try:
            save_file(tensors, partial, {_HEADER: json.dumps(header)})
        except SafetensorError as error:
            raise UserError(f'{path} cannot be written ({error}): make room') from error


def _digest(tensors: dict[str, np.ndarray], metadata: dict[str, Any]) -> str:
    return arrays_digest({**tensors, _HEADER: json_array(metadata)})


class Weights:
    """The tensors of a file of weights, for a network of the kind `model`."""

    def __init__(self, path: Path, model: str):
        """Reads the file, or the folder of an orbax checkpoint.

        Args:
          path: as `find_weights` gives it.
          model: config.model.name.

        Raises:
          DataError: it cannot be read; says why.
        """
        self.path = path
        self.model = model
        rename = MODELS[model].timm_key
        self.tensors = {
            rename(model, key): tensor
            for key, tensor in _read(path, model).items()
            if not key.endswith('.num_batches_tracked')
            and not key.startswith(MODELS[model].optional)
        }

    @cached_property
    def digest(self) -> str:
        """Changes with any tensor."""
        return arrays_digest({**self.tensors, 'model': json_array(self.model)})

    @property
    def head(self) -> dict[str, np.ndarray] | None:
        """Float32 'kernel' [D, K] and 'bias' [K]; None if the file holds none."""
        name = MODELS[self.model].head
        kernel, bias = self.tensors.get(f'{name}.weight'), self.tensors.get(f'{name}.bias')
        if kernel is None or bias is None:
            return None
        kernel = _from_torch(kernel).astype(np.float32)
        return {'kernel': kernel, 'bias': bias.astype(np.float32)}

    def head_columns(self, class_names: Sequence[str]) -> np.ndarray:
        """Finds the columns of the file's own head that stand for these classes.

        Names are compared as they are, then as words: WordNet ids and their words are the same
        class, whatever the case of the letters and with '_' for ' '.

        Args:
          class_names: K names, as of a source data set.

        Returns:
          int32 [K].

        Raises:
          DataError: the file has no head or does not say what its columns are, or a class has no
            column.
        """
        if self.head is None:
            raise DataError(f'weights {self.path} hold no head: give weights with their head')
        known = _head_classes(self.path, len(self.head['bias']))
        if known is None:
            raise DataError(
                f'weights {self.path} do not name the {len(self.head["bias"])} columns of their '
                'head, which are not the 1,000 of ImageNet: use --config.match.similarity=cosine '
                'and --config.xmixup.source_head=random'
            )
        words = readable(known)
        folded = [_folded(word) for word in words]
        exact = {name: i for names in (words, known) for i, name in enumerate(names)}
        # Only where it is one class: 'Cardigan' is a dog, 'cardigan' a garment.
        similar = {word: i for i, word in enumerate(folded) if folded.count(word) == 1}
        found = [exact.get(name, similar.get(_folded(name))) for name in class_names]
        missing = [name for name, i in zip(class_names, found, strict=True) if i is None]
        if missing:
            raise DataError(
                f'{len(missing)} of {len(class_names)} source classes have no column in the head '
                f'of {self.path} (for example {missing[0]!r}; it has, for example, {known[0]!r}): '
                'name the class folders by WordNet id, or use --config.match.similarity=cosine and '
                '--config.xmixup.source_head=random'
            )
        return np.array(found, np.int32)

    def fill(
        self, params: PyTree, batch_stats: PyTree, *, with_head: bool = False
    ) -> tuple[PyTree, PyTree]:
        """A network with these weights, all but the head unless `with_head`.

        Args:
          params, batch_stats: of the network; they give names and shapes, and the head. A vision
            transformer's positions are resized to the network's image size.

        Raises:
          DataError: the tensors are not this network's; lists every missing, unexpected and
            misshapen key.
        """
        head = f'{MODELS[self.model].head}.'
        ours = {
            key: _from_torch(tensor).shape
            for key, tensor in torch_tensors(self.model, params, batch_stats).items()
        }
        theirs = {key: _from_torch(tensor) for key, tensor in self.tensors.items()}
        if not with_head:
            ours, theirs = (
                {key: value for key, value in tree.items() if not key.startswith(head)}
                for tree in (ours, theirs)
            )
        if 'pos_embed' in ours and theirs.get('pos_embed') is not None:
            theirs['pos_embed'] = np.asarray(
                resize_positions(theirs['pos_embed'], ours['pos_embed'])
            )
        faults = [f'missing {key}' for key in sorted(ours.keys() - theirs.keys())]
        faults += [f'unexpected {key}' for key in sorted(theirs.keys() - ours.keys())]
        faults += [
            f'{key} has shape {theirs[key].shape}, not {shape}'
            for key, shape in sorted(ours.items())
            if key in theirs and theirs[key].shape != shape
        ]
        if faults:
            raise DataError(
                f'weights {self.path} do not fit config.model.name={self.model} '
                f'({len(faults)} tensors differ): ' + '; '.join(faults)
            )

        def value(path, array):
            key = _key(self.model, path)
            return np.asarray(theirs[key], np.float32) if key in theirs else array

        return jax.tree.map_with_path(value, params), jax.tree.map_with_path(value, batch_stats)


def _head_classes(path: Path, num_logits: int) -> tuple[str, ...] | None:
    """The classes of the head's first columns; None where nothing names them."""
    content = {} if path.suffix != '.safetensors' else read_metadata(path)
    if 'class_names' in content:
        return tuple(content['class_names'])
    return imagenet_ids() if num_logits == len(imagenet_ids()) else None


def _folded(name: str) -> str:
    return name.replace('_', ' ').casefold()


class Network(NamedTuple):
    """What `models.forward` takes before the images."""

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
    """A pre-trained network, for `models.forward(*network, images, train=False)`.

    Args:
      weights: a .safetensors or .pth file in timm's or torchvision's key layout, the folder of a
        run, OWNER/NAME on the Hugging Face Hub, or an installed package.
      model: a key of `models.MODELS`, for example 'resnet50'.
      num_classes: of a new head, drawn at random; 0: with the weights' own head.
      image_size: side of the images, px; only vision transformers depend on it.
      width, stem: of a ResNet, where it is not the usual one.

    Raises:
      DataError: there are no such weights, or they are another network's.

    >>> from xmixup_jax.models import forward
    >>> form = {'width': 4, 'stem': 'cifar'}
    >>> network = load_weights('weights.safetensors', 'resnet10', num_classes=3, **form)
    >>> outputs, _ = forward(*network, np.zeros((2, 32, 32, 3), np.float32), train=False)
    >>> outputs.logits.shape, outputs.features.shape
    ((2, 3), (2, 32))
    """
    found = Weights(find_weights(weights), model)
    if not num_classes and found.head is None:
        raise DataError(f'weights {weights} hold no head: give num_classes, for a new one')
    config = ConfigDict({'name': model, 'width': width, 'stem': stem})
    logits = num_classes or len(found.head['bias'])
    graphdef, params, batch_stats = create_model(config, logits, image_size, 0)
    return Network(graphdef, *found.fill(params, batch_stats, with_head=not num_classes))


def _read(path: Path, model: str) -> dict[str, np.ndarray]:
    """All tensors, by the keys that the file has."""
    if path.is_dir():
        return _read_orbax(path, model)
    try:
        if path.suffix in TORCH_SUFFIXES:
            return read_torch_file(path)
        with safe_open(path, framework='numpy') as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = _read_header(file)
    except TorchFileError as error:
        raise DataError(f'weights {path} cannot be read: {error}') from error
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise DataError(
            f'weights file {path} is not a readable safetensors file: {error}'
        ) from error
    if header and header['digest'] != _digest(tensors, header['content']):
        raise DataError(
            f'weights file {path} is damaged, it is not what was written: restore it from a copy'
        )
    return tensors


def _read_header(file: safe_open) -> dict[str, Any]:
    """What `save_weights` wrote beside the tensors; {} in files from elsewhere."""
    header = json.loads((file.metadata() or {}).get(_HEADER, '{}'))
    if header and not (isinstance(header, dict) and {'content', 'digest'} <= header.keys()):
        raise ValueError(f'its header {_HEADER} is damaged')
    return header


def read_metadata(path: Path) -> dict[str, Any]:
    """What `save_weights` was given as `metadata`; {} for files from elsewhere.

    Raises:
      DataError: it cannot be read.
    """
    try:
        with safe_open(path, framework='numpy') as file:
            return _read_header(file).get('content', {})
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f'{path} is not a readable safetensors file: {error}') from error


def is_whole(path: Path) -> bool:
    """Whether a file is there, and is what `save_weights` wrote."""
    try:
        return path.is_file() and bool(read_metadata(path)) and bool(_read(path, ''))
    except DataError:
        return False


def _read_orbax(path: Path, model: str) -> dict[str, np.ndarray]:
    """'params' and 'batch_stats' of an orbax checkpoint, which may hold more."""
    try:
        tree = read_tree(path)
    except Exception as error:  # orbax has no common class for what a damaged file raises
        raise DataError(
            f'weights {path} cannot be read as an orbax checkpoint: {first_line(error)}'
        ) from error
    if not {'params', 'batch_stats'} <= tree.keys():
        raise DataError(f"weights {path} hold no 'params' and 'batch_stats', as this program's do")
    meta = path.with_name('meta') / 'metadata'  # of a run's checkpoint, see `Checkpoints`
    if meta.is_file():
        found = network_digest(tree['params'], tree['batch_stats'])
        if read_json(meta).get('network') != found:
            raise DataError(f'weights {path} are damaged, they are not what was written')
    return torch_tensors(model, tree['params'], tree['batch_stats'])
