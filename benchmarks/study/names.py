"""The names under which the study compares: a method, and the options that belong to the name."""

from typing import Any, NamedTuple

from benchmarks.tune import GRIDS

Changes = dict[str, Any]
"""Of a configuration, by dotted key."""

PROBE = 'probe'
BATCH_NORMS = ('batch', 'frozen')


class Name(NamedTuple):
    """What is run under a name."""

    changes: Changes
    coefficient: tuple[str, tuple] | None = None
    """The method's main coefficient and the values to choose from, the published one first."""
    tuned_as: str = ''
    """Takes the learning rate, batch norm and coefficient that this other name chose: an
    ablation changes one thing."""
    batch_norms: tuple[str, ...] = BATCH_NORMS
    """To choose from. An ablation that has but one compares with the other name's runs with it."""


def _xmixup(tuned_as: str = '', batch_norms: tuple[str, ...] = BATCH_NORMS, **options) -> Name:
    """XMixup, with options under the last part of their keys."""
    keys = {'warm_head': 'warm_head', 'reestimate': 'reestimate'}
    keys |= {key: f'match.{key}' for key in ('assignment', 'similarity', 'classes_per_target')}
    keys |= {key: f'xmixup.{key}' for key in ('alpha', 'source_head')}
    keys |= {'clip_norm': 'optimizer.clip_norm'}
    base = {'method': 'xmixup', 'xmixup.alpha': 0.2, 'xmixup.source_head': 'random'}
    changes = base | {keys[key]: value for key, value in options.items()}
    return Name(changes, tuned_as=tuned_as, batch_norms=batch_norms)


def _method(method: str, values: tuple = (), **others) -> Name:
    """A method with its coefficient of `benchmarks.tune`, and other values than there."""
    key, usual = GRIDS[method]
    changes = {'method': method} | others.pop('changes', {})
    return Name(changes, (key, values or usual), **others)


NAMES = {
    # Logistic regression on frozen features: `probe.py`. Not tuned.
    PROBE: Name({'method': 'finetune', 'batch_norm': 'frozen'}),
    'finetune': Name({'method': 'finetune'}),
    'xmixup': _xmixup(),
    'finetune_warm': Name({'method': 'finetune', 'warm_head': True}),
    'xmixup_warm': _xmixup(warm_head=True),
    'xmixup_alpha1': _xmixup(alpha=1.0),
    'mixup': _method('mixup'),
    # The source has no test split to fit the temperature to.
    'cotuning': _method('cotuning', changes={'cotuning.temperature': 1.0}),
    'bituning': _method('bituning'),
    # The published 0.01 is for ResNets, whose maps are smaller: here every run with it diverged or
    # stayed at chance (delta_alpha_0.01.csv).
    'delta': _method('delta', (0.0001, 0.00001, 0.001)),
    'bss': _method('bss'),
    'mars': _method('mars'),
    'l2sp': _method('l2sp'),
    'xmixup_source': _xmixup('xmixup', source_head='pretrained'),
    'xmixup_warm_source': _xmixup('xmixup_warm', warm_head=True, source_head='pretrained'),
    # The first gradients through the pre-trained columns are large.
    'xmixup_warm_source_clipped': _xmixup(
        'xmixup_warm', warm_head=True, source_head='pretrained', clip_norm=1.0
    ),
    # Other choices of batch norm have nothing to re-estimate, or need to.
    'xmixup_raw': _xmixup('xmixup', ('batch',), reestimate=0),
    'xmixup_random': _xmixup('xmixup', assignment='random'),
    'xmixup_least': _xmixup('xmixup', assignment='least'),
    'xmixup_predicted': _xmixup('xmixup', similarity='predicted'),
    'cotrain': _method('cotrain'),
    'seqtrain': _method('seqtrain', (0, 100, 1200)),  # 0: as many as on the target
    'stochnorm': _method('stochnorm', batch_norms=('batch',)),
    'lwf': _method('lwf'),
    'smile': _method('smile'),
    'rifle': _method('rifle'),
    'fsp': _method('fsp'),
    'dtnh': _method('dtnh'),
    'mmd': _method('mmd'),
    'cutmix': _method('cutmix'),
}
"""In order of priority: a study that is cut off has the first ones."""

NORM_NAMES = (
    *('finetune', 'xmixup', 'finetune_warm', 'xmixup_warm'),
    *('cotuning', 'bituning', 'delta', 'bss', 'mars', 'l2sp'),
)
"""Each choice of batch norm is run with these."""

RATE_NAMES = ('finetune', 'xmixup')
"""These are run at each learning rate with frozen statistics."""

COMPARED = {
    'xmixup_alpha1': 'xmixup',
    'xmixup_source': 'xmixup',
    'xmixup_warm': 'finetune_warm',
    'xmixup_warm_source': 'xmixup_warm',
    'xmixup_warm_source_clipped': 'xmixup_warm',
    'xmixup_raw': 'xmixup',
    'xmixup_random': 'xmixup',
    'xmixup_least': 'xmixup',
    'xmixup_predicted': 'xmixup',
}
"""Variants of XMixup, and what each is compared with."""

STARTS = (
    (('finetune', 'batch'), (PROBE, 'frozen')),
    (('finetune', 'frozen'), ('finetune', 'batch')),
    (('finetune_warm', 'frozen'), ('finetune', 'batch')),
    (('finetune_warm', 'frozen'), (PROBE, 'frozen')),
    (('finetune_warm', 'frozen'), ('mars', 'batch')),
)
"""Pairs of (name, batch norm): what the choice of statistics and head is worth without mixing."""

CONTROLS = {
    'cotuning': 'CUB-200, 15 %: +6.4',
    'bituning': 'CUB-200, 15 %: +4.6',
    'delta': 'CUB-200, 15 %: +3.6',
    'stochnorm': 'CUB-200, 15 %: +3.6',
    'lwf': 'CUB-200, 15 %: +5.5',
    'bss': 'CUB-200, 15 %: +2.2',
    'mars': 'DTD, all images: +7.3',
    'l2sp': 'DTD, all images: +3.3',
}
"""Known winners, and their published gain over fine-tuning in points (ResNet-50). CUB-200-2011 with
15 % of the images: README of TLlib; DTD: README of PaddleTransfer, the paper's own laboratory."""

_THREE = {'match.classes_per_target': 3, 'match.assignment': 'nearest'}
_SOURCE_HEAD = {'xmixup.source_head': 'pretrained', 'optimizer.clip_norm': 1.0}
COMBINATIONS: dict[str, dict[str, Changes]] = {
    'finetune_warm': {'as tuned': {}},
    'xmixup_warm': {
        'as tuned': {},
        'alpha 1': {'xmixup.alpha': 1.0},
        'source head, clipped': _SOURCE_HEAD,
        'alpha 1, source head, clipped': {'xmixup.alpha': 1.0} | _SOURCE_HEAD,
        '3 classes': _THREE,
        '3 classes, alpha 1, source head, clipped': {'xmixup.alpha': 1.0} | _THREE | _SOURCE_HEAD,
        'label of the target alone': {'xmixup.label_space': 'target'},
        'two heads': {'xmixup.label_space': 'separate'},
    },
}
"""What might be the best network with few images: changes of a name with frozen statistics, at its
best learning rate with these."""
