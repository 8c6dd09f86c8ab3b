"""XMixup in JAX: transfer learning with auxiliary samples by cross-domain mixup."""

import importlib

__version__ = '0.1.0'

# The public names and their modules, which are imported on first use.
_HOMES = {
    'Data': 'data.selection',
    'Records': 'data.records',
    'cross_domain_mixup': 'mixing',
    'load': 'predictor',
    'load_weights': 'weights.pretrained',
    'losses': '',
    'match_classes': 'matching',
    'mixed_cross_entropy': 'mixing',
    'pair_records': 'data.pairing',
}
__all__ = tuple(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    if not _HOMES[name]:
        return importlib.import_module(f'{__name__}.{name}')
    return getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)


def __dir__() -> list[str]:
    return sorted([*__all__, '__version__'])
