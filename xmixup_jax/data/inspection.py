"""What a look at the data shows before any training: images of each class, and suspicions."""

import hashlib
from collections import Counter

import numpy as np
from tqdm import tqdm

from xmixup_jax.data.names import readable
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import Data
from xmixup_jax.text import one_line, some

FEW_TESTED = 5  # images: with fewer the accuracy of a class says little
UNEQUAL = 10  # times as many images of the largest class as of the smallest
_SHOWN = 3  # examples in a line


def class_table(data: Data) -> str:
    """The images of each class of the target, in a table."""
    names = readable(data.target.class_names)
    parts = {'train': data.target, 'validation': data.validation, 'test': data.test}
    found = {name: _counts(part) for name, part in parts.items() if part is not None}
    header, counts = ['class', *found], list(found.values())
    rows = [[one_line(name), *map(str, row)] for name, *row in zip(names, *counts, strict=True)]
    rows.append(['all', *(str(each.sum()) for each in counts)])
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return '\n'.join(
        '  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in [header, *rows]
    )


def suspicions(data: Data) -> list[str]:
    """What may be wrong with the target's data, a line each."""
    names, train = data.target.class_names, _counts(data.target)
    found = []
    if len(names) == 1:
        found.append(f'there is one class, {names[0]!r}: a classifier needs at least two')
    folded = Counter(name.casefold() for name in names)
    alike = [name for name in names if folded[name.casefold()] > 1]
    if alike:
        found.append(f'classes differ in case alone: {some(list(map(repr, alike)), _SHOWN)}')
    for part in (data.target, data.test):
        found += [] if part is None else part.doubts
    if train.max() >= UNEQUAL * train.min():
        large, small = int(train.argmax()), int(train.argmin())
        found.append(
            f'the classes are very unequal: {train[large]} training images of {names[large]!r}, '
            f'{train[small]} of {names[small]!r} (--config.balance.sampling=balanced draws each '
            'class equally often)'
        )
    if data.test is not None:
        tested = _counts(data.test)
        few = [f'{names[c]!r} ({tested[c]})' for c in np.flatnonzero(tested < FEW_TESTED)]
        if few:
            found.append(
                f'{len(few)} classes have fewer than {FEW_TESTED} test images: {some(few, _SHOWN)}'
            )
        same = same_images(data.target, data.test)
        if same:
            found.append(
                f'{len(same)} test images are training images, too: '
                + some([f'{b} is {a}' for a, b in same], _SHOWN)
            )
    return found


def same_images(train: Records, test: Records) -> list[tuple[str, str]]:
    """Test images whose files are those of training images, byte by byte.

    Returns:
      (training image, test image) in words.
    """
    known: dict[bytes, int] = {}
    found = []
    with tqdm(
        total=len(train) + len(test), desc='compare', unit='image', disable=None, leave=False
    ) as bar:
        for records, note in ((train, True), (test, False)):
            for i in range(len(records)):
                content = records.read(int(records.index[i]))
                digest = hashlib.blake2b(
                    content if isinstance(content, bytes) else content.tobytes()
                ).digest()
                if note:
                    known.setdefault(digest, i)
                elif digest in known:
                    found.append((train.describe(known[digest]), records.describe(i)))
                bar.update()
    return found


def _counts(records: Records) -> np.ndarray:
    return np.bincount(records.labels, minlength=len(records.class_names))


def show(data: Data) -> None:
    """Prints both."""
    print(class_table(data))
    for line in suspicions(data) or ['nothing suspicious in the target data']:
        print(f'->  {one_line(line)}')
