"""Inspects the data before training: counts the images of each class and looks for problems."""

import hashlib
from collections import Counter

import numpy as np
from tqdm import tqdm

from xmixup_jax.data.names import readable
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import Data
from xmixup_jax.text import first_few, one_line

FEW_TESTED = 5  # test images; with fewer, the accuracy of a class means little
UNEQUAL = 10  # largest class / smallest class, from which the classes count as imbalanced
_SHOWN = 3  # examples per line


def class_table(data: Data) -> str:
    """Returns a table with the number of images of each target class, as text."""
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


def find_problems(data: Data) -> list[str]:
    """Lists possible problems with the target's data, one line each."""
    names, train = data.target.class_names, _counts(data.target)
    found = []
    if len(names) == 1:
        found.append(f'there is one class, {names[0]!r}: a classifier needs at least two')
    folded = Counter(name.casefold() for name in names)
    alike = [name for name in names if folded[name.casefold()] > 1]
    if alike:
        found.append(
            f'class names differ only in case: {first_few(list(map(repr, alike)), _SHOWN)}'
        )
    for part in (data.target, data.test):
        found += [] if part is None else part.doubts
    if train.max() >= UNEQUAL * train.min():
        large, small = int(train.argmax()), int(train.argmin())
        found.append(
            f'the classes are imbalanced: {train[large]} training images of {names[large]!r}, '
            f'{train[small]} of {names[small]!r} (--config.balance.sampling=balanced draws all '
            'classes equally often)'
        )
    if data.test is not None:
        tested = _counts(data.test)
        few = [f'{names[c]!r} ({tested[c]})' for c in np.flatnonzero(tested < FEW_TESTED)]
        if few:
            found.append(
                f'{len(few)} classes have fewer than {FEW_TESTED} test images: '
                + first_few(few, _SHOWN)
            )
        same = same_images(data.target, data.test)
        if same:
            found.append(
                f'{len(same)} test images are also training images: '
                + first_few([f'{b} is {a}' for a, b in same], _SHOWN)
            )
    return found


def same_images(train: Records, test: Records) -> list[tuple[str, str]]:
    """Finds test images whose files are byte-identical to those of training images.

    Returns:
      pairs (training image, test image), as `Records.describe` names them.
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
    """Prints the table of classes and the problems found."""
    print(class_table(data))
    for line in find_problems(data) or ['no problems found in the target data']:
        print(f'->  {one_line(line)}')
