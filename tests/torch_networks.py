"""torchvision and timm, for tests."""

import importlib
import re
import sys

import torch


def import_torchvision():
    """Imports torchvision; a CPU build of PyTorch cannot load the operators of PyPI's build.

    No network needs one of them (they serve detection), so that their names alone will do.
    """
    library = torch.library.Library('torchvision', 'FRAGMENT')
    while True:
        try:
            return importlib.import_module('torchvision'), library
        except RuntimeError as error:
            missing = re.search(r'operator torchvision::(\w+) does not exist', str(error))
            if not missing:
                raise
            library.define(f'{missing[1]}(Tensor x) -> Tensor')
            for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
                del sys.modules[name]


torchvision, _library = import_torchvision()
timm = importlib.import_module('timm')

# timm's names of those that have another one here.
NAMES = {
    **{f'efficientnet_lite{i}': f'tf_efficientnet_lite{i}' for i in range(3)},
    'vit_s16': 'vit_small_patch16_224',
    'vit_b16': 'vit_base_patch16_224',
}
# The small networks of conftest.py.
SMALL = {'convnext4': ('convnext_tiny', {'depths': (1, 2, 1, 1), 'dims': (8, 16, 32, 64)})}


def peer(name: str, num_classes: int, image_size: int) -> torch.nn.Module:
    """The network of another project that `config.model.name` is to agree with, random weights."""
    if name.startswith('resnet') and not name.endswith('d'):
        return torchvision.models.get_model(name, num_classes=num_classes)
    if name == 'inception_v3':
        return torchvision.models.inception_v3(
            num_classes=num_classes, aux_logits=False, init_weights=False
        )
    if name in SMALL:
        base, options = SMALL[name]
    else:
        base, options = NAMES.get(name, name), {}
    if base.startswith('vit'):
        options = options | {'img_size': image_size}
    return timm.create_model(base, num_classes=num_classes, **options)
