"""The six transfer tasks: their images, and the configuration that all runs of a task share.

`digits` needs no download. `caltech` is Tiny-ImageNet to Caltech-101. The other four hold a group
of Tiny-ImageNet's classes out as the target: source and pre-training are the remaining classes, so
that no class of the target was seen. Of a held-out class 100 images may be trained on, and the
other 50 training images and the 10 of the validation split are tested on.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs import default, digits
from xmixup_jax.errors import DataError

TINY_IMAGENET, CALTECH = 'tiny_imagenet', 'caltech101_64'

GROUPS = {
    # Hyponyms of WordNet's mammal.n.01.
    'mammals': """
        n01882714 n02074367 n02085620 n02094433 n02099601 n02099712 n02106662 n02113799 n02123045
        n02123394 n02124075 n02125311 n02129165 n02132136 n02364673 n02395406 n02403003 n02410509
        n02415577 n02423022 n02437312 n02480495 n02481823 n02486410 n02504458 n02509815""",
    # Hyponyms of vehicle.n.01.
    'vehicles': """
        n02814533 n02917067 n03100240 n03393912 n03444034 n03447447 n03599486 n03662601 n03670208
        n03796401 n03977966 n04146614 n04285008 n04465501 n04487081""",
    # Food, drink, and parts of plants.
    'food': """
        n07579787 n07583066 n07614500 n07615774 n07695742 n07711569 n07715103 n07720875 n07734744
        n07747607 n07749582 n07753592 n07768694 n07871810 n07873807 n07875152 n07920052
        n12267677""",
    # Furniture, vessels, kitchen and cleaning utensils, appliances.
    'household': """
        n02808440 n02823428 n02906734 n02909870 n02948072 n03014705 n03179701 n03201208 n03400231
        n03637318 n03937543 n03970156 n03983396 n04070727 n04099969 n04265275 n04398044 n04560804
        n04596742 n04597913""",
}
TRAIN_IMAGES = 100
TASKS = ('digits', 'caltech', *GROUPS)


def configuration(task: str, images: Path) -> ConfigDict:
    """The configuration of a task's runs, but for method, seed and sample rate.

    Args:
      task: of TASKS.
      images: the folder that `link_images` has filled.
    """
    config = digits.get_config()
    if task == 'digits':
        config.target = default.dataset('uci_digits', 'train[:20%]', 'train[20%:]')
    else:
        config.flip = True
        config.source = default.dataset(f'folder:{images}/{task}_source', 'train', 'validation')
        config.target = default.dataset(f'folder:{images}/{task}_target', 'train', 'test')
        config.model.stem = 'imagenet' if task == 'caltech' else 'tiny'
        config.resize, config.image_size = (72, 64) if task == 'caltech' else (36, 32)
        config.pretrain.steps = 10_000
        config.pretrain.optimizer.learning_rate = 0.05
        config.pretrain.optimizer.warmup_steps = 200
    config.optimizer = default.optimizer(0.03)
    config.cache_dir = str(images.parent / 'cache')
    config.report = False
    config.log_every = 100
    config.checkpoint_every = 100_000  # only at the end: a run takes seconds
    config.keep_checkpoints = 1
    return config


def link_images(data: Path, images: Path) -> None:
    """Fills `images` with TASK_source/SPLIT/CLASS and TASK_target/SPLIT/CLASS, as links to `data`.

    Args:
      data: holds tiny_imagenet/{train,validation}/CLASS and caltech101_64/{train,test}/CLASS.

    Raises:
      DataError: it does not.
    """
    tiny, caltech = data / TINY_IMAGENET, data / CALTECH
    for folder in (tiny / 'train', tiny / 'validation', caltech / 'train', caltech / 'test'):
        if not folder.is_dir():
            raise DataError(
                f'{folder} does not exist: --data must hold {TINY_IMAGENET} and {CALTECH}, image '
                'folders of SPLIT/CLASS/FILE'
            )
    _link(images / 'caltech_source', tiny)
    _link(images / 'caltech_target', caltech)
    every = {folder.name for folder in (tiny / 'train').iterdir()}
    for group, names in GROUPS.items():
        held_out = names.split()
        for split in ('train', 'validation'):
            for name in every - set(held_out):
                _link(images / f'{group}_source' / split / name, tiny / split / name)
        for name in held_out:
            files = sorted((tiny / 'train' / name).iterdir())
            tested = files[TRAIN_IMAGES:] + sorted((tiny / 'validation' / name).iterdir())
            for split, chosen in (('train', files[:TRAIN_IMAGES]), ('test', tested)):
                for file in chosen:
                    _link(images / f'{group}_target' / split / name / file.name, file)


def _link(link: Path, to: Path) -> None:
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(to.absolute())
