"""ImageNet to CUB-200-2011: 200 species of birds; 5,994 training and 5,794 test images; ResNet-50.

    xmixup prepare --config=configs/cub.py
    python -m xmixup_jax.main --config=configs/cub.py

Plain fine-tuning of this network reaches 81.8 % top-1 with all training images and 51.2 % with 15 %
of them (figures of TLlib). The builder of tfds needs TensorFlow once, to convert the images.
"""

from xmixup_jax import defaults


def get_config():
    config = defaults.get_config()
    config.target = defaults.dataset('caltech_birds2011', 'train', 'test')
    config.weights = defaults.RESNET50
    return config
