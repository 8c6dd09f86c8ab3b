"""ImageNet to Stanford Cars: 196 models; 8,144 training and 8,041 test images; ResNet-50.

    xmixup prepare --config=configs/cars.py
    python -m xmixup_jax.main --config=configs/cars.py

Plain fine-tuning of this network reaches 87.8 % top-1 with all training images and 41.1 % with 15 %
of them (figures of TLlib). The original download is gone; `prepare` says which files to put where.
"""

from xmixup_jax import defaults


def get_config():
    config = defaults.get_config()
    config.target = defaults.dataset('stanford_cars', 'train', 'test')
    config.weights = defaults.RESNET50
    return config
