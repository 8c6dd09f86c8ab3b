"""The transfer-learning methods, one file each, all behind `Method`."""

from xmixup_jax.methods import (
    bituning,
    bss,
    cotrain,
    cotuning,
    cutmix,
    delta,
    dtnh,
    finetune,
    fsp,
    l2sp,
    lwf,
    mixup,
    rifle,
    seqtrain,
    smile,
    stochnorm,
    xmixup,
)
from xmixup_jax.methods.base import Method

METHODS: dict[str, Method] = {
    'finetune': finetune.METHOD,
    'l2sp': l2sp.METHOD,
    'delta': delta.METHOD,
    'fsp': fsp.METHOD,
    'bss': bss.METHOD,
    'dtnh': dtnh.METHOD,
    'seqtrain': seqtrain.METHOD,
    'cotrain': cotrain.METHOD,
    'xmixup': xmixup.METHOD,
    'mixup': mixup.METHOD,
    'cutmix': cutmix.METHOD,
    'lwf': lwf.METHOD,
    'stochnorm': stochnorm.METHOD,
    'cotuning': cotuning.METHOD,
    'bituning': bituning.METHOD,
    'rifle': rifle.METHOD,
    'smile': smile.METHOD,
}
