"""Converts weights of other programs to timm's key layout.

Wrappers put a prefix before every key: `module.` (DataParallel), `_orig_mod.` (torch.compile),
`model.` (Lightning and others). Two projects have key layouts of their own:

- Hugging Face's transformers: see `transformers_layout`.
- Google's vision transformers in .npz files, for example
  `Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel`
  (https://github.com/google-research/vision_transformer; AugReg: Steiner et al.,
  https://arxiv.org/abs/2106.10270).
"""

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from xmixup_jax.errors import DataError
from xmixup_jax.models import MODELS, create_model
from xmixup_jax.models.base import rename_key
from xmixup_jax.models.vit import VARIANTS
from xmixup_jax.optimizer import HEAD
from xmixup_jax.text import first_few
from xmixup_jax.weights import transformers_layout
from xmixup_jax.weights.files import tensor_key
from xmixup_jax.weights.sets import is_average, log_once, several_sets

Tensors = dict[str, np.ndarray]

_PREFIXES = (
    'module', '_orig_mod', 'model', 'backbone', 'encoder', 'net', 'network', 'student', 'teacher',
    'model_ema', 'ema_model', 'ema',
)  # fmt: skip
_PREFIX = re.compile(rf'(?:{"|".join(_PREFIXES)})\.')
_MAX_PREFIXES = 32
_MAX_TENSORS = 10_000
_MAX_KEY = 500  # characters
_AGAIN = 'download or copy it again'
_NO_WEIGHTS = ('num_batches_tracked', 'n_averaged')  # last parts of keys

# Google's names inside a block; their numbers differ between Flax's old and new API.
_GOOGLE_BLOCK = (
    (r'LayerNorm_0', 'norm1'),
    (r'LayerNorm_[12]', 'norm2'),
    (r'MultiHeadDotProductAttention_[01]/(?P<part>query|key|value)', r'attn.\g<part>'),
    (r'MultiHeadDotProductAttention_[01]/out', 'attn.proj'),
    (r'MlpBlock_[03]/Dense_0', 'mlp.fc1'),
    (r'MlpBlock_[03]/Dense_1', 'mlp.fc2'),
)
_GOOGLE = (
    (r'embedding', 'patch_embed.proj'),
    (r'Transformer/encoder_norm', 'norm'),
    (r'head', 'head'),
    (r'pre_logits', 'pre_logits'),
    *(
        (rf'Transformer/encoderblock_(?P<n>\d+)/{a}', rf'blocks.\g<n>.{b}')
        for a, b in _GOOGLE_BLOCK
    ),
)
_GOOGLE_WHOLE = {
    'cls': 'cls_token',
    'Transformer/posembed_input/pos_embedding': 'pos_embed',
    'pos_embedding': 'pos_embed',
}
_GOOGLE_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}


def to_timm(tensors: Tensors, model: str, path: Path, part: str = '') -> tuple[Tensors, str]:
    """Converts the tensors of a file to timm's keys and axes.

    Args:
      tensors: by the keys of the file, with PyTorch's axes (Google's files: with Flax's).
      model: config.model.name.
      path: of the file, for the log and errors.
      part: use only the tensors whose keys begin with it; '' uses those that fit the network best.

    Returns:
      (tensors, prefix): arrays by timm's keys, without entries that are not weights; and the
      stripped prefix, which ends in '.', or ''.

    Raises:
      DataError: no key begins with `part`, or there are far too many tensors.
    """
    if len(tensors) > _MAX_TENSORS:
        raise DataError(
            f'weights {path} contain {len(tensors):,} tensors: give those of one network, which '
            f'has fewer than {_MAX_TENSORS:,}'
        )
    if any(len(key) > _MAX_KEY for key in tensors):
        raise DataError(
            f'weights {path} contain a key of more than {_MAX_KEY} characters: {_AGAIN}'
        )
    tensors = {
        key: tensor for key, tensor in tensors.items() if key.split('.')[-1] not in _NO_WEIGHTS
    }
    if model in VARIANTS:
        tensors = _from_google(tensors)
    for tower in () if part else MODELS[model].towers:
        if any(_prefix_pattern(tower).match(key) for key in tensors):
            part = tower
    tensors = _part(tensors, part, path) if part else tensors
    tensors, prefix = _without_prefix(tensors, model, path)
    renamed = {timm_key(model, key): tensor for key, tensor in tensors.items()}
    if model in VARIANTS:
        renamed = _own_position(_hide_head_behind_layer(_joined_attention(renamed)))
    renamed = {key: _timm_axes(key, tensor) for key, tensor in renamed.items()}
    optional = MODELS[model].optional
    kept = {key: tensor for key, tensor in renamed.items() if not key.startswith(optional)}
    return kept, prefix


