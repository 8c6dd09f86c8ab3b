"""ImageNet to FGVC-Aircraft: 100 variants; 6,667 training and 3,333 test images; ResNet-50.

    xmixup prepare --config=configs/aircraft.py
    python -m xmixup_jax.main --config=configs/aircraft.py

Plain fine-tuning of this network reaches 80.2 % top-1 with all training images and 41.6 % with 15 %
of them (figures of TLlib). The archive (2.6 GB) is downloaded from its authors' site.
"""

from xmixup_jax import defaults


def get_config():
    config = defaults.get_config()
    config.target = defaults.dataset('fgvc_aircraft', 'train+validation', 'test')
    config.weights = defaults.RESNET50
    return config
