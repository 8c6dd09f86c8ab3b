"""The losses, penalties and gradients of the methods, as plain functions on arrays.

Use them in your own training loop. Each is what a module of `xmixup_jax.methods` trains with, which
also documents it.
"""

from xmixup_jax.methods.bituning import contrast
from xmixup_jax.methods.bss import batch_spectral_shrinkage
from xmixup_jax.methods.cotuning import fit_temperature, relationship
from xmixup_jax.methods.cutmix import box_mask
from xmixup_jax.methods.delta import map_distance
from xmixup_jax.methods.dtnh import combine_gradients
from xmixup_jax.methods.fsp import flow_distance
from xmixup_jax.methods.l2sp import distance_to_start, head_norm
from xmixup_jax.methods.lwf import distillation
from xmixup_jax.methods.mars import mars_projection
from xmixup_jax.methods.mmd import maximum_mean_discrepancy
from xmixup_jax.mixing import mixed_cross_entropy, two_label_cross_entropy

__all__ = (
    'batch_spectral_shrinkage',
    'box_mask',
    'combine_gradients',
    'contrast',
    'distance_to_start',
    'distillation',
    'fit_temperature',
    'flow_distance',
    'head_norm',
    'map_distance',
    'mars_projection',
    'maximum_mean_discrepancy',
    'mixed_cross_entropy',
    'relationship',
    'two_label_cross_entropy',
)
