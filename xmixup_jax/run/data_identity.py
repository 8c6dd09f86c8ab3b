"""Checks that a run continues with the data that it was started with."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.data.selection import Data
from xmixup_jax.errors import ConfigError, UserError, first_line
from xmixup_jax.files import DATA, read_json, write_json
from xmixup_jax.integrity import arrays_digest, json_array
from xmixup_jax.processes import all_gather, every_process, first_process
from xmixup_jax.run.checkpoint import Checkpoints
from xmixup_jax.run.inputs import open_data
from xmixup_jax.text import first_few

log = logging.getLogger('xmixup_jax')

Summary = dict[str, Any]
"""What `Records.summary` returns."""
Summaries = dict[str, Summary | None]
"""What `Data.summary` returns."""


def same_data(
    config: ConfigDict, checkpoints: Checkpoints, data: Data | None, finished: bool
) -> Data | None:
    """Opens the data, if necessary, and compares them with those that the run was started with.

    Args:
      config: configuration of the run.
      checkpoints: the run's checkpoints; they identify its data if data.json is lost.
      data: the records, if the caller provides them.
      finished: whether the run is finished, so that only its result is needed.

    Returns:
      the data; None if the run is finished and they can no longer be opened.

    Raises:
      ConfigError: the data differ; says how.
      DataError: the data cannot be opened, and the run is not finished.
    """
    if data is None:
        try:
            data = open_data(config)
        except (UserError, OSError) as error:
            if not finished:
                raise
            log.warning(
                '%s is finished; cannot check whether its data have changed since: %s',
                checkpoints.workdir,
                first_line(error),
            )
            return None
    read = _read(checkpoints.workdir)
    stored = read
    if stored is None:  # in all processes alike
        meta = checkpoints.restore_meta()
        stored = meta and meta.data
    if not (checkpoints.steps or finished):
        stored = None  # no step has been trained on them
    _check_and_store(checkpoints.workdir, read, stored, data.summary(), finished)
    return data


def data_digest(data: Data) -> str:
    """Returns a hash of the data's content, 16 hexadecimal digits; the same in all processes."""
    parts = [None if each is None else each.identity for each in data[:3]]
    parts += [] if data.validation is None else [data.validation.identity]
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()[:8]
    # Copies on several machines may differ in their file times.
    return all_gather(np.frombuffer(digest, np.uint8))[0].tobytes().hex()


@every_process
def _read(workdir: Path) -> Summaries | None:
    """Reads data.json; None if it is missing or corrupted."""
    path = workdir / DATA
    try:
        stored = read_json(path)
        if stored.pop('seal') == _seal(stored):
            return stored
        log.warning('%s is corrupted: using the copy in the checkpoints', path)
    except FileNotFoundError:
        pass
    except (UserError, AttributeError, KeyError, TypeError) as error:
        log.warning('%s is corrupted (%s): using the copy in the checkpoints', path, error)
    return None


def _seal(summaries: Summaries) -> str:
    return arrays_digest({'json': json_array(summaries)})


@first_process
def _check_and_store(
    workdir: Path,
    read: Summaries | None,
    stored: Summaries | None,
    given: Summaries,
    finished: bool,
) -> None:
    """Refuses data that differ from the stored ones; writes data.json if it is out of date."""
    if stored is not None:
        _check(workdir, stored, given)
    kept = stored if finished else given
    if kept is not None and kept != read:
        write_json(workdir / DATA, {**kept, 'seal': _seal(kept)})


def _check(workdir: Path, stored: Summaries, given: Summaries) -> None:
    """Raises ConfigError if the data differ, even with config.allow_changes."""
    differences = {part: difference(stored[part], given.get(part)) for part in stored}
    words = '; '.join(f'{part}: {text}' for part, text in differences.items() if text)
    if not words:
        return
    raise ConfigError(
        f'{workdir / DATA} belongs to a run on other data ({words}): restore the data, or choose '
        'another --workdir'
    )


def difference(old: Summary | None, new: Summary | None) -> str:
    """Describes how two data sets differ; '' if they do not.

    Args:
      old, new: results of `Records.summary`; None without records.

    >>> old = {'digest': 'a', 'class_names': ['cat', 'dog'], 'counts': [3, 5], 'classes': 'ab'}
    >>> new = {'digest': 'b', 'class_names': ['cat', 'emu'], 'counts': [4, 5], 'classes': 'cd'}
    >>> difference(old, new)
    "class 'dog' is missing, class 'emu' is new, new images: 1 of class 'cat'"
    """
    if old is None or new is None:
        if old is new:
            return ''
        return 'there are none now' if new is None else 'there were none before'
    if old['digest'] == new['digest'] or _is_copy(old, new):
        return ''
    return ', '.join(_differences(old, new))


def _is_copy(old: Summary, new: Summary) -> bool:
    """Whether only file times differ. Runs of earlier versions did not store this."""
    return 'lasting' in old and old['lasting'] == new['lasting']


def _differences(old: Summary, new: Summary) -> Iterator[str]:
    before, after = (_by_class(each) for each in (old, new))
    gone, added = (
        [name for name in a if name not in b] for a, b in ((before, after), (after, before))
    )
    for what, names in (('missing', gone), ('new', added)):
        if names:
            yield f'{_classes(names)} {"are" if len(names) > 1 else "is"} {what}'
    grown = {name: after[name][0] - before[name][0] for name in before if name in after}
    for what, sign in (('new', 1), ('missing', -1)):
        names = [name for name, count in grown.items() if sign * count > 0]
        if names:
            count = sum(sign * grown[name] for name in names)
            yield f'{what} images: {count} of {_classes(names)}'
    changed = [name for name in grown if not grown[name] and before[name] != after[name]]
    if changed:
        yield f'images of {_classes(changed)} have changed'
    if gone or added or changed or any(grown.values()):
        return
    if list(before) != list(after):
        yield 'the classes are in another order'
    else:
        yield 'images of the split outside the selection have changed'


def _by_class(summary: Summary) -> dict[str, tuple[Any, ...]]:
    """Returns (number of images, digest) by class."""
    columns = zip(summary['counts'], summary['classes'], strict=True)
    return dict(zip(summary['class_names'], columns, strict=True))


def _classes(names: Sequence[str]) -> str:
    shown = first_few(list(map(repr, names)))
    return f'{len(names)} classes ({shown})' if len(names) > 1 else f'class {shown}'
