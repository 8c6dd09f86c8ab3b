"""ImageNet to Oxford Flowers: 102 species; 2,040 training and 6,149 test images; ResNet-50.

    xmixup prepare --config=configs/flowers102.py
    python -m xmixup_jax.main --config=configs/flowers102.py

Fine-tuning ResNet-50 reaches 97.6 % (mean over classes; SimCLR paper, table of transfer results,
supervised). tfds's builder needs TensorFlow to convert the images, once.
"""

from xmixup_jax import defaults


def get_config():
    config = defaults.get_config()
    config.target = defaults.dataset('oxford_flowers102', 'train+validation', 'test')
    config.weights = defaults.RESNET50
    return config
