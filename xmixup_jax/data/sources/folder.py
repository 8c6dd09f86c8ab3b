"""Image folders, `folder:PATH`: PATH/SPLIT/CLASS/FILE, or PATH/CLASS/FILE, split at random.

Images may be in sub-folders of their class. Hidden files and operating-system files are never data;
other files that are not images are left out and counted.
"""

import shlex
from collections import Counter
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.data.records import Records, Store
from xmixup_jax.data.sources import listing
from xmixup_jax.data.sources.image_files import open_files
from xmixup_jax.data.sources.listing import Found, Image
from xmixup_jax.data.sources.splits import (
    UNDIVIDED_SPLITS,
    find_split,
    is_split_name,
    kind_of_split,
    missing_split,
    part_name,
    split_class,
    substitution_note,
)
from xmixup_jax.errors import DataError

Classes = dict[str, Found]
"""The content of the class folders by their names in Unicode form NFC, sorted."""


def problem(what: str, config: ConfigDict) -> str | None:
    """Reports a folder that does not exist; None if it does."""
    if not what:
        return 'folder: names no folder: use folder:PATH'
    path = Path(what).expanduser()
    if path.is_dir():
        return None
    if path.is_file():
        return (
            f'{path} is a file, not an image folder: unpack it and name the folder with '
            'folder:PATH, or if it is a table of images use csv:FILE'
        )
    return (
        f'image folder {path} does not exist: it should contain SPLIT/CLASS/FILE or CLASS/FILE; '
        'name another with folder:PATH'
    )


def prepare(what: str, config: ConfigDict) -> None:
    """A folder needs no preparation."""


def open(what: str, dataset: ConfigDict, split: str, config: ConfigDict, store: Store) -> Records:
    """Opens one split.

    A folder without split folders has the splits 'train' and 'test': `dataset.test_share` of each
    class's images, rounded, form the test split, which is the same in every run whatever its seed.
    The split '' is all images.

    Raises:
      DataError: there is no such split, a class has no training images, or it is unclear whether
        folders are classes or splits.
    """
    root = Path(what).expanduser()
    folders = listing.subfolders(root)
    if not folders:
        raise DataError(
            f'{root} contains no folders: put the images of each class into a folder of their own, '
            'or list them in a table: csv:FILE'
        )
    splits = [folder for folder in folders if _looks_like_split(folder)]
    found = find_split(split, splits, lambda folder: folder.name) if split else None
    notes: list[str] = []
    doubts: list[str] = []
    if found is not None and (found.name == split or is_split_name(found.name)):
        _check_unambiguous(root, found, folders, splits)
        why = f'{split!r} has no class folders' if (root / split).is_dir() else ''
        notes += substitution_note(split, found.name, why)
        top = found
    else:
        if any(is_split_name(folder.name) for folder in splits):
            raise missing_split(str(root), split, [each.name for each in splits], dataset, config)
        if split and split not in UNDIVIDED_SPLITS:
            raise missing_split(str(root), split, UNDIVIDED_SPLITS, dataset, config)
        top, found = root, None
    classes = read_classes(top)
    _check_depth(classes, top, config, dataset)
    _check_not_empty(classes, top, split == dataset.split)
    classes = {name: content for name, content in classes.items() if content.images}
    left_out = listing.total(classes.values()) + listing.count_outside_classes(top)
    nested = sum(content.nested for content in classes.values())
    if nested:
        notes.append(f'{nested} images are in sub-folders of their class')
    if found is None:
        doubts = _doubts(classes, part_name(dataset, config))
    images = {name: content.images for name, content in classes.items()}
    if found is None and split:
        for label, (name, of_class) in enumerate(images.items()):
            part = split_class(split, len(of_class), label, dataset.test_share)
            images[name] = [of_class[i] for i in part]
        kept = sum(map(len, (each.images for each in classes.values())))
        kept -= sum(map(len, images.values()))
        if split == 'train' and kept:
            notes.append(
                f'{kept} more are set aside for the test (test_share={dataset.test_share:g})'
            )
    return _records(dataset.name, images, store, left_out, notes, doubts)


def _looks_like_split(folder: Path) -> bool:
    """Whether a folder looks like a split: it has folders with images, and no images beside them
    (unless its name is a usual name of a split)."""
    if listing.has_images(folder) and not is_split_name(folder.name):
        return False
    return any(listing.find_images(inner).images for inner in listing.subfolders(folder))


