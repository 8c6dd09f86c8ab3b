"""Caches of decoded images, in memory or on disk, so that no image is decoded twice."""

import logging
import os
import shutil
import socket
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
import psutil
from ml_collections import ConfigDict

from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import Data
from xmixup_jax.data.sources import short_name
from xmixup_jax.errors import UserError
from xmixup_jax.matching import ClassMatch
from xmixup_jax.processes import all_gather

log = logging.getLogger('xmixup_jax')

CACHES = ('auto', 'none', 'memory', 'disk', 'device')
_MB = 2**20
# `auto` takes at most these shares of the free space.
_SHARES = {'device': 0.2, 'memory': 0.5, 'disk': 0.5}


class Cache(Protocol):
    """A cache of images of one size, uint8 [size, size, 3], by record number."""

    def get(self, number: int) -> np.ndarray | None:
        """Returns the image of a record; None if it is not in the cache."""

    def put(self, number: int, image: np.ndarray) -> None:
        """Stores the image of a record."""


class MemoryCache:
    """A cache in memory. The split owns its content, so later runs in this process reuse it."""

    def __init__(self, images: dict[tuple[int, int, str], np.ndarray], size: int, fit: str):
        self._images, self._size, self._fit = images, size, fit

    def get(self, number: int) -> np.ndarray | None:
        return self._images.get((number, self._size, self._fit))

    def put(self, number: int, image: np.ndarray) -> None:
        self._images[number, self._size, self._fit] = image


class DiskCache:
    """A memory-mapped file, shared with later runs and with other processes on this machine.

    Each image has a checksum, written after the image and verified when a process first reads it.
    Images that a crash or another writer left incomplete are decoded again.
    """

    def __init__(self, path: Path, numbers: np.ndarray, size: int):
        """Opens or creates the file.

        Args:
          path: the cache file.
          numbers: record numbers, int64 [N], ascending.
          size: side of the images in px.

        Raises:
          UserError: the disk is full, or the file cannot be written.
        """
        self._numbers = numbers
        shape = (len(numbers), size, size, 3)
        sums_bytes = 4 * len(numbers)
        total = sums_bytes + int(np.prod(shape))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open('ab') as file:
                # Allocate everything now: writing to the map when the disk is full would kill the
                # process.
                os.posix_fallocate(file.fileno(), 0, total)
        except OSError as error:
            raise UserError(
                f'cannot cache {total // _MB:,} MB of decoded images in {path}: {error.strerror}; '
                'free disk space, choose another --config.cache_dir, or use '
                '--config.data.cache=none'
            ) from error
        self._sums = np.memmap(path, np.uint32, 'r+', 0, (len(numbers),))
        self._images = np.memmap(path, np.uint8, 'r+', sums_bytes, shape)
        self._tested = np.zeros(len(numbers), bool)

    def get(self, number: int) -> np.ndarray | None:
        slot = np.searchsorted(self._numbers, number)
        if not self._sums[slot]:
            return None
        image = self._images[slot]
        if not self._tested[slot]:
            if _checksum(image) != self._sums[slot]:
                return None
            self._tested[slot] = True
        return image

    def put(self, number: int, image: np.ndarray) -> None:
        slot = np.searchsorted(self._numbers, number)
        self._images[slot] = image
        self._sums[slot] = _checksum(image)
        self._tested[slot] = True


def _checksum(image: np.ndarray) -> int:
    return zlib.crc32(image.data) or 1  # 0 marks an empty slot


def used_records(data: Data, match: ClassMatch | None) -> dict[str, Records]:
    """Returns the records that a run trains on, by the name of their images in a batch.

    Args:
      data: the run's records.
      match: the matched source classes; None for methods that do not pair.

    Returns:
      'image', all training records of the target; with a match also 'source_image', the source
      records of matched classes.
    """
    used = {'image': data.target}
    if match is not None:
        assert data.source is not None  # as there is a match
        chosen = np.flatnonzero(np.isin(data.source.labels, match.selected))
        used['source_image'] = data.source.select(chosen)
    return used


