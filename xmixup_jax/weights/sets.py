"""Chooses among several sets of tensors in a checkpoint.

Training programs wrap the weights in a dictionary with the state of the optimiser, and many store a
second set: a moving average of the weights (EMA), or a teacher. If there is an average, it is used,
as in timm's `load_state_dict`; `FILE#ENTRY` chooses another set.
"""

import logging
import re
from collections import deque
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from xmixup_jax.weights.torch_pickle import Foreign, Tensor, TorchFileError

log = logging.getLogger('xmixup_jax')

# The entries in which torchvision, timm, Lightning, DINO and others keep weights.
_NAMES = (
    'state_dict', 'model', 'model_state_dict', 'model_state', 'net', 'network', 'weights',
    'params', 'module', 'student', 'backbone', 'encoder', 'state_dict_ema', 'model_ema',
    'ema_state_dict', 'ema', 'params_ema', 'teacher',
)  # fmt: skip
_AVERAGE = re.compile(r'(.*[/._])?(ema|teacher)([/._].*)?')
_MAX_DEPTH = 3
_MAX_DICTIONARIES = 1000
_MAX_MODULES = 10_000
_MAX_NAME = 1000  # characters


@lru_cache(maxsize=256)
def log_once(message: str) -> None:
    """Logs a message only once, since a run may read the same weights several times."""
    log.info('%s', message)


def is_average(name: str) -> bool:
    """Whether a set is a moving average of another one, judging by its name."""
    return bool(_AVERAGE.fullmatch(name))


def choose_set(value: Any, entry: str, path: Path) -> tuple[dict[str, Any], str, str]:
    """Chooses the set of weights in the content of a PyTorch file.

    Args:
      value: the unpickled content.
      entry: names of nested entries, joined by '/'; '' chooses by the usual names.
      path: of the file, for the log and errors.

    Returns:
      (tensors, part, name): the set, by key; the part of `entry` that names no entry, and so
      perhaps a prefix of keys; and the name of the set.

    Raises:
      TorchFileError: there are no tensors, or several sets under unknown names.
    """
    rest = entry
    while rest and (found := _descend(value, rest)):
        value, rest = found
    sets = find_sets(value)
    if not sets:
        raise TorchFileError(_no_tensors(value))
    name = _choose_name(sets)
    if name is None:
        raise TorchFileError(
            f'it contains {len(sets)} sets of tensors, {_listed(sets)}: choose one by its '
            f'name, as in {path.name}#{min(sets)}'
        )
    if rest and not any(f'.{rest}.' in f'.{key}' for key in sets[name]):
        raise TorchFileError(
            f'it has neither an entry nor keys named {rest[:80]!r}: it contains {_listed(sets)}'
        )
    others = [other for other in _known(sets) if other != name]
    if others and rest == entry:
        log_once(several_sets(path, name, others))
    taken = entry.removesuffix(rest).rstrip('/')
    return sets[name], rest, '/'.join(part for part in (taken, name) if part)