def timm_key(model: str, key: str) -> str:
    """Renames a key of transformers' or another known layout to timm's; keeps other keys."""
    return transformers_layout.timm_key(model, key) or MODELS[model].timm_key(model, key)


@lru_cache(maxsize=16)
def network_keys(model: str) -> frozenset[str]:
    """timm's keys of all tensors of a network except the head."""
    architecture = MODELS[model]
    config = ConfigDict({'name': model, 'width': 64, 'stem': 'imagenet'})
    size = max(32, architecture.min_size)
    _, *trees = nnx.eval_shape(lambda: create_model(config, 1, size, 0))
    paths = [path for tree in trees for path, _ in jax.tree.leaves_with_path(tree)]
    return frozenset(tensor_key(model, path) for path in paths if path[0].key != HEAD)


def best_prefix(tensors: Tensors, model: str) -> str:
    """Finds the prefix, known or not, after which the network's keys follow; '' if none."""
    counts = Counter(
        key[: match.end()] for key in tensors for match in list(re.finditer(r'\.', key))[:5]
    )
    likely = [prefix for prefix, _ in counts.most_common(_MAX_PREFIXES)]
    fits = _fits(tensors, model, ['', *likely])
    best = max(fits, key=lambda prefix: fits[prefix])
    return best if fits[best] > len(network_keys(model)) / 2 else ''


def _fits(tensors: Tensors, model: str, prefixes: Iterable[str]) -> dict[str, int]:
    """Counts how many of the network's keys follow each prefix."""
    wanted = network_keys(model)
    fits = {}
    for prefix in prefixes:
        renamed = {timm_key(model, k[len(prefix) :]) for k in tensors if k.startswith(prefix)}
        found = {re.sub(r'\.attn\.(query|key|value)\.', '.attn.qkv.', key) for key in renamed}
        fits[prefix] = len(found & wanted)
    return fits


def _known_prefixes(tensors: Tensors) -> list[str]:
    """The known prefixes of the keys, single and nested, the most frequent first."""
    counts: Counter = Counter()
    for key in tensors:
        end = 0
        while (match := _PREFIX.match(key, end)) and key.count('.', 0, end) < 5:
            end = match.end()
            counts[key[:end]] += 1
    return [prefix for prefix, _ in counts.most_common(_MAX_PREFIXES)]


def _without_prefix(tensors: Tensors, model: str, path: Path) -> tuple[Tensors, str]:
    """Strips the known prefix that most of the network's keys follow.

    Returns:
      (tensors, prefix): '' if nothing was stripped.
    """
    chains = _known_prefixes(tensors)
    if not chains:
        return tensors, ''
    fits = _fits(tensors, model, ['', *chains])
    best = max(fits.values())
    if fits[''] == best:
        return tensors, ''
    # Several networks with (nearly) all keys each, such as teacher and student: take the average.
    sets = [prefix for prefix, fit in fits.items() if prefix and fit > best / 2]
    prefix = next((each for each in sets if is_average(each) and fits[each] == best), '')
    prefix = prefix or next(each for each in sets if fits[each] == best)
    others = [each for each in sets if each != prefix]
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
    taken = {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}
    if others:
        names = [each.removesuffix('.') for each in others]
        log_once(several_sets(path, prefix.removesuffix('.'), names))
        rest = {key: tensor for key, tensor in rest.items() if not key.startswith(tuple(others))}
    else:
        log_once(f'weights {path}: stripping the prefix {prefix} from {len(taken)} keys')
    return rest | taken, prefix


def _prefix_pattern(part: str) -> re.Pattern[str]:
    """Matches the start of keys under a prefix, which may follow known prefixes."""
    return re.compile(rf'(?:{_PREFIX.pattern})*?{re.escape(part.rstrip("."))}\.')


