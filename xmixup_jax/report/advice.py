"""What to try next: advice that follows from a run's numbers, with the flags to set.

Each rule looks at a few numbers and names flags that may answer what they show. None promises a
gain: whether a change helps is measured by another run. A flag is left out where it is set already,
or where the configuration does not allow it; nothing is said where nothing follows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.checks import validate
from xmixup_jax.config import flatten, is_pretraining
from xmixup_jax.errors import UserError
from xmixup_jax.matching import ONE_TO_ONE
from xmixup_jax.methods.find import method_name, method_of

# Below this training accuracy more than one training image in ten is still answered wrongly.
UNDERFITTED = 0.9
# From this training accuracy on, more steps have next to nothing left to learn from the labels.
FITTED = 0.99
# The share by which the loss must fall between the last two sixths of the rows. Rows are means over
# log_every steps; smaller changes are within their noise.
FALLING = 0.1
_ROWS = 12  # at least, of metrics.csv: two in each sixth
_LAST_DROP = 0.7  # a later drop of the learning rate would explain a loss that falls
# Between training and test accuracy. Smaller gaps are common even with many images.
GAP = 0.1
# Training images a class. The study that the advice cites has 6; well beyond that it says nothing.
FEW_IMAGES = 10
# Multiple of the interquartile range below the lower quartile: Tukey's rule for outliers.
OUTLIER = 1.5
_MATCHES = 5  # at least, to call one of them an outlier
# Of the test images of two classes, taken for the other one; and how many at least, since a few
# mistakes may be chance.
CONFUSED_SHARE, CONFUSED_IMAGES = 0.1, 5
# Expected calibration error. With 15 bins and some hundred images half of this can be noise.
MISCALIBRATED = 0.1
# Largest to smallest class: the smallest imbalance that Cui et al. (CVPR 2019) study.
IMBALANCE = 10.0
# Multiples of the learning rate and of the steps: large enough to show an effect.
FASTER, LONGER = 3.0, 2
# The usual value (Szegedy et al., CVPR 2016, section 7).
SMOOTHING = 0.1
# The learning rate that the study chose for SGD with frozen statistics.
FROZEN_RATE = 0.003
_SHOWN = 5  # classes that a sentence names


class Numbers(NamedTuple):
    """What a run measured."""

    class_names: Sequence[str]
    """K names."""
    class_images: np.ndarray
    """int [K], training images of each class."""
    loss: Sequence[float] = ()
    """Training losses in the order of the steps, each a mean over log_every steps."""
    top1: Sequence[float] = ()
    """Training accuracies of the same steps, 0 to 1."""
    stopped: bool = False
    """Whether training ended before config.steps."""
    test_top1: float | None = None
    """Test accuracy, 0 to 1."""
    similarity: np.ndarray | None = None
    """float [K], of each target class with its most similar matched class."""
    confusion: np.ndarray | None = None
    """int [K, K], test images, [true, predicted]."""
    ece: float | None = None
    """Expected calibration error of the test, 0 to 1."""
    confidence: float | None = None
    """Mean largest probability of the test, 0 to 1."""


class Trial(NamedTuple):
    """One change to try."""

    words: str
    flags: str
    """A part of a command line."""


class Advice(NamedTuple):
    """A finding and the changes that may answer it."""

    title: str
    words: str
    trials: tuple[Trial, ...]


class _Finding(NamedTuple):
    title: str
    words: str
    changes: dict[str, dict[str, Any]]
    """Values by their dotted keys, by the words for the change."""
    complete: bool = False
    """Whether the words are advice without a change."""


def advice(numbers: Numbers, config: ConfigDict) -> list[Advice]:
    """What follows from the numbers of a run with this configuration.

    Args:
      numbers: of the run.
      config: of the run. One that trained a network on the source gets no advice: its values are
        not set by these flags.
    """
    if is_pretraining(config):
        return []
    found: list[Advice] = []
    named: set[str] = set()
    for rule in _RULES:
        finding = rule(numbers, config)
        if finding is None:
            continue
        trials = []
        for words, wanted in finding.changes.items():
            values = _changed(wanted, config)
            if values.keys() - named and _allowed(values, config):
                trials.append(Trial(words, _line(values)))
                named.update(values)
        if trials or finding.complete:
            found.append(Advice(finding.title, finding.words, tuple(trials)))
    return found


def _changed(values: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
    """The values that the configuration does not have yet."""
    flat = flatten(config)
    return {key: value for key, value in values.items() if flat[key] != value}


def _allowed(values: dict[str, Any], config: ConfigDict) -> bool:
    changed = config.copy_and_resolve_references()
    with changed.ignore_type():  # a stored 0 may stand for 0.0
        changed.update_from_flattened_dict(values)
    try:
        validate(changed, num_devices=1)
    except UserError:
        return False
    return True


def _line(values: dict[str, Any]) -> str:
    return ' '.join(f'--config.{key}={value}' for key, value in values.items())


def _frozen(config: ConfigDict) -> dict[str, Any]:
    """The values for pre-trained statistics of batch norm; none where a choice has been made.

    A frozen backbone uses them anyway.
    """
    if config.batch_norm != 'batch' or config.freeze == 'backbone':
        return {}
    rate: dict[str, Any] = {}
    if config.optimizer.name == 'sgd' and config.optimizer.learning_rate > FROZEN_RATE:
        rate = {'optimizer.learning_rate': FROZEN_RATE}
    return {'batch_norm': 'frozen'} | rate


def _sixths(values: Sequence[float]) -> tuple[float, float]:
    """The means of the last sixth of the values and of the one before."""
    size = max(1, len(values) // 6)
    before = values[-2 * size : -size] or values
    return float(np.mean(values[-size:])), float(np.mean(before))


def _few_images(numbers: Numbers, config: ConfigDict) -> _Finding | None:
    median = float(np.median(numbers.class_images))
    # The study began with a network trained on ImageNet. With one trained on a small source the
    # same flags lost (configs/digits.py, one seed, commit 0e833e7: 93.65 % against 94.56 %).
    if median > FEW_IMAGES or config.weights in ('', 'source') or not _frozen(config):
        return None
    return _Finding(
        'Few images for batch statistics',
        f'Half of the classes have {median:g} training images or fewer, and batch norm uses the '
        'statistics of each batch. In this project’s study (one network, three sets of '
        'photographs, 6 images a class; docs/explanation/results.md), pre-trained statistics with '
        'a head from a linear classifier and a lower learning rate were 8.1 ± 0.8 points above '
        'that. Your data may behave differently.',
        {'Keep the pre-trained statistics': _frozen(config) | {'warm_head': True}},
    )


def _underfitted(numbers: Numbers, config: ConfigDict) -> _Finding | None:
    if not numbers.top1:
        return None
    top1, _ = _sixths(numbers.top1)
    # Mixed images are hard to tell by design: a low accuracy on them means little.
    low = top1 < UNDERFITTED and not method_of(config).changes_images
    falling = top1 < FITTED and _falling(numbers, config)
    if not low and not falling:
        return None
    words = f'The training accuracy ends at {100 * top1:.1f} %'
    if falling:
        last, before = _sixths(numbers.loss)
        words += f', and the loss was still falling at the end (from {before:.3g} to {last:.3g})'
    faster = float(f'{FASTER * config.optimizer.learning_rate:.2g}')
    changes: dict[str, dict[str, Any]] = {
        'Raise the learning rate': {'optimizer.learning_rate': faster}
    }
    if not numbers.stopped:
        changes = {'Train longer': {'steps': LONGER * config.steps}} | changes
    return _Finding('Under-fitted', f'{words}.', changes)


def _falling(numbers: Numbers, config: ConfigDict) -> bool:
    optimizer = config.optimizer
    dropped_late = optimizer.schedule == 'step' and optimizer.drop_at > _LAST_DROP
    if len(numbers.loss) < _ROWS or dropped_late:
        return False
    last, before = _sixths(numbers.loss)
    return before - last > FALLING * abs(before)


def _overfitted(numbers: Numbers, config: ConfigDict) -> _Finding | None:
    if not numbers.top1 or numbers.test_top1 is None:
        return None
    top1, _ = _sixths(numbers.top1)
    if top1 < FITTED or top1 - numbers.test_top1 < GAP:
        return None
    changes: dict[str, dict[str, Any]] = {
        'Begin the head as a linear classifier': {'warm_head': True},
        'Keep the pre-trained statistics': _frozen(config),
    }
    if not config.freeze:
        changes['Freeze the first stages'] = {'freeze': '2'}
    if not config.augment.policy:
        changes['Vary the images more'] = {'augment.policy': 'trivialaugment'}
    return _Finding(
        'Over-fitted',
        f'The training accuracy ends at {100 * top1:.1f} %, '
        f'{100 * (top1 - numbers.test_top1):.1f} points above the test. Try one change at a time.',
        changes,
    )


def _far_match(numbers: Numbers, config: ConfigDict) -> _Finding | None:
    similarity, assignment = numbers.similarity, config.match.assignment
    if method_name(config.method) != 'xmixup' or similarity is None or len(similarity) < _MATCHES:
        return None
    if assignment in ('random', 'least'):  # far on purpose
        return None
    quartile, median, upper = np.percentile(similarity, (25, 50, 75))
    far = np.flatnonzero(similarity < quartile - OUTLIER * (upper - quartile))
    if not len(far):
        return None
    far = far[np.argsort(similarity[far], kind='stable')]
    names = [f'{numbers.class_names[c]} ({similarity[c]:.3f})' for c in map(int, far)]
    share = {'Let target classes share a source class': {'match.assignment': 'nearest'}}
    return _Finding(
        'Far class match',
        f'The source classes matched with {_listed(names)} are far less similar than the others '
        f'(median {median:.3f}). Look at their pictures under “Class match”: the source may have '
        'nothing like these classes.',
        share if assignment in ONE_TO_ONE else {},
        complete=True,
    )


def _confused_pair(numbers: Numbers, config: ConfigDict) -> _Finding | None:
    del config
    if numbers.confusion is None:
        return None
    wrong = numbers.confusion + numbers.confusion.T
    np.fill_diagonal(wrong, 0)
    a, b = divmod(int(wrong.argmax()), len(wrong))
    count, images = int(wrong[a, b]), int(numbers.confusion[[a, b]].sum())
    if count < CONFUSED_IMAGES or count < CONFUSED_SHARE * images:
        return None
    one, other = (numbers.class_names[c] for c in (a, b))
    training = ' and '.join(
        f'{numbers.class_images[c]} of “{numbers.class_names[c]}”' for c in (a, b)
    )
    return _Finding(
        'Two classes confused',
        f'Of the {images} test images of “{one}” and “{other}”, {count} are taken for the other '
        f'class. Check the labels of both, or add training images (now {training}).',
        {},
        complete=True,
    )


def _miscalibrated(numbers: Numbers, config: ConfigDict) -> _Finding | None:
    if numbers.ece is None or numbers.ece < MISCALIBRATED:
        return None
    assert numbers.confidence is not None and numbers.test_top1 is not None  # of the same test
    over = numbers.confidence > numbers.test_top1
    changes: dict[str, dict[str, Any]] = {}
    if over and not config.label_smoothing:
        changes = {'Smooth the labels': {'label_smoothing': SMOOTHING}}
    elif not over and config.label_smoothing:
        changes = {'Do not smooth the labels': {'label_smoothing': 0.0}}
    return _Finding(
        'Overconfident' if over else 'Underconfident',
        f'The mean confidence is {100 * numbers.confidence:.1f} %, the accuracy '
        f'{100 * numbers.test_top1:.1f} %, the expected calibration error '
        f'{100 * numbers.ece:.1f} %. Where probabilities matter, divide the logits by a '
        f'temperature {"above" if over else "below"} 1, chosen on images that are neither in the '
        'training nor in the test set.',
        changes,
        complete=True,
    )


def _imbalanced(numbers: Numbers, config: ConfigDict) -> _Finding | None:
    counts = numbers.class_images[numbers.class_images > 0]
    balance = config.balance
    chosen = balance.sampling != 'natural' or balance.weights != 'none'
    if chosen or not len(counts) or counts.max() < IMBALANCE * counts.min():
        return None
    return _Finding(
        'Imbalanced classes',
        f'The largest class has {counts.max()} training images, the smallest {counts.min()}. If '
        'all classes matter alike, compare macro top-1.',
        {
            'Draw each class equally often': {'balance.sampling': 'balanced'},
            'Weigh the classes in the loss': {'balance.weights': 'effective'},
        },
    )


def _listed(names: list[str]) -> str:
    shown = ', '.join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f'{shown} and {len(names) - _SHOWN} more'


_RULES = (
    _few_images,
    _underfitted,
    _overfitted,
    _far_match,
    _confused_pair,
    _miscalibrated,
    _imbalanced,
)
