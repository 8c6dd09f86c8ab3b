"""The transfer-learning methods, one file each, all behind `Method`."""

from xmixup_jax.methods import finetune, xmixup
from xmixup_jax.methods.base import Method

METHODS: dict[str, Method] = {
    'finetune': finetune.METHOD,
    'xmixup': xmixup.METHOD,
}
