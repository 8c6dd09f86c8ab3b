"""Advice: each rule on both sides of its threshold; each flag is one of the program's."""

import re
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import digits
from xmixup_jax.checks import validate
from xmixup_jax.cli.flags import parse_flags
from xmixup_jax.config import flatten, from_stored, pretrain_config
from xmixup_jax.report import advice as rules
from xmixup_jax.report.advice import Numbers, advice

K, EPS = 8, 1e-6
NAMES = list('abcdefgh')
PROMISES = re.compile(r'\b(will|would|guarantee\w*|improve\w*|gains?|better|best)\b')


def experiment(**changes):
    config = digits.get_config()
    config.weights = 'imagenet.safetensors'
    config.update_from_flattened_dict(changes)
    return config


def numbers(**changes):
    """Numbers from which nothing follows, with some changes."""
    plain = Numbers(
        class_names=NAMES,
        class_images=np.full(K, 50),
        loss=[1.0] * 12,
        top1=[0.95] * 12,
        test_top1=0.9,
        similarity=np.linspace(0.5, 0.6, K),
        confusion=50 * np.eye(K, dtype=int),
        ece=0.02,
        confidence=0.92,
    )
    return plain._replace(**changes)


def titles(found):
    return [each.title for each in found]


def flags(found):
    return [trial.flags for each in found for trial in each.trials]


@cache
def parsed(line):
    config, _ = parse_flags(['xmixup', '--config=digits', *line.split()])
    validate(config, num_devices=1)
    return config


def check(found):
    """Each flag is known and valid, none is set already or named twice, nothing is promised."""
    before, seen = flatten(digits.get_config()), []
    for each in found:
        assert not PROMISES.search(each.words), each.words
        for trial in each.trials:
            after = flatten(parsed(trial.flags))
            keys = [
                flag.partition('=')[0].removeprefix('--config.') for flag in trial.flags.split()
            ]
            assert {key for key in after if after[key] != before[key]} == set(keys)
            assert not set(keys) <= set(seen)
            seen += keys


def test_nothing_follows_from_good_numbers():
    for method in ('xmixup', 'finetune'):
        assert advice(numbers(), experiment(method=method)) == []
    assert advice(Numbers(NAMES, np.full(K, 50)), experiment()) == []


