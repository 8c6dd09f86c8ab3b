"""Plain fine-tuning of every layer from pre-trained weights (Donahue et al., DeCAF, ICML 2014)."""

import optax

from xmixup_jax.methods.base import Method


def num_logits(config, num_classes, num_source_classes):
    del config, num_source_classes
    return num_classes


def transform(config, keys, batch):
    del config, keys
    return batch


def loss(config, num_classes, outputs, batch):
    """Mean cross-entropy of the target's label; weight decay is the optimiser's."""
    del config, num_classes
    return optax.softmax_cross_entropy_with_integer_labels(outputs.logits, batch['label']).mean()


METHOD = Method(uses_source=False, num_logits=num_logits, transform=transform, loss=loss)
