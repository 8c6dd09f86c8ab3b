"""The kinds of data sets, one module each.

A configuration names a data set as `KIND:WHAT`: `folder:photos`, `csv:list.csv`, `tfds:cifar10`. A
name without a kind is a tfds data set. A kind is a module with the three functions of `Source`,
which is imported when a data set of this kind is opened for the first time.

Another package can add a kind with an entry point in the group `xmixup_jax.sources`: the entry
point's name is the kind, its value is the module.
"""

import importlib
import importlib.metadata
import re
from pathlib import Path
from typing import Protocol

from ml_collections import ConfigDict

from xmixup_jax.data.records import Records, Store
from xmixup_jax.errors import DataError

KINDS = {
    'tfds': 'xmixup_jax.data.sources.tfds',
    'folder': 'xmixup_jax.data.sources.folder',
    'csv': 'xmixup_jax.data.sources.file_list',
}
ENTRY_POINTS = 'xmixup_jax.sources'

# tfds names a version as in `cifar10:3.*.*`.
_VERSION = re.compile(r'(\d+|\*)(\.(\d+|\*)){2}(/.*)?')


class Source(Protocol):
    """A kind of data set. `what` is the part of the data set's name after `KIND:`."""

    def problem(self, what: str, config: ConfigDict) -> str | None:
        """Says in one line what is missing to open the data set, and how to get it.

        Called before a run begins, so it should be fast.

        Returns:
          None if nothing is missing.
        """

    def open(
        self, what: str, dataset: ConfigDict, split: str, config: ConfigDict, store: Store
    ) -> Records:
        """Opens one split. Called only if `problem` returned None.

        Args:
          what: names the data set.
          dataset: config.target or config.source; the records get its `name`.
          split: name of the split; '' means all images of a data set without splits.
          config: configuration of the run, for its folders.
          store: store of the records.

        Raises:
          DataError: there is no such split, or its content is invalid.
        """

    def prepare(self, what: str, config: ConfigDict) -> str | None:
        """Downloads and converts the data set, unless that has been done.

        Returns:
          the folder of the result; None if this kind needs no preparation.

        Raises:
          DataError: the data set cannot be prepared; says what is missing.
        """


def find_source(name: str) -> tuple[Source, str]:
    """Returns the module of a data set's kind, and the data set's name without the kind.

    Args:
      name: `KIND:WHAT`, or the name of a tfds data set.

    Raises:
      DataError: there is no such kind; lists the known ones.
    """
    kind, what = _split_name(name)
    modules = KINDS
    if kind not in KINDS:  # only then, as reading the entry points is slow
        modules = KINDS | {
            point.name: point.value for point in importlib.metadata.entry_points(group=ENTRY_POINTS)
        }
    if kind not in modules:
        raise DataError(
            f'{name!r}: there is no kind of data set called {kind!r}; use '
            f'{", ".join(f"{each}:..." for each in modules)} or the name of a tfds data set'
        )
    return importlib.import_module(modules[kind]), what


def problem(name: str, config: ConfigDict) -> str | None:
    """Says what is missing to open the data set `name` and how to get it; None if nothing is."""
    try:
        source, what = find_source(name)
    except DataError as error:
        return str(error)
    return source.problem(what, config)


def short_name(name: str) -> str:
    """Returns the last part of a data set's name, for titles and file names.

    >>> [short_name(name) for name in ('folder:data/photos/', 'csv:a/list.csv', 'coil100')]
    ['photos', 'list.csv', 'coil100']
    """
    return Path(_split_name(name)[1]).name or 'data'


def _split_name(name: str) -> tuple[str, str]:
    kind, colon, what = name.partition(':')
    if colon and (kind in KINDS or not _VERSION.fullmatch(what)):
        return kind, what
    return 'tfds', name
