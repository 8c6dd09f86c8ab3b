"""XMixup in JAX: transfer learning with auxiliary samples by cross-domain mixup."""

__version__ = '0.1.0'
