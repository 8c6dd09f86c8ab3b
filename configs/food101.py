"""ImageNet to Food-101: 101 dishes; 75,750 training and 25,250 test images; ResNet-50.

    python -m xmixup_jax.prepare --config=configs/food101.py
    python -m xmixup_jax.main --config=configs/food101.py

Fine-tuning ResNet-50 reaches 88.3 % top-1 (SimCLR paper, table of transfer results, supervised).
The training labels are not cleaned. The archive (5 GB) is fetched from its authors' site.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.target = default.dataset('food101', 'train', 'validation')
    config.weights = default.RESNET50
    return config