def several_sets(path: Path, taken: str, others: Iterable[str]) -> str:
    """The log message for a file with several sets of weights."""
    others = list(others)
    average = ', a moving average of the weights' if is_average(taken) else ''
    return (
        f'weights {path} contain {_listed([taken, *others])}: using {taken}{average}; '
        f'give {path.name}#{others[0]} for the other'
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    shown = [repr(name[:80]) for name in names[:5]]
    if len(names) > 5:
        shown.append(f'{len(names) - 5} more')
    return ' and '.join([', '.join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _descend(value: Any, entry: str) -> tuple[Any, str] | None:
    """Returns (value of the entry, rest of its name); None if there is no such entry."""
    entries = _entries(value) or {}
    for name in (entry, entry.split('/')[0]):
        if _entries(entries.get(name)):
            return entries[name], entry[len(name) + 1 :]
    return None


def find_sets(value: Any) -> dict[str, dict[str, Any]]:
    """Finds every nested dictionary that contains a tensor.

    Returns:
      the dictionaries by their path, names joined by '/'; `value` itself is ''.
    """
    found: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    waiting = deque([('', value)])
    for _ in range(_MAX_DICTIONARIES):
        if not waiting:
            break
        name, each = waiting.popleft()
        entries = _entries(each)
        if not entries or id(each) in seen:
            continue
        seen.add(id(each))
        if any(isinstance(inner, Tensor) for inner in entries.values()):
            found[name] = entries
        if name.count('/') < _MAX_DEPTH - 1 and len(waiting) < _MAX_DICTIONARIES:
            waiting += [
                (f'{name}/{key}' if name else key, inner)
                for key, inner in entries.items()
                if isinstance(key, str)
                and len(key) < _MAX_NAME
                and isinstance(inner, dict | Foreign)
            ]
    return found


def _known(sets: Mapping[str, Any]) -> list[str]:
    """The sets all of whose names are usual for weights, the most usual first."""
    known = [name for name in sets if all(part in _NAMES for part in name.split('/'))]
    return sorted(known, key=lambda name: [_NAMES.index(part) for part in name.split('/')])


def _choose_name(sets: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The name of the set to use; None if that is not clear."""
    known = _known(sets)
    if known:
        plain = next((name for name in known if not is_average(name)), None)
        average = next((name for name in known if is_average(name)), None)
        # An average that covers the parameters only lacks the batch statistics.
        if average is None or (plain is not None and _count(sets[average]) < _count(sets[plain])):
            return plain
        return average
    several = [name for name, tensors in sets.items() if _count(tensors) > 1]
    if len(several) == 1:
        return several[0]
    return '' if '' in sets else None


def _count(tensors: Mapping[str, Any]) -> int:
    return sum(isinstance(value, Tensor) for value in tensors.values())


def _entries(value: Any) -> dict | None:
    """The entries of a dictionary, of a subclass of dict, or of a pickled network."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, Foreign):
        return None
    return _module_tensors(value) if _is_module(value) else value.items


def _is_module(value: Any) -> bool:
    return (
        isinstance(value, Foreign)
        and isinstance(value.state, dict)
        and {'_parameters', '_buffers', '_modules'} <= value.state.keys()
    )


def _module_tensors(module: Foreign) -> dict[str, Tensor]:
    """The state_dict() of a pickled network."""
    tensors: dict[str, Tensor] = {}
    waiting: deque[tuple[str, Foreign]] = deque([('', module)])
    for _ in range(_MAX_MODULES):
        if not waiting:
            return tensors
        prefix, each = waiting.popleft()
        parts = [each.state[part] for part in ('_parameters', '_buffers', '_modules')]
        for part in parts:
            for name, inner in part.items() if isinstance(part, dict) else ():
                if isinstance(inner, Tensor):
                    tensors[f'{prefix}{name}'] = inner
                elif _is_module(inner) and len(prefix) + len(str(name)) < _MAX_NAME:
                    waiting.append((f'{prefix}{name}.', inner))
    raise TorchFileError('its network has too many modules: save only its state_dict()')


def _no_tensors(value: Any) -> str:
    if isinstance(value, Tensor):
        return 'it contains one tensor, not a dictionary of tensors: save a state_dict()'
    if isinstance(value, Foreign):
        return (
            f'it contains a {value.name}, not a dictionary of tensors, and such objects are not '
            'loaded: save only its state_dict()'
        )
    if isinstance(value, dict) and _has_arrays(value):
        return 'it contains NumPy arrays, not tensors: save them with np.savez'
    if isinstance(value, dict) and value:
        return (
            f'its entries ({_listed(str(key) for key in value)}) contain no tensors: save a '
            'state_dict() with torch.save'
        )
    return f'it contains a {type(value).__name__}, not a dictionary of tensors: save a state_dict()'


def _has_arrays(value: dict) -> bool:
    inner = [each for part in value.values() if isinstance(part, dict) for each in part.values()]
    return any(
        isinstance(each, Foreign) and each.name.startswith('numpy.')
        for each in (*value.values(), *inner)
    )
