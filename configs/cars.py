"""ImageNet to Stanford Cars: 196 models; 8,144 training and 8,041 test images; ResNet-50.

    python -m xmixup_jax.prepare --config=configs/cars.py
    python -m xmixup_jax.main --config=configs/cars.py

Plain fine-tuning of this network reaches 87.8 % top-1 on all training images and 41.1 % on 15 % of
them (TLlib's figures). The original download is gone: `prepare` says which files to put where.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.target = default.dataset('stanford_cars', 'train', 'test')
    config.weights = default.RESNET50
    return config
