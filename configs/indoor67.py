"""ImageNet to MIT Indoor-67: 67 kinds of scenes; 5,360 training and 1,340 test images; ResNet-50.

    xmixup prepare --config=configs/indoor67.py
    python -m xmixup_jax.main --config=configs/indoor67.py

We know of no published result for this network that we could verify. The archive (2.4 GB) is
downloaded from its authors' site.
"""

from xmixup_jax import defaults


def get_config():
    config = defaults.get_config()
    config.target = defaults.dataset('mit_indoor67', 'train', 'test')
    config.weights = defaults.RESNET50
    return config
