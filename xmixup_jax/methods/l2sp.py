"""L2-SP: the starting point as the centre of weight decay.

Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional
Networks", ICML 2018:

    penalty = alpha / 2 * ||w - w0||^2 + beta / 2 * ||w_head||^2

over the backbone's and the head's parameters; it replaces weight decay.
"""

import optax

from xmixup_jax.methods.base import Method, View, reference, without_weight_decay
from xmixup_jax.optimizer import HEAD


def distance_to_start(params, start):
    """||w - w0||^2 over all parameters but the head's, params['fc'].

    >>> import numpy as np
    >>> start = {'conv': {'kernel': np.zeros(3)}, 'fc': {'kernel': np.zeros(2)}}
    >>> params = {'conv': {'kernel': np.ones(3)}, 'fc': {'kernel': np.ones(2)}}
    >>> float(distance_to_start(params, start)), float(head_norm(params))
    (3.0, 2.0)
    """

    def backbone(tree):
        return {name: leaf for name, leaf in tree.items() if name != HEAD}

    difference = optax.tree.sub(backbone(params), backbone(start))
    return optax.tree.norm(difference, squared=True)


def head_norm(params):
    """||w_head||^2."""
    return optax.tree.norm(params[HEAD], squared=True)


def penalty(view: View, config):
    """With the coefficients `alpha` and `beta` of `config`."""
    backbone = distance_to_start(view.params, view.constants['params'])
    return config.alpha / 2 * backbone + config.beta / 2 * head_norm(view.params)


METHOD = Method(
    penalty=lambda view: penalty(view, view.config.l2sp),
    defaults={'alpha': 0.01, 'beta': 0.01},
    prepare=reference,
    optimizer=without_weight_decay,
)