def _part(tensors: Tensors, part: str, path: Path) -> Tensors:
    """Selects the tensors under a prefix, which may follow known prefixes, and strips it."""
    begin = _prefix_pattern(part)
    matches = {key: begin.match(key) for key in tensors}
    taken = {key[match.end() :]: tensors[key] for key, match in matches.items() if match}
    if not taken:
        first = sorted({key.split('.')[0] for key in tensors})
        raise DataError(
            f'weights {path} contain nothing named {part!r}: their keys begin with '
            f'{first_few([repr(each[:80]) for each in first])}'
        )
    return taken


def _joined_attention(tensors: Tensors) -> Tensors:
    """Joins query, key and value into timm's single tensor, [3 * D, D] or [3 * D]."""
    joined = dict(tensors)
    for key in tensors:
        match = re.fullmatch(r'(blocks\.\d+\.attn\.)query\.(weight|bias)', key)
        if not match:
            continue
        names = [f'{match[1]}{name}.{match[2]}' for name in ('query', 'key', 'value')]
        parts = [tensors[name] for name in names if name in tensors]
        if len(parts) == 3 and len({part.shape for part in parts} - {()}) == 1:
            for name in names:
                del joined[name]
            joined[f'{match[1]}qkv.{match[2]}'] = np.concatenate(parts)
    return joined


def _timm_axes(key: str, tensor: np.ndarray) -> np.ndarray:
    """Adds or removes axes of size 1, to agree with timm.

    torchvision's layer scale is [C, 1, 1]; CLIP's class token is [D], its positions are [n, D].
    """
    if key.endswith('.gamma') and tensor.shape[1:] == (1, 1):
        return tensor.reshape(-1)
    if (key, tensor.ndim) in (('cls_token', 1), ('pos_embed', 2)):
        return tensor.reshape(1, -1, tensor.shape[-1])
    return tensor


def _own_position(tensors: Tensors) -> Tensors:
    """Adds its position to the class token, in the authors' weights of DINOv2 with registers."""
    if 'register_tokens' not in tensors:
        return tensors
    rest = dict(tensors)
    rest['reg_token'] = rest.pop('register_tokens')
    token, positions = (tensors.get(key) for key in ('cls_token', 'pos_embed'))
    if token is None or positions is None or (token.ndim, positions.ndim) != (3, 3):
        return rest
    if positions.shape[1] and token.shape == positions[:, :1].shape:
        rest['cls_token'], rest['pos_embed'] = token + positions[:, :1], positions[:, 1:]
    return rest


def _hide_head_behind_layer(tensors: Tensors) -> Tensors:
    """Hides a head whose input is not the features but a further layer's output."""
    layer = {key for key in tensors if key.startswith('pre_logits.')}
    if not layer:
        return tensors
    return {
        f'head.behind.{key}' if key in layer or key in ('head.weight', 'head.bias') else key: tensor
        for key, tensor in tensors.items()
    }


def _from_google(tensors: Tensors) -> Tensors:
    """Converts Google's vision transformers, with Flax's axes, to timm's; keeps other tensors."""
    begins = [
        key.removesuffix('embedding/kernel') for key in tensors if key.endswith('embedding/kernel')
    ]
    if len(begins) != 1:
        return tensors
    return dict(
        _google_tensor(key.removeprefix(begins[0]), tensor) for key, tensor in tensors.items()
    )


def _google_tensor(key: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """Returns (timm's key, array with PyTorch's axes); query, key and value stay separate."""
    if key in _GOOGLE_WHOLE:
        return _GOOGLE_WHOLE[key], array
    layer, _, leaf = key.rpartition('/')
    name = rename_key(layer, _GOOGLE)
    if name is None or leaf not in _GOOGLE_LEAVES:
        return key, array
    return f'{name}.{_GOOGLE_LEAVES[leaf]}', _google_axes(name, leaf, array)


def _google_axes(name: str, leaf: str, array: np.ndarray) -> np.ndarray:
    """Merges the axes of heads: [D, heads, D / heads] and [heads, D / heads, D] become [D, D]."""
    if leaf == 'bias':
        return array.reshape(-1)
    if array.ndim == 3 and array.size:
        shape = (-1, array.shape[2]) if name.endswith('proj') else (array.shape[0], -1)
        array = array.reshape(shape)
    if array.ndim == 4:
        return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
    return np.ascontiguousarray(array.T) if array.ndim == 2 else array
