"""ImageNet to Describable Textures: 47 classes; 3,760 training, 1,880 test images (first fold).

    xmixup prepare --config=configs/dtd.py
    python -m xmixup_jax.main --config=configs/dtd.py

Fine-tuning ResNet-50 reaches 74.6 % top-1 (supervised baseline in the SimCLR paper's table of
transfer results). The builder of tfds needs TensorFlow once, to convert the images.
"""

from xmixup_jax import defaults


def get_config():
    config = defaults.get_config()
    config.target = defaults.dataset('dtd', 'train+validation', 'test')
    config.weights = defaults.RESNET50
    return config
