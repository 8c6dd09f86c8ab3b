r"""Tiny-ImageNet to Caltech-101 at 64 px, with a small ResNet that trains on a CPU.

    python -m xmixup_jax.main --config=configs/tiny_caltech.py \
        --config.source.name=folder:PATH/tiny_imagenet \
        --config.target.name=folder:PATH/caltech101_64

Both are image folders, SPLIT/CLASS/FILE: Tiny-ImageNet with `train` and `validation` (200 classes),
Caltech-101 with `train` and `test` (101 classes). Training uses `target.shots` images per class.
"""

from xmixup_jax import defaults


def get_config():
    config = defaults.get_config()
    config.source = defaults.dataset('folder:data/tiny_imagenet', 'train', 'validation')
    config.target = defaults.dataset('folder:data/caltech101_64', 'train', 'test')
    config.target.shots = 10
    config.resize = 72
    config.image_size = 64
    config.model.name = 'resnet10'
    config.model.width = 16
    config.model.stem = 'tiny'
    config.pretrain.steps = 6000
    config.pretrain.batch_size = 128
    config.pretrain.optimizer = defaults.optimizer(0.1, 'cosine')
    config.pretrain.optimizer.warmup_steps = 200
    config.steps = 1500
    config.batch_size = 32
    config.optimizer = defaults.optimizer(0.03)
    return config
