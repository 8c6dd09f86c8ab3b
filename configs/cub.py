"""ImageNet to CUB-200-2011: 200 species of birds; 5,994 training and 5,794 test images; ResNet-50.

    python -m xmixup_jax.prepare --config=configs/cub.py
    python -m xmixup_jax.main --config=configs/cub.py

Plain fine-tuning of this network reaches 81.8 % top-1 on all training images and 51.2 % on 15 % of
them (TLlib's figures). tfds's builder needs TensorFlow to convert the images, once.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.target = default.dataset('caltech_birds2011', 'train', 'test')
    config.weights = default.RESNET50
    return config
