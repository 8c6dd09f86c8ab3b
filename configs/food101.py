"""ImageNet to Food-101: 101 dishes; 75,750 training and 25,250 test images; ResNet-50.

    xmixup prepare --config=configs/food101.py
    python -m xmixup_jax.main --config=configs/food101.py

Fine-tuning ResNet-50 reaches 88.3 % top-1 (supervised baseline in the SimCLR paper's table of
transfer results). The training labels are noisy. The archive (5 GB) is downloaded from its authors'
site.
"""

from xmixup_jax import defaults


def get_config():
    config = defaults.get_config()
    config.target = defaults.dataset('food101', 'train', 'validation')
    config.weights = defaults.RESNET50
    return config
