"""Pulls the weights towards their pre-trained values, in the place of weight decay.

Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional
Networks" (L2-SP), ICML 2018, https://arxiv.org/abs/1802.01483:

    penalty = alpha / 2 * ||w - w0||^2 + beta / 2 * ||w_head||^2

In the authors' code (holyseven/TransferLearningClassification, mode 1) w are the kernels alone,
without biases and without the scales and shifts of batch norm. `all_parameters` = True penalises
all parameters, as TLlib and the code of DELTA's authors do.
"""

import jax
import optax

from xmixup_jax.methods.base import Method, View
from xmixup_jax.methods.options import flag, non_negative
from xmixup_jax.methods.parts import reference, without_weight_decay
from xmixup_jax.optimizer import HEAD


def _regularized(tree, all_parameters):
    """The leaves that are penalised, by their path."""
    leaves = jax.tree.leaves_with_path(tree)
    return [leaf for path, leaf in leaves if all_parameters or path[-1].key == 'kernel']


def distance_to_start(params, start, all_parameters=False):
    """||w - w0||^2 over the kernels, or all parameters, without the head params['fc'].

    >>> import numpy as np
    >>> start = {'conv': {'kernel': np.zeros(3)}, 'fc': {'kernel': np.zeros(2)}}
    >>> params = {'conv': {'kernel': np.ones(3)}, 'fc': {'kernel': np.ones(2)}}
    >>> float(distance_to_start(params, start)), float(head_norm(params))
    (3.0, 2.0)
    """
    now, then = (
        _regularized({name: leaf for name, leaf in tree.items() if name != HEAD}, all_parameters)
        for tree in (params, start)
    )
    return optax.tree.norm(optax.tree.sub(now, then), squared=True)


def head_norm(params, all_parameters=False):
    """||w_head||^2 of the kernel, or of kernel and bias."""
    return optax.tree.norm(_regularized(params[HEAD], all_parameters), squared=True)


def penalty(view: View):
    options = view.options
    every = options.all_parameters
    backbone = distance_to_start(view.params, view.constants['params'], every)
    return options.alpha / 2 * backbone + options.beta / 2 * head_norm(view.params, every)


METHOD = Method(
    penalty=penalty,
    options={
        'alpha': non_negative(
            0.01, "weight of the backbone's distance from its start", traced=True
        ),
        'beta': non_negative(0.01, 'weight decay of the head', traced=True),
        'all_parameters': flag(False, 'penalise biases, scales and shifts too'),
    },
    prepare=reference,
    optimizer=without_weight_decay,
    needs_backbone=True,
)