def _check_unambiguous(root: Path, found: Path, folders: list[Path], splits: list[Path]) -> None:
    """Raises DataError if a folder that looks like a split may be a class as well."""
    if any(each != found and is_split_name(each.name) for each in splits):
        return
    others = [each for each in folders if not is_split_name(each.name) and listing.has_images(each)]
    if others:
        raise DataError(
            f'{root} contains {found.name}, which has folders of images, and {others[0].name}, '
            f'which has images: is {found.name} a split or a class? Move all class folders of a '
            'split into it and the others elsewhere, or list the images in a table: csv:FILE'
        )


def read_classes(folder: Path) -> Classes:
    """Reads the class folders. Folders whose names differ only in Unicode form are merged."""
    classes: Classes = {}
    for inner in listing.subfolders(folder):
        content, name = listing.find_images(inner), listing.nfc(inner.name)
        if name in classes:
            images = sorted([*classes[name].images, *content.images], key=lambda image: image.name)
            content = Found(images, classes[name].left_out + content.left_out)
        classes[name] = content
    return dict(sorted(classes.items()))


def _check_depth(classes: Classes, folder: Path, config: ConfigDict, dataset: ConfigDict) -> None:
    """Raises DataError if apparent classes are the data set itself, or contain the splits."""
    part = part_name(dataset, config)
    classes = {name: content for name, content in classes.items() if content.images}
    for name, content in classes.items():
        path, inner = folder / name, _image_subfolders(content)
        deep = len(inner) > 1 or all(image.name.count('/') > 1 for image in content.images)
        if len(classes) == 1 and content.nested == len(content.images) and deep:
            flag = shlex.quote(f'--config.{part}.name=folder:{path}')
            raise DataError(
                f'{folder} has images in only one folder, {name}, and there only in sub-folders '
                f'({", ".join(sorted(inner)[:3])}): if those are classes or splits, use {flag}'
            )
        if len({kind_of_split(each) for each in inner} - {None}) > 1:
            raise DataError(
                f'{path} contains {" and ".join(sorted(inner))}, as if the splits were inside the '
                'classes: move the images to SPLIT/CLASS/FILE, or list them in a table: csv:FILE'
            )


def _image_subfolders(content: Found) -> set[str]:
    """Returns the sub-folders of a class that contain images."""
    return {image.name.split('/')[0] for image in content.images if '/' in image.name}


def _doubts(classes: Classes, part: str) -> list[str]:
    """Lists reasons to believe that the folders are not classes."""
    if len(classes) > 1 and all(map(is_split_name, classes)):
        return [
            'all classes are named like splits: if they are splits, list the images in a table: '
            'csv:FILE'
        ]
    inner = [_image_subfolders(content) for content in classes.values()]
    nested = all(content.nested == len(content.images) for content in classes.values())
    if len(classes) > 1 and nested and len(inner[0]) > 1 and all(e == inner[0] for e in inner):
        first, second, *_ = classes
        return [
            f'all classes contain the same folders ({", ".join(sorted(inner[0])[:3])}): if those '
            f'are the classes, use --config.{part}.split={first} '
            f'--config.{part}.test_split={second}'
        ]
    return []


def _check_not_empty(classes: Classes, folder: Path, training: bool) -> None:
    """Raises DataError if a class has no training images, or the split has no images at all."""
    empty = [name for name, content in classes.items() if not content.images]
    if not empty or (not training and len(empty) < len(classes)):
        return
    left_out = classes[empty[0]].left_out
    holds = f', but {listing.format_counts(left_out)}' if left_out else ''
    advice = 'add images to it, or remove it'
    if 'pip install' in holds:
        advice = 'install the package, or remove the folder'
    elif empty[0].casefold() in ('labels', 'annotations'):
        advice = 'if this is a data set for detection, list the images in a table: csv:FILE'
    raise DataError(f'class folder {str(folder / empty[0])!r} contains no images{holds}: {advice}')


def _records(
    name: str,
    classes: dict[str, list[Image]],
    store: Store,
    left_out: Counter[str],
    notes: list[str],
    doubts: list[str],
) -> Records:
    images = [image for of_class in classes.values() for image in of_class]
    counts = [len(of_class) for of_class in classes.values()]
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return open_files(name, list(classes), labels, images, store, left_out, notes, doubts)
