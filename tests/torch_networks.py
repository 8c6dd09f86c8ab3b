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
_SIZES = {'ti': 'tiny', 's': 'small', 'b': 'base', 'l': 'large'}
NAMES = {
    **{f'efficientnet_lite{i}': f'tf_efficientnet_lite{i}' for i in range(3)},
    **{
        f'vit_{size}{patch}': f'vit_{_SIZES[size]}_patch{patch}_224'
        for size, patch in (('ti', 16), ('s', 16), ('b', 16), ('l', 16), ('s', 32), ('b', 32))
    },
    **{
        f'dinov2_{size}14{ending}': f'vit_{_SIZES[size]}_patch14{ending}_dinov2'
        for size in 'sbl'
        for ending in ('', '_reg4')
    },
    **{
        f'clip_{size}{patch}{ending}': f'vit_{_SIZES[size]}_patch{patch}_clip{ending}_224'
        for size, patch in (('b', 16), ('b', 32), ('l', 14))
        for ending in ('', '_quickgelu')
    },
}
# The small networks of conftest.py.
_FOUR_BLOCKS = {'embed_dim': 16, 'num_heads': 2, 'depth': 4}
SMALL = {
    'convnext4': ('convnext_tiny', {'depths': (1, 2, 1, 1), 'dims': (8, 16, 32, 64)}),
    'dinov2_4': ('vit_small_patch14_reg4_dinov2', _FOUR_BLOCKS),
    'clip4': ('vit_base_patch16_clip_quickgelu_224', _FOUR_BLOCKS),
}


def peer(name: str, num_classes: int, image_size: int) -> torch.nn.Module:
    """The same network as `config.model.name` in another project, with random weights."""
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