def choose_cache(config: ConfigDict, records: Sequence[Records]) -> str:
    """Chooses where to cache decoded images, by config.data.cache and free space; logs the choice.

    Args:
      config: configuration of the run.
      records: the records to cache; the same in all processes.

    Returns:
      one of CACHES other than 'auto'; the same in all processes.

    Raises:
      UserError: config.data.cache=memory, and the images do not fit into memory.
    """
    kind = config.data.cache
    image_bytes = 3 * config.resize**2
    total = image_bytes * sum(len(part) for part in records)
    missing = image_bytes * sum(_missing(part, config) for part in records)
    processes = _processes_here()
    needed = {
        'device': total / jax.device_count(),
        'memory': missing * processes,
        'disk': total,
    }
    # From the devices of several hosts, look-ups would send images between the hosts.
    one_host = processes == jax.process_count()
    free = {
        'device': _free_device_bytes() if one_host else 0,
        'memory': _free_memory(),
        'disk': shutil.disk_usage(_existing(Path(config.cache_dir).expanduser())).free,
    }
    reason = f'config.data.cache={kind}'
    if kind == 'auto':
        if config.steps * config.batch_size <= len(records[0]):
            kind, reason = 'none', 'no image is used twice'
        else:
            fits = [needed[k] <= share * free[k] for k, share in _SHARES.items()]
            # All processes make the same choice: one that fits in each of them.
            shared = np.all(all_gather(np.array(fits)), axis=0)
            kind = (*(k for k, fit in zip(_SHARES, shared, strict=True) if fit), 'none')[0]
            reason = 'automatic choice'
    elif kind == 'memory' and needed[kind] > free[kind]:
        raise UserError(
            f'config.data.cache=memory: decoded images take {needed[kind] / _MB:,.0f} MB, but only '
            f'{free[kind] / _MB:,.0f} MB are free: choose disk, auto or none'
        )
    amounts = ', '.join(f'{k} {free[k] / _MB:,.0f} MB' for k in free if free[k])
    log.info(
        'Cache for %.0f MB of decoded images: %s (%s; free: %s)', total / _MB, kind, reason, amounts
    )
    return kind


def with_caches(config: ConfigDict, kind: str, data: Data, match: ClassMatch | None) -> Data:
    """Attaches caches to the records of the target and of the matched source classes.

    Records that are tested during training get a cache if they are read more than once.

    Args:
      config: configuration of the run.
      kind: where to cache; see `choose_cache`. Only 'memory' and 'disk' have caches of records.
      data: the run's records.
      match: the matched source classes; None for methods that do not pair.

    Returns:
      the same records, with caches.
    """
    if kind not in ('memory', 'disk'):
        return data

    def cached(records: Records, used: Records) -> Records:
        if kind == 'memory':
            cache = MemoryCache(records.store.decoded, config.resize, config.fit)
            return replace(records, cache=cache)
        numbers = np.sort(used.index)
        path = _cache_path(config, used)
        return replace(records, cache=DiskCache(path, numbers, config.resize))

    used = used_records(data, match)
    target, source = cached(data.target, used['image']), data.source
    if source is not None and match is not None:
        source = cached(source, used['source_image'])
    if data.held_out is not None and config.eval_every:
        data = data._replace(**{data.held_out_part: cached(data.held_out, data.held_out)})
    return data._replace(target=target, source=source)


def _missing(records: Records, config: ConfigDict) -> int:
    wanted = (config.resize, config.fit)
    kept = [number for number, *square in records.store.decoded if tuple(square) == wanted]
    return len(records) - int(np.isin(records.index, kept).sum())


def _cache_path(config: ConfigDict, records: Records) -> Path:
    """Returns the path of a cache file, named by everything that the pixels depend on."""
    # No suffix for 'crop': earlier versions always cropped.
    square = f'{config.resize}' if config.fit == 'crop' else f'{config.resize}-{config.fit}'
    name = f'{short_name(records.name)}-{square}-{records.identity[:16]}.images'
    return Path(config.cache_dir).expanduser() / 'decoded' / name


def _existing(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def _free_device_bytes() -> int:
    """Free bytes on the fullest local device; 0 if devices do not report them or are CPUs."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if jax.default_backend() == 'cpu' or not all(stats):
        return 0
    return min(each['bytes_limit'] - each['bytes_in_use'] for each in stats)


def _free_memory() -> int:
    """Free bytes of the machine's memory, or of the container's if that has fewer."""
    free = psutil.virtual_memory().available
    for limit, usage in (
        ('memory.max', 'memory.current'),
        ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes'),
    ):
        paths = [Path('/sys/fs/cgroup') / name for name in (limit, usage)]
        values = [path.read_text().strip() for path in paths if path.exists()]
        if len(values) == 2 and values[0] != 'max':
            free = min(free, max(0, int(values[0]) - int(values[1])))
    return free


def _processes_here() -> int:
    """Number of this run's processes on this machine."""
    name = np.array(zlib.crc32(socket.gethostname().encode()), np.uint32)
    return int((all_gather(name) == name).sum())
