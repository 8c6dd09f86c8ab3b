"""ImageNet to Oxford Flowers: 102 species; 2,040 training and 6,149 test images; ResNet-50.

    python -m xmixup_jax.prepare --config=configs/flowers102.py
    python -m xmixup_jax.main --config=configs/flowers102.py

Fine-tuning ResNet-50 reaches 97.6 % (mean over classes; SimCLR paper, table of transfer results,
supervised). tfds's builder needs TensorFlow to convert the images, once.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.target = default.dataset('oxford_flowers102', 'train+validation', 'test')
    config.weights = default.RESNET50
    return config
