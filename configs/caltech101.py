"""ImageNet to Caltech-101: 102 classes with the background; 3,059 training, 6,085 test images.

    python -m xmixup_jax.prepare --config=configs/caltech101.py
    python -m xmixup_jax.main --config=configs/caltech101.py

Fine-tuning ResNet-50 reaches 93.3 % (mean over classes; SimCLR paper, table of transfer results,
supervised). tfds's builder needs TensorFlow to convert the images, once.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.target = default.dataset('caltech101', 'train', 'test')
    config.weights = default.RESNET50
    return config
