"""ImageNet to Oxford-IIIT Pets: 37 breeds; 3,680 training and 3,669 test images; ResNet-50.

    xmixup prepare --config=configs/pets.py
    python -m xmixup_jax.main --config=configs/pets.py

Fine-tuning ResNet-50 reaches 92.1 % (mean over classes; supervised baseline in the SimCLR paper's
table of transfer results). The builder of tfds needs TensorFlow once, to convert the images.
"""

from xmixup_jax import defaults


def get_config():
    config = defaults.get_config()
    config.target = defaults.dataset('oxford_iiit_pet', 'train', 'test')
    config.weights = defaults.RESNET50
    return config
