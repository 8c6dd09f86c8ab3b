"""Plain fine-tuning of every layer from pre-trained weights (Donahue et al., DeCAF, ICML 2014).

The loss is the mean cross-entropy of the target's label; weight decay is the optimiser's.
"""

from xmixup_jax.methods.base import Method

METHOD = Method()
