"""The six transfer tasks: their images, and the configuration that all runs of a task share.

`digits` needs no download. `caltech` is Tiny-ImageNet to Caltech-101. For the other four, every
second class of a category of Tiny-ImageNet's is a class of the target. Source and pre-training of
all four are the classes that no target has: no class of a target was seen, and its neighbours in
the same category may be found, as birds and cars are in ImageNet. Of a target's class 40 images may
be trained on; the other 110 training images and the 10 of the validation split are tested on.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs import default, digits
from xmixup_jax.errors import DataError

TINY_IMAGENET, CALTECH = 'tiny_imagenet', 'caltech101_64'

CATEGORIES = {
    # Hyponyms of WordNet's animal.n.01.
    'animals': """
        n01443537 n01629819 n01641577 n01644900 n01698640 n01742172 n01768244 n01770393 n01774384
        n01774750 n01784675 n01855672 n01882714 n01910747 n01917289 n01944390 n01945685 n01950731
        n01983481 n01984695 n02002724 n02056570 n02058221 n02074367 n02085620 n02094433 n02099601
        n02099712 n02106662 n02113799 n02123045 n02123394 n02124075 n02125311 n02129165 n02132136
        n02165456 n02190166 n02206856 n02226429 n02231487 n02233338 n02236044 n02268443 n02279972
        n02281406 n02321529 n02364673 n02395406 n02403003 n02410509 n02415577 n02423022 n02437312
        n02480495 n02481823 n02486410 n02504458 n02509815""",
    # Hyponyms of vehicle.n.01.
    'vehicles': """
        n02814533 n02917067 n03100240 n03393912 n03444034 n03447447 n03599486 n03662601 n03670208
        n03796401 n03977966 n04146614 n04285008 n04465501 n04487081""",
    # Food, drink, and parts of plants.
    'food': """
        n07579787 n07583066 n07614500 n07615774 n07695742 n07711569 n07715103 n07720875 n07734744
        n07747607 n07749582 n07753592 n07768694 n07871810 n07873807 n07875152 n07920052 n12267677
        """,
    # Furniture, vessels, kitchen and cleaning utensils, lights and appliances.
    'household': """
        n02795169 n02808440 n02815834 n02823428 n02906734 n02909870 n02948072 n03014705 n03179701
        n03201208 n03400231 n03637318 n03937543 n03970156 n03983396 n04070727 n04074963 n04099969
        n04179913 n04265275 n04398044 n04560804 n04596742 n04597913""",
}
GROUPS = {name: tuple(classes.split()[::2]) for name, classes in CATEGORIES.items()}
"""The classes of a target, WordNet ids."""
REST = 'rest'
"""The data set of the classes that are in no group."""
TRAIN_IMAGES = 40
TASKS = ('digits', 'caltech', *GROUPS)
PHOTOGRAPHS = TASKS[1:]

LARGE = {
    'model.name': 'resnet18',
    'model.width': 64,
    'model.stem': 'tiny',
    'resize': 72,
    'image_size': 64,
    'precision': 'bfloat16',
    'pretrain.steps': 3000,
    'pretrain.batch_size': 256,
    'pretrain.optimizer.learning_rate': 0.1,
}
"""A network for which a GPU is needed, in place of the ResNet-10 of width 16."""


def configuration(task: str, images: Path, large: bool = False) -> ConfigDict:
    """The configuration of a task's runs, but for method, seed and sample rate.

    Args:
      task: of TASKS.
      images: the folder that `link_images` has filled.
      large: with the network of LARGE; of PHOTOGRAPHS alone.
    """
    config = digits.get_config()
    config.model.stem = 'imagenet' if task == 'caltech' else 'tiny'
    if task == 'digits':
        config.target = default.dataset('uci_digits', 'train[:20%]', 'train[20%:]')
    else:
        config.flip = True
        source = task if task == 'caltech' else REST
        config.source = default.dataset(f'folder:{images}/{source}_source', 'train', 'validation')
        config.target = default.dataset(f'folder:{images}/{task}_target', 'train', 'test')
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
    if large:
        config.update_from_flattened_dict(LARGE)
    return config


def link_images(data: Path, images: Path) -> None:
    """Fills `images` with NAME_source/SPLIT/CLASS and NAME_target/SPLIT/CLASS, as links to `data`.

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
    held_out = {name for group in GROUPS.values() for name in group}
    for split in ('train', 'validation'):
        for folder in (tiny / split).iterdir():
            if folder.name not in held_out:
                _link(images / f'{REST}_source' / split / folder.name, folder)
    for group, names in GROUPS.items():
        for name in names:
            files = sorted((tiny / 'train' / name).iterdir())
            tested = files[TRAIN_IMAGES:] + sorted((tiny / 'validation' / name).iterdir())
            for split, chosen in (('train', files[:TRAIN_IMAGES]), ('test', tested)):
                for file in chosen:
                    _link(images / f'{group}_target' / split / name / file.name, file)


def _link(link: Path, to: Path) -> None:
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(to.absolute())
