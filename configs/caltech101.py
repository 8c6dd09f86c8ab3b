"""ImageNet to Caltech-101: 102 classes with the background; 3,059 training, 6,085 test images.

    xmixup prepare --config=configs/caltech101.py
    python -m xmixup_jax.main --config=configs/caltech101.py

Fine-tuning ResNet-50 reaches 93.3 % (mean over classes; supervised baseline in the SimCLR paper's
table of transfer results). The builder of tfds needs TensorFlow once, to convert the images.
"""

from xmixup_jax import defaults


def get_config():
    config = defaults.get_config()
    config.target = defaults.dataset('caltech101', 'train', 'test')
    config.weights = defaults.RESNET50
    return config
