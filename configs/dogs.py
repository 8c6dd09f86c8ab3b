"""ImageNet to Stanford Dogs: 120 breeds; 12,000 training and 8,580 test images; ResNet-50.

    xmixup prepare --config=configs/dogs.py
    python -m xmixup_jax.main --config=configs/dogs.py

The images are part of ImageNet, so the network has already seen them. In their repository, the
authors of L2-SP give nearly 80 % top-1 for plain fine-tuning of ResNet-101 and about 85 % for
L2-SP. The builder of tfds needs TensorFlow once, to convert the images.
"""

from xmixup_jax import defaults


def get_config():
    config = defaults.get_config()
    config.target = defaults.dataset('stanford_dogs', 'train', 'test')
    config.weights = defaults.RESNET50
    return config
