"""Records: random access to the images and the labels of one split of a data set."""

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
    """What all selections from one split share: decoded images, and which cannot be decoded."""

    max_bad_images: int
    """Limit of `bad`."""
    kept: dict[tuple[int, int, str], np.ndarray] = field(default_factory=dict)
    """Decoded images by record number, side and fit; see `cache.MemoryCache`."""
    bad: set[int] = field(default_factory=set)
    """Numbers of the records whose image cannot be decoded."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def skip(self, number: int, error: DataError) -> None:
        """Counts and reports a record, once.

        Raises:
          DataError: there are too many.
        """
        with self.lock:
            if number in self.bad:
                return
            if len(self.bad) >= self.max_bad_images:
                raise DataError(
                    f'{error}; config.max_bad_images={self.max_bad_images} images of a split are '
                    'skipped, not more: replace them, or skip more with --config.max_bad_images=N'
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
    """Of the data set, for people: caches and runs know the data by `identity`."""
    class_names: tuple[str, ...]
    labels: np.ndarray
    """int32 [N], 0 <= label < K = len(class_names)."""
    read: Callable[[int], bytes | np.ndarray]
    """Record number to an encoded image, or to uint8 pixels [H, W, 3]; safe to call from several
    threads."""
    where: Callable[[int], str]
    """Record number to words that find it again, for errors."""
    index: np.ndarray
    """int64 [N], the record numbers of this selection."""
    store: Store = field(compare=False)
    stamps: np.ndarray
    """uint64 [records of the whole split], by record number: a hash of what the record is, which
    changes when its image changes and not when the data set moves. See `sources.stamps`."""
    lasting: np.ndarray | None = None
    """The same without the times of files, which a copy does not always keep; None where `stamps`
    do not depend on times."""
    left_out: Mapping[str, int] = field(default_factory=dict, compare=False)
    """Numbers of the split's files that are no records, by kind."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the user should know of how the split was read."""
    doubts: tuple[str, ...] = field(default=(), compare=False)
    """Those of the notes that say why the data may not be what the user means."""
    cache: Any = None
    """A `cache.Cache` for the records that are read again and again, or None."""

    @staticmethod
    def from_arrays(
        images: np.ndarray | Sequence[np.ndarray],
        labels: np.ndarray,
        class_names: Sequence[str],
        name: str = 'arrays',
    ) -> 'Records':
        """Records of images in memory, which are not copied and must not be changed afterwards.

        Like those of files, they are made squares when they are read, see `decode.square`.

        Args:
          images: uint8 [N, H, W, 3] in RGB, or grey [N, H, W]; or N of [H, W, 3] or [H, W] whose
            sizes may differ.
          labels: integers [N], 0 <= label < K.
          class_names: K different names.
          name: of the data set, for messages and titles.

        Raises:
          DataError: the arrays are of another type or shape, or do not fit together.
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
        """32 hexadecimal digits that tell data apart by their content.

        They depend on the classes in order, on every record of the whole split and on the
        selection from it; not on where the data set is or what it is called.
        """
        return self._digest(self.stamps)

    def _digest(self, stamps: np.ndarray) -> str:
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for array, kind in ((stamps, '<u8'), (self.index, '<i8'), (self.labels, '<i4')):
            digest.update(f' {len(array)} '.encode())
            digest.update(np.ascontiguousarray(array, kind).data)
        return digest.hexdigest()[:32]

    def summary(self) -> dict[str, Any]:
        """`identity`, and what it takes to say in words how two data sets differ.

        Returns:
          JSON values: 'digest', the identity; 'lasting', the same without the times of files;
          'class_names'; and of each class 'counts', its number of records, and 'classes', a digest
          of them whatever their order.
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
        """What is used of the split.

        Returns:
          JSON values: 'data', which names it; 'images', the number of those used; 'found', of those
          of the whole split; 'left_out', numbers of other files by kind; 'notes'; 'digest', the
          identity.
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
        """The same in one line, for people."""
        left_out = ', '.join(f'{count} {kind}' for kind, count in self.left_out.items())
        words = [f'{len(self):,} of {len(self.stamps):,} images of {self.name}']
        words += [f'left out: {left_out}'] if left_out else []
        return one_line('; '.join([*words, *self.notes]))

    def image(self, i: int, resize: int, fit: str = 'crop') -> np.ndarray | None:
        """uint8 [resize, resize, 3]; decoded once, if there is a cache.

        Args:
          i: place in this selection.
          resize: side in px.
          fit: one of `decode.FITS`.

        Returns:
          None if the image cannot be decoded; then it has been counted and reported.

        Raises:
          DataError: more than config.max_bad_images of the split cannot be decoded.
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
        """`image`, or that of the next record of the same class that can be decoded.

        What is trained on then has as many images as without the damage, and does not depend on
        the order in which it was found.

        Raises:
          DataError: there is none, or as in `image`.
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
        """Records of this selection that were found to have no image."""
        return int(np.isin(self.index, list(self.store.bad)).sum())

    def describe(self, i: int) -> str:
        return self.where(int(self.index[i]))

    def select(self, positions: np.ndarray) -> 'Records':
        """The records at these positions of this selection."""
        return replace(self, labels=self.labels[positions], index=self.index[positions])

    def restrict(self, classes: np.ndarray) -> 'Records':
        """The records of these classes alone, which are numbered anew in the order given."""
        number = np.full(len(self.class_names), -1, np.int32)
        number[classes] = np.arange(len(classes), dtype=np.int32)
        chosen = self.select(np.flatnonzero(number[self.labels] >= 0))
        names = tuple(self.class_names[c] for c in classes)
        return replace(chosen, labels=number[chosen.labels], class_names=names)
