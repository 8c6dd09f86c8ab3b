"""ImageNet to FGVC-Aircraft (100 variants; 6,667 training and 3,333 test images), ResNet-50.

    python -m xmixup_jax.main --config=configs/aircraft.py

Plain fine-tuning of this network reaches 80.2 % top-1 on all training images (TLlib's figure).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.target = default.dataset('fgvc_aircraft', 'train', 'test')
    config.weights = 'weights/resnet50.safetensors'
    return config
