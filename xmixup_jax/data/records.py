"""Records: random access to the encoded images and the labels of one split of a data set."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from xmixup_jax.data.decode import decode
from xmixup_jax.errors import DataError

log = logging.getLogger('xmixup_jax')


@dataclass(frozen=True)
class Store:
    """What all selections from one split share: decoded images, and the images that are none."""

    max_bad_images: int
    """Limit of `bad`."""
    kept: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    """Decoded images by record number and side; see `cache.MemoryCache`."""
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
                    'skipped, not more'
                ) from error
            self.bad.add(number)
        log.warning('Skipped: %s', error)


@dataclass(frozen=True)
class Records:
    """One split, or a selection from it."""

    name: str
    class_names: tuple[str, ...]
    labels: np.ndarray
    """int32 [N], 0 <= label < K = len(class_names)."""
    read: Callable[[int], bytes]
    """Record number to encoded image; safe to call from several threads."""
    where: Callable[[int], str]
    """Record number to words that find it again, for errors."""
    index: np.ndarray
    """int64 [N], the record numbers of this selection."""
    store: Store = field(compare=False)
    stamp: Callable[[int], str]
    """Record number to what changes with the record's bytes, for what is kept on disk."""
    cache: Any = None
    """A `cache.Cache` for the records that are read again and again, or None."""

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int, resize: int) -> np.ndarray | None:
        """uint8 [resize, resize, 3]; decoded once, if there is a cache.

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
                image = decode(self.read(number), resize, self.where(number))
            except DataError as error:
                store.skip(number, error)
                return None
            if self.cache is not None:
                self.cache.put(number, image)
        return image

    def image_or_next(self, i: int, resize: int) -> np.ndarray:
        """`image`, or that of the next record of the same class that can be decoded.

        What is trained on then has as many images as without the damage, and does not depend on
        the order in which it was found.

        Raises:
          DataError: there is none, or as in `image`.
        """
        image = self.image(i, resize)
        if image is not None:
            return image
        same_class = np.flatnonzero(self.labels == self.labels[i])
        for j in np.roll(same_class, -1 - np.searchsorted(same_class, i))[:-1]:
            image = self.image(j, resize)
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
