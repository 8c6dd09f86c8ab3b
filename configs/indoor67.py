"""ImageNet to MIT Indoor-67: 67 kinds of scenes; 5,360 training and 1,340 test images; ResNet-50.

    python -m xmixup_jax.prepare --config=configs/indoor67.py
    python -m xmixup_jax.main --config=configs/indoor67.py

We know of no public figure for this network that we could check. The archive (2.4 GB) is fetched
from its authors' site.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.target = default.dataset('mit_indoor67', 'train', 'test')
    config.weights = default.RESNET50
    return config
