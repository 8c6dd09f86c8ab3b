"""ImageNet to Describable Textures: 47 classes; 3,760 training, 1,880 test images (first fold).

    python -m xmixup_jax.prepare --config=configs/dtd.py
    python -m xmixup_jax.main --config=configs/dtd.py

Fine-tuning ResNet-50 reaches 74.6 % top-1 (SimCLR paper, table of transfer results, supervised).
tfds's builder needs TensorFlow to convert the images, once.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.target = default.dataset('dtd', 'train+validation', 'test')
    config.weights = default.RESNET50
    return config
