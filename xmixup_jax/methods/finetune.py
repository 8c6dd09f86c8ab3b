"""Trains every layer from pre-trained weights.

Donahue, Jia, Vinyals, Hoffman, Zhang, Tzeng, Darrell, "DeCAF: A Deep Convolutional Activation
Feature for Generic Visual Recognition", ICML 2014, https://arxiv.org/abs/1310.1531.

The loss is the mean cross-entropy of the target's label. Weight decay is the optimiser's.
"""

from xmixup_jax.methods.base import Method

METHOD = Method()
