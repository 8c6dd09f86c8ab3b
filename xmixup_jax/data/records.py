"""Records: random access to the images and labels of one split of a data set."""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from xmixup_jax.data import arrays
from xmixup_jax.data.decode import decode, square
from xmixup_jax.errors import DataError
from xmixup_jax.text import one_line

log = logging.getLogger('xmixup_jax')


@dataclass(frozen=True)
class Store:
    """State shared by all selections from one split: decoded images, and undecodable records."""

    max_bad_images: int
    """Maximum size of `bad`."""
    decoded: dict[tuple[int, int, str], np.ndarray] = field(default_factory=dict)
    """Decoded images by (record number, side, fit); see `cache.MemoryCache`."""
    bad: set[int] = field(default_factory=set)
    """Numbers of the records whose image cannot be decoded."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def skip(self, number: int, error: DataError) -> None:
        """Counts and logs a record whose image cannot be decoded; once per record.

        Raises:
          DataError: there are more than `max_bad_images`.
        """
        with self.lock:
            if number in self.bad:
                return
            if len(self.bad) >= self.max_bad_images:
                raise DataError(
                    f'{error}; at most config.max_bad_images={self.max_bad_images} images of a '
                    'split are skipped: replace them, or skip more with --config.max_bad_images=N'
                ) from error
            self.bad.add(number)
        log.warning('Skipped: %s', error)


@dataclass(frozen=True)
class Records:
    """One split, or a selection from it.

    >>> images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    >>> records = Records.from_arrays(images, labels, ['cat', 'dog'])
    >>> records.image(0, resize=6).shape, records.restrict(np.array([1])).class_names
    ((6, 6, 3), ('dog',))
    """

    name: str
    """Name of the data set, for people: caches and runs identify the data by `identity`."""
    class_names: tuple[str, ...]
    labels: np.ndarray
    """int32 [N], 0 <= label < K = len(class_names)."""
    read: Callable[[int], bytes | np.ndarray]
    """Maps a record number to an encoded image, or to uint8 pixels [H, W, 3]. Thread-safe."""
    where: Callable[[int], str]
    """Maps a record number to a description of where the record is, for errors."""
    index: np.ndarray
    """int64 [N], the record numbers of this selection."""
    store: Store = field(compare=False)
    stamps: np.ndarray
    """uint64 [records of the whole split], by record number: a hash that changes when the record's
    image changes, but not when the data set moves. See `sources.image_files.stamp`."""
    lasting: np.ndarray | None = None
    """The same without file times, which a copy does not always preserve; None if `stamps` do not
    depend on times."""
    left_out: Mapping[str, int] = field(default_factory=dict, compare=False)
    """Counts of the split's files that are not records, by kind."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the user should know about how the split was read."""
    doubts: tuple[str, ...] = field(default=(), compare=False)
    """The notes that say why the data may not be what the user meant."""
    cache: Any = None
    """A `cache.Cache` for records that are read repeatedly, or None."""

    @staticmethod
    def from_arrays(
        images: np.ndarray | Sequence[np.ndarray],
        labels: np.ndarray,
        class_names: Sequence[str],
        name: str = 'arrays',
    ) -> 'Records':
        """Makes records of images in memory.

        The images are not copied and must not be changed afterwards. Like image files, they are
        made square when they are read; see `decode.square`.

        Args:
          images: RGB uint8 [N, H, W, 3] or grey-scale [N, H, W]; or N images [H, W, 3] or [H, W],
            whose sizes may differ.
          labels: integers [N], 0 <= label < K.
          class_names: K distinct names.
          name: name of the data set, for messages and titles.

        Raises:
          DataError: an array has the wrong type or shape, or they do not fit together.
        """
        labels, class_names = np.asarray(labels), tuple(map(str, class_names))
        arrays.check(images, labels, class_names, name)
        return Records(
            name=name,
            class_names=class_names,
            labels=labels.astype(np.int32),
            read=lambda i: arrays.rgb(images[i]),
            where=lambda i: f'image {i} of {name}',
            index=np.arange(len(images)),
            store=Store(max_bad_images=0),
            stamps=np.fromiter(map(arrays.stamp, images), np.uint64, len(images)),
        )

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def identity(self) -> str:
        """A hash of the data's content, 32 hexadecimal digits.

        It depends on the ordered class names, on every record of the whole split and on the
        selection from it, but not on the location or the name of the data set.
        """
        return self._digest(self.stamps)

    def _digest(self, stamps: np.ndarray) -> str:
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for array, kind in ((stamps, '<u8'), (self.index, '<i8'), (self.labels, '<i4')):
            digest.update(f' {len(array)} '.encode())
            digest.update(np.ascontiguousarray(array, kind).data)
        return digest.hexdigest()[:32]

    def summary(self) -> dict[str, Any]:
        """Returns `identity`, and what is needed to describe how two data sets differ.

        Returns:
          JSON values: 'digest', the identity; 'lasting', the same without file times;
          'class_names'; 'counts', the number of records of each class; and 'classes', a digest of
          the records of each class, whatever their order.
        """
        stamps = self.stamps if self.lasting is None else self.lasting
        count = len(self.class_names)
        by_class = np.lexsort((stamps[self.index], self.labels))
        ends = np.searchsorted(self.labels[by_class], np.arange(1, count))
        of_class = np.split(stamps[self.index][by_class].astype('<u8'), ends)
        return {
            'digest': self.identity,
            'lasting': self._digest(stamps),
            'class_names': list(self.class_names),
            'counts': [len(stamps) for stamps in of_class],
            'classes': [hashlib.sha256(stamps.data).hexdigest()[:12] for stamps in of_class],
        }

    def usage(self) -> dict[str, Any]:
        """Describes which part of the split is used.

        Returns:
          JSON values: 'data', the data set's name; 'images', the number of images used; 'found',
          the number in the whole split; 'left_out', counts of other files by kind; 'notes';
          'digest', the identity.
        """
        return {
            'data': self.name,
            'images': len(self),
            'found': len(self.stamps),
            'left_out': dict(self.left_out),
            'notes': list(self.notes),
            'digest': self.identity,
        }

    def usage_line(self) -> str:
        """Returns `usage` as one line of text."""
        left_out = ', '.join(f'{count} {kind}' for kind, count in self.left_out.items())
        words = [f'{len(self):,} of {len(self.stamps):,} images of {self.name}']
        words += [f'left out: {left_out}'] if left_out else []
        return one_line('; '.join([*words, *self.notes]))

    def image(self, i: int, resize: int, fit: str = 'crop') -> np.ndarray | None:
        """Reads and decodes one image, or takes it from the cache if there is one.

        Args:
          i: position in this selection.
          resize: side of the square image in px.
          fit: one of `decode.FITS`.

        Returns:
          uint8 [resize, resize, 3]; None if the image cannot be decoded, which is counted and
          logged.

        Raises:
          DataError: more than config.max_bad_images images of the split cannot be decoded.
        """
        number = int(self.index[i])
        store = self.store
        if number in store.bad:
            return None
        image = None if self.cache is None else self.cache.get(number)
        if image is None:
            try:
                image = self._decoded(number, resize, fit)
            except DataError as error:
                store.skip(number, error)
                return None
            if self.cache is not None:
                self.cache.put(number, image)
        return image

    def _decoded(self, number: int, resize: int, fit: str) -> np.ndarray:
        content = self.read(number)
        if isinstance(content, np.ndarray):
            return square(content, resize, fit)
        return decode(content, resize, self.where(number), fit)

    def image_or_next(self, i: int, resize: int, fit: str = 'crop') -> np.ndarray:
        """Reads an image, or the next one of its class that can be decoded.

        Corrupted images thus do not change how many images are trained on, and the result does not
        depend on the order in which they are discovered.

        Raises:
          DataError: no image of the class can be decoded, or as in `image`.
        """
        image = self.image(i, resize, fit)
        if image is not None:
            return image
        same_class = np.flatnonzero(self.labels == self.labels[i])
        for j in np.roll(same_class, -1 - np.searchsorted(same_class, i))[:-1]:
            image = self.image(j, resize, fit)
            if image is not None:
                return image
        raise DataError(
            f'class {self.class_names[self.labels[i]]!r} of {self.name} has no image that can be '
            'decoded: replace its images'
        )

    @property
    def skipped(self) -> int:
        """How many records of this selection turned out to be undecodable so far."""
        return int(np.isin(self.index, list(self.store.bad)).sum())

    def describe(self, i: int) -> str:
        """Says where the record at position i is, for messages."""
        return self.where(int(self.index[i]))

    def select(self, positions: np.ndarray) -> 'Records':
        """Returns the records at these positions of this selection."""
        return replace(self, labels=self.labels[positions], index=self.index[positions])

    def restrict(self, classes: np.ndarray) -> 'Records':
        """Returns only the records of these classes, relabelled in the order given."""
        number = np.full(len(self.class_names), -1, np.int32)
        number[classes] = np.arange(len(classes), dtype=np.int32)
        chosen = self.select(np.flatnonzero(number[self.labels] >= 0))
        names = tuple(self.class_names[c] for c in classes)
        return replace(chosen, labels=number[chosen.labels], class_names=names)
