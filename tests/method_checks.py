"""Compares values and gradients of a method with PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from configs import digits
from xmixup_jax.methods.base import View
from xmixup_jax.methods.find import options_of
from xmixup_jax.models import Outputs

B, K, K_0, D = 6, 4, 5, 8
LABELS = np.array([0, 1, 2, 3, 1, 1], np.int32)
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def make_view(name, **parts):
    config = digits.get_config()
    config.method = name
    parts.setdefault('batch', {'label': jnp.asarray(LABELS)})
    known = {'name': name, 'options': options_of(config), 'config': config}
    known |= {'num_classes': K, 'key': jax.random.key(0)}
    return View(**(dict.fromkeys(View._fields) | known | parts))


def outputs(logits=None, features=None, stages=(), convs=()):
    return Outputs(logits, features, tuple(stages), tuple(convs))


def on_batch_axis(function):
    """Calls `function` like the step on one device, under a mapped axis 'batch'."""

    def call(*args):
        one = jax.tree.map(lambda x: jnp.asarray(x)[None], args)
        return jax.tree.map(lambda x: x[0], jax.vmap(function, axis_name='batch')(*one))

    return call


def check(ours, theirs, *arrays):
    """Value and gradients of ours(*arrays), JAX, and theirs(*tensors), PyTorch."""
    # The gradient is taken under the axis, as in the step.
    both = jax.value_and_grad(ours, argnums=tuple(range(len(arrays))))
    value, grads = on_batch_axis(both)(*arrays)
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    expected = theirs(*tensors)
    expected.backward()
    np.testing.assert_allclose(value, expected.detach().numpy(), **CLOSE)
    for grad, tensor in zip(grads, tensors, strict=True):
        np.testing.assert_allclose(grad, tensor.grad.numpy(), **CLOSE)


def nchw(x):
    return x.permute(0, 3, 1, 2)


LABELS_T = torch.tensor(LABELS, dtype=torch.long)
