"""ImageNet to Oxford Flowers: 102 species; 2,040 training and 6,149 test images; ResNet-50.

    xmixup prepare --config=configs/flowers102.py
    python -m xmixup_jax.main --config=configs/flowers102.py

Fine-tuning ResNet-50 reaches 97.6 % (mean over classes; supervised baseline in the SimCLR paper's
table of transfer results). The builder of tfds needs TensorFlow once, to convert the images.
"""

from xmixup_jax import defaults


def get_config():
    config = defaults.get_config()
    config.target = defaults.dataset('oxford_flowers102', 'train+validation', 'test')
    config.weights = defaults.RESNET50
    return config
