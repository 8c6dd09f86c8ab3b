"""The kinds of data sets, one file each.

A configuration names a data set `KIND:WHAT`: `folder:photos`, `csv:list.csv`, `tfds:cifar10`; a
name alone is one of tfds. A kind is a module with the three functions of `Source`. It is imported
when a data set of it is opened for the first time.

A package of its own can bring a kind as an entry point of the group `xmixup_jax.sources`, whose
name is the kind and whose value is the module.
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

# `cifar10:3.*.*` is tfds's way to name a version.
_VERSION = re.compile(r'(\d+|\*)(\.(\d+|\*)){2}(/.*)?')


class Source(Protocol):
    """A kind of data set. `what` is what follows `KIND:` in the data set's name."""

    def problem(self, what: str, config: ConfigDict) -> str | None:
        """Says in one line what is missing before the data set can be opened, and how to get it.

        It is called before a run begins, so it should be quick.

        Returns:
          None if nothing is missing.
        """

    def open(
        self, what: str, dataset: ConfigDict, split: str, config: ConfigDict, store: Store
    ) -> Records:
        """Opens one split; called only where `problem` has found none.

        Args:
          what: names the data set.
          dataset: config.target or config.source; its `name` becomes that of the records.
          split: of the data set; '' for all of one that has no splits.
          config: of the run, for its folders.
          store: becomes that of the records.

        Raises:
          DataError: there is no such split, or its content is not what it should be.
        """

    def prepare(self, what: str, config: ConfigDict) -> str | None:
        """Downloads and converts, if that has not been done.

        Returns:
          where the result is; None if there was nothing to do.

        Raises:
          DataError: it is not possible; says what is missing.
        """


def find_source(name: str) -> tuple[Source, str]:
    """The kind of a data set, and what it calls the data set.

    Args:
      name: `KIND:WHAT`, or the name of a tfds data set.

    Raises:
      DataError: there is no such kind; lists those there are.
    """
    kind, what = _split_name(name)
    modules = KINDS
    if kind not in KINDS:  # only now: reading the entry points takes a while
        modules = KINDS | {
            point.name: point.value for point in importlib.metadata.entry_points(group=ENTRY_POINTS)
        }
    if kind not in modules:
        raise DataError(
            f'{name!r} is of the kind {kind!r}, which does not exist: use '
            f'{", ".join(f"{each}:..." for each in modules)} or the name of a tfds data set'
        )
    return importlib.import_module(modules[kind]), what


def problem(name: str, config: ConfigDict) -> str | None:
    """Says what is missing before data set `name` can be read and how to get it, or None."""
    try:
        source, what = find_source(name)
    except DataError as error:
        return str(error)
    return source.problem(what, config)


def short_name(name: str) -> str:
    """The last part of a data set's name, for titles and names of files.

    >>> [short_name(name) for name in ('folder:data/photos/', 'csv:a/list.csv', 'coil100')]
    ['photos', 'list.csv', 'coil100']
    """
    return Path(_split_name(name)[1]).name or 'data'


def _split_name(name: str) -> tuple[str, str]:
    kind, colon, what = name.partition(':')
    if colon and (kind in KINDS or not _VERSION.fullmatch(what)):
        return kind, what
    return 'tfds', name