@pytest.mark.parametrize('images, said', [(10, True), (10.5, False), (11, False)])
def test_few_images(images, said):
    counts = np.array([int(images - 0.5), int(images + 0.5)]).repeat(K // 2)
    counts = np.full(K, images) if images == int(images) else counts
    assert np.median(counts) == images
    found = advice(numbers(class_images=counts), experiment())
    assert titles(found) == ['Few images for batch statistics'] * said
    if said:
        check(found)
        (line,) = flags(found)
        config = parsed(line)
        assert (config.batch_norm, config.warm_head) == ('frozen', True)
        assert config.optimizer.learning_rate == 0.003
        assert '8.1 ± 0.8' in found[0].words and 'docs/explanation/results.md' in found[0].words


def test_few_images_where_the_flags_are_set_or_impossible():
    few = numbers(class_images=np.full(K, 5))
    assert advice(few, experiment(weights='source')) == []  # measured on digits: it lost
    for changes in (
        {'batch_norm': 'frozen'},
        {'batch_norm': 'mixed'},
        {'method': 'finetune', 'freeze': 'backbone'},  # a frozen backbone has them
        {'weights': ''},  # without pre-trained weights there are no statistics to keep
        {'method': 'stochnorm'},  # has a batch norm of its own
    ):
        assert advice(few, experiment(**changes)) == []
    (line,) = flags(advice(few, experiment(warm_head=True, **{'optimizer.learning_rate': 0.001})))
    assert line == '--config.batch_norm=frozen'
    without = experiment(image_size=16, resize=16)
    without.model.update({'name': 'vit_tiny_patch16_224', 'width': 64, 'stem': 'imagenet'})
    assert advice(few, without) == []


@pytest.mark.parametrize(
    'changes, method, said',
    [
        ({'top1': [rules.UNDERFITTED - EPS] * 12}, 'finetune', True),
        ({'top1': [rules.UNDERFITTED] * 12}, 'finetune', False),
        ({'top1': [0.5] * 12}, 'xmixup', False),  # mixed images
        ({'top1': [0.1] * 10 + [0.95] * 2}, 'finetune', False),  # the end counts
        ({'loss': [1.0] * 10 + [1 - rules.FALLING - EPS] * 2}, 'xmixup', True),
        ({'loss': [1.0] * 10 + [1 - rules.FALLING + EPS] * 2}, 'xmixup', False),
        ({'loss': [1.0] * 9 + [0.5] * 2}, 'xmixup', False),  # too few rows
        ({'loss': [-1.0] * 10 + [-0.95] * 2}, 'xmixup', False),  # of a method of one's own
        ({'loss': [1.0] * 10 + [0.5] * 2, 'top1': [rules.FITTED] * 12}, 'xmixup', False),
        ({'loss': [1.0] * 10 + [0.5] * 2, 'top1': [rules.FITTED - EPS] * 12}, 'xmixup', True),
    ],
)
def test_underfitted(changes, method, said):
    found = advice(numbers(**changes), experiment(method=method))
    assert titles(found) == ['Under-fitted'] * said
    if said:
        check(found)
        assert flags(found) == ['--config.steps=1200', '--config.optimizer.learning_rate=0.06']
    stopped = advice(numbers(**changes, stopped=True), experiment(method=method))
    assert flags(stopped) == ['--config.optimizer.learning_rate=0.06'] * said


@pytest.mark.parametrize('drop_at, said', [(0.7, True), (0.71, False)])
def test_a_late_drop_of_the_rate_explains_a_loss_that_falls(drop_at, said):
    config = experiment(**{'optimizer.drop_at': drop_at})
    assert bool(advice(numbers(loss=[1.0] * 10 + [0.5] * 2), config)) == said


@pytest.mark.parametrize(
    'top1, gap, said',
    [
        (rules.FITTED, rules.GAP + EPS, True),
        (rules.FITTED, rules.GAP - EPS, False),
        (rules.FITTED - EPS, 0.4, False),
    ],
)
def test_overfitted(top1, gap, said):
    over = numbers(top1=[top1] * 12, test_top1=top1 - gap, confidence=top1 - gap)
    found = advice(over, experiment())
    assert titles(found) == ['Over-fitted'] * said
    if said:
        check(found)
        assert flags(found) == [
            '--config.warm_head=True',
            '--config.batch_norm=frozen --config.optimizer.learning_rate=0.003',
            '--config.freeze=2',
            '--config.augment.policy=trivialaugment',
        ]
        assert 'points above the test' in found[0].words


def test_overfitted_without_what_is_set():
    over = numbers(top1=[1.0] * 12, test_top1=0.5, confidence=0.5)
    kept = {'warm_head': True, 'batch_norm': 'frozen', 'freeze': '1'}
    (found,) = advice(over, experiment(**kept))
    assert flags([found]) == ['--config.augment.policy=trivialaugment']
    assert advice(over, experiment(**kept, **{'augment.policy': 'randaugment'})) == []
    assert flags(advice(over, experiment(weights=''))) == ['--config.augment.policy=trivialaugment']
    # What another point has named is not named again.
    both = advice(over._replace(class_images=np.full(K, 5)), experiment())
    assert titles(both) == ['Few images for batch statistics', 'Over-fitted']
    assert flags(both[1:]) == ['--config.freeze=2', '--config.augment.policy=trivialaugment']
    check(both)
    # Nor is a higher rate beside a lower one.
    both = advice(
        numbers(class_images=np.full(K, 5), top1=[0.5] * 12), experiment(method='finetune')
    )
    assert flags(both[1:]) == ['--config.steps=1200']


def far_similarity(distance):
    """One class so many interquartile ranges below the lower quartile."""
    similarity = np.array([0.0, 0.5, 0.5, 0.5, 0.6, 0.6, 0.6, 0.6])
    low, high = np.percentile(similarity, (25, 75))
    similarity[0] = low - distance * (high - low)
    assert tuple(np.percentile(similarity, (25, 75))) == (low, high)
    return similarity


@pytest.mark.parametrize('sign', [1, -1])
def test_far_match(sign):
    distance = rules.OUTLIER + sign * EPS
    found = advice(numbers(similarity=far_similarity(distance)), experiment())
    assert titles(found) == ['Far class match'] * (sign > 0)
    if found:
        check(found)
        assert flags(found) == ['--config.match.assignment=nearest']
        assert 'a (0.350)' in found[0].words and 'b (' not in found[0].words
    far = numbers(similarity=far_similarity(5))
    for changes in (
        {'method': 'cotrain'},
        {'match.assignment': 'random'},
        {'match.assignment': 'least'},
    ):
        assert advice(far, experiment(**changes)) == []
    (found,) = advice(far, experiment(**{'match.assignment': 'nearest'}))
    assert found.trials == ()
    assert advice(numbers(similarity=np.array([0.0, 0.5, 0.5, 0.5])), experiment()) == []


@pytest.mark.parametrize(
    'count, images, said',
    [(10, 100, True), (9, 100, False), (5, 20, True), (4, 20, False)],
)
def test_confused_pair(count, images, said):
    confusion = 50 * np.eye(K, dtype=int)
    confusion[[1, 3], [1, 3]] = images // 2, images // 2 - count
    confusion[1, 3], confusion[3, 1] = 0, count
    confusion[1, 1] -= 1
    confusion[1, 5] = 1
    found = advice(numbers(confusion=confusion), experiment())
    assert titles(found) == ['Two classes confused'] * said
    if said:
        assert found[0].trials == ()
        words = f'Of the {images} test images of “b” and “d”, {count} are taken for the other class'
        assert words in found[0].words and 'now 50 of “b” and 50 of “d”' in found[0].words


@pytest.mark.parametrize('ece', [rules.MISCALIBRATED, rules.MISCALIBRATED - EPS])
@pytest.mark.parametrize('over', [True, False])
def test_calibration(ece, over):
    bad = numbers(ece=ece, confidence=0.99 if over else 0.7)
    said = ece >= rules.MISCALIBRATED
    found = advice(bad, experiment())
    assert titles(found) == ['Overconfident' if over else 'Underconfident'] * said
    assert flags(found) == ['--config.label_smoothing=0.1'] * (said and over)
    smoothed = advice(bad, experiment(label_smoothing=0.2))
    if said:
        check(found)
        assert f'temperature {"above" if over else "below"} 1' in found[0].words
        assert flags(smoothed) == ([] if over else ['--config.label_smoothing=0.0'])
        # A linear probe takes no smoothed labels.
        probe = experiment(method='finetune', freeze='backbone')
        assert flags(advice(bad, probe)) == []


@pytest.mark.parametrize('largest, said', [(200, True), (199, False)])
def test_imbalance(largest, said):
    counts = np.array([20, largest, *[50] * (K - 2)])
    found = advice(numbers(class_images=counts), experiment())
    assert titles(found) == ['Imbalanced classes'] * said
    if said:
        check(found)
        assert flags(found) == [
            '--config.balance.sampling=balanced',
            '--config.balance.weights=effective',
        ]
        for changes in ({'balance.sampling': 'balanced'}, {'balance.weights': 'inverse'}):
            assert advice(numbers(class_images=counts), experiment(**changes)) == []


def test_a_network_trained_on_the_source_gets_no_advice():
    """Its values are those of config.pretrain."""
    config = pretrain_config(experiment())
    assert advice(numbers(class_images=np.full(K, 1), top1=[0.1] * 12), config) == []


def test_a_stored_configuration_gives_the_same_advice():
    few = numbers(class_images=np.full(K, 5), ece=0.3, confidence=0.99)
    stored = from_stored(experiment().to_dict())
    assert advice(few, stored) == advice(few, experiment()) != []


share = st.floats(0, 1)


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(0, 300), min_size=K, max_size=K).filter(any),
    top1=st.lists(share, max_size=14),
    loss=st.floats(0.01, 2),
    test=share,
    ece=share,
    similarity=st.lists(st.floats(-1, 1), min_size=K, max_size=K),
    confusion=st.lists(st.integers(0, 9), min_size=K * K, max_size=K * K),
    method=st.sampled_from(['xmixup', 'finetune', 'stochnorm']),
)
def test_any_numbers(counts, top1, loss, test, ece, similarity, confusion, method):
    measured = numbers(
        class_images=np.array(counts),
        top1=top1,
        loss=[1.0] * (len(top1) - 2) + [loss] * 2,
        test_top1=test,
        ece=ece,
        similarity=np.array(similarity),
        confusion=np.array(confusion).reshape(K, K),
    )
    for line in flags(advice(measured, experiment(method=method))):
        parsed(f'--config.method={method} {line}')
