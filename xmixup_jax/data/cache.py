"""Decoded images that are kept, so that none is decoded twice: in memory or on disk."""

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
# `auto` takes no more than these shares of what is free.
_SHARES = {'device': 0.2, 'memory': 0.5, 'disk': 0.5}


class Cache(Protocol):
    """Images of one size by record number."""

    def get(self, number: int) -> np.ndarray | None: ...

    def put(self, number: int, image: np.ndarray) -> None: ...


class MemoryCache:
    """Kept by the split, so that later runs of this process find what earlier ones decoded."""

    def __init__(self, kept: dict[tuple[int, int, str], np.ndarray], size: int, fit: str):
        self._kept, self._size, self._fit = kept, size, fit

    def get(self, number: int) -> np.ndarray | None:
        return self._kept.get((number, self._size, self._fit))

    def put(self, number: int, image: np.ndarray) -> None:
        self._kept[number, self._size, self._fit] = image


class DiskCache:
    """A memory-mapped file, which later runs and other processes of the machine share.

    Each image has a checksum, written after it and tested when a process first reads the image:
    what a crash or another writer left half written is decoded again.
    """

    def __init__(self, path: Path, numbers: np.ndarray, size: int):
        """Opens or makes the file.

        Args:
          path: of the file.
          numbers: int64 [N], record numbers, ascending.
          size: side of the images in px.

        Raises:
          UserError: there is no room, or it cannot be written.
        """
        self._numbers = numbers
        shape = (len(numbers), size, size, 3)
        sums_bytes = 4 * len(numbers)
        total = sums_bytes + int(np.prod(shape))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open('ab') as file:
                # Room is taken at once: a map that outgrows the disk ends the process.
                os.posix_fallocate(file.fileno(), 0, total)
        except OSError as error:
            raise UserError(
                f'cannot keep {total // _MB:,} MB of decoded images in {path}: {error.strerror}; '
                'make room, choose another --config.cache_dir, or --config.data.cache=none'
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
    return zlib.crc32(image.data) or 1  # 0 is an empty place


def used_records(data: Data, match: ClassMatch | None) -> dict[str, Records]:
    """What a run trains on: all 'image' records, and 'source_image' ones of matched classes."""
    used = {'image': data.target}
    if match is not None:
        assert data.source is not None  # as there is a match
        chosen = np.flatnonzero(np.isin(data.source.labels, match.selected))
        used['source_image'] = data.source.select(chosen)
    return used


def choose(config: ConfigDict, records: Sequence[Records]) -> str:
    """Where to keep the decoded images: config.data.cache, or what they fit in; says so.

    Args:
      config: of the run.
      records: what is to be kept, of this process (all processes keep the same).

    Returns:
      one of CACHES but 'auto'.

    Raises:
      UserError: they don't fit where they are wanted.
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
    free = {
        'device': _free_device_bytes(),
        'memory': _free_memory(),
        'disk': shutil.disk_usage(_existing(Path(config.cache_dir).expanduser())).free,
    }
    reason = f'config.data.cache={kind}'
    if kind == 'auto':
        if config.steps * config.batch_size <= len(records[0]):
            kind, reason = 'none', 'no image is used twice'
        else:
            fits = [needed[k] <= share * free[k] for k, share in _SHARES.items()]
            # All processes do the same: what fits in each of them.
            shared = np.all(all_gather(np.array(fits)), axis=0)
            kind = (*(k for k, fit in zip(_SHARES, shared, strict=True) if fit), 'none')[0]
            reason = 'automatic choice'
    elif kind == 'memory' and needed[kind] > free[kind]:
        raise UserError(
            f'config.data.cache=memory: decoded images take {needed[kind] / _MB:,.0f} MB, and '
            f'{free[kind] / _MB:,.0f} MB are free: choose disk, auto or none'
        )
    amounts = ', '.join(f'{free[k] / _MB:,.0f} MB free in {k}' for k in free if free[k])
    log.info('Decoded images, %.0f MB, kept in: %s (%s; %s)', total / _MB, kind, reason, amounts)
    return kind


def with_caches(config: ConfigDict, kind: str, data: Data, match: ClassMatch | None) -> Data:
    """The same records, which keep what they decode; of the source, those of matched classes.

    Those of the tests during training are kept if they are read more than once.
    """
    if kind not in ('memory', 'disk'):
        return data

    def kept(records: Records, used: Records) -> Records:
        if kind == 'memory':
            cache = MemoryCache(records.store.kept, config.resize, config.fit)
            return replace(records, cache=cache)
        numbers = np.sort(used.index)
        path = _cache_path(config, used)
        return replace(records, cache=DiskCache(path, numbers, config.resize))

    used = used_records(data, match)
    target, source = kept(data.target, used['image']), data.source
    if source is not None and match is not None:
        source = kept(source, used['source_image'])
    if data.held_out is not None and config.eval_every:
        data = data._replace(**{data.held_out_part: kept(data.held_out, data.held_out)})
    return data._replace(target=target, source=source)


def _missing(records: Records, config: ConfigDict) -> int:
    wanted = (config.resize, config.fit)
    kept = [number for number, *square in records.store.kept if tuple(square) == wanted]
    return len(records) - int(np.isin(records.index, kept).sum())


def _cache_path(config: ConfigDict, records: Records) -> Path:
    """Named by all that the pixels depend on."""
    # Earlier versions cropped without saying so.
    square = f'{config.resize}' if config.fit == 'crop' else f'{config.resize}-{config.fit}'
    name = f'{short_name(records.name)}-{square}-{records.identity[:16]}.images'
    return Path(config.cache_dir).expanduser() / 'decoded' / name


def _existing(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def _free_device_bytes() -> int:
    """Of the fullest local device; 0 where the device does not say, or is the CPU itself."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if jax.default_backend() == 'cpu' or not all(stats):
        return 0
    return min(each['bytes_limit'] - each['bytes_in_use'] for each in stats)


def _free_memory() -> int:
    """Of the machine, or of the container if that has less."""
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
    """Processes of this run on this machine."""
    name = np.array(zlib.crc32(socket.gethostname().encode()), np.uint32)
    return int((all_gather(name) == name).sum())
