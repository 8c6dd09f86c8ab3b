"""Class matching by the pre-trained head, and columns of the head for the source classes."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.special
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression

from xmixup_jax.checks import validate
from xmixup_jax.compute import step as step_lib
from xmixup_jax.compute.features import backbone_classifier, images_of
from xmixup_jax.data.names import imagenet_ids, readable
from xmixup_jax.data.selection import Data, train_and_test
from xmixup_jax.errors import ConfigError, DataError
from xmixup_jax.methods import cotuning
from xmixup_jax.methods.base import Sizes
from xmixup_jax.models import forward
from xmixup_jax.run.start import find_match
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.weights.files import save_weights
from xmixup_jax.weights.pretrained import Weights


def weights_of(config, path, classes, names=None):
    """Weights whose head has `classes` columns, with `names` for them if the file has names."""
    config.method = 'finetune'
    _, state = step_lib.create_task(config, Sizes(classes))
    head = {'kernel': 5 * state.params['fc']['kernel'], 'bias': state.params['fc']['bias']}
    metadata = {} if names is None else {'class_names': names}
    params = state.params | {'fc': head}
    save_weights(path, config.model.name, params, state.batch_stats, metadata)
    return Weights(path, config.model.name)


def test_similarity_is_the_mean_probability_and_no_image_of_the_source_is_read(
    config, records, tmp_path
):
    target, _, source = records
    names = source.class_names[::-1]  # the head's columns are in another order
    backbone = weights_of(config, tmp_path / 'w.safetensors', 10, names)
    config.match.similarity, config.match.assignment = 'predicted', 'nearest'

    def unreadable(number):
        raise AssertionError(f'record {number} was read')

    source = replace(source, read=unreadable)
    match = find_match(config, backbone, Data(target, None, source))

    task, state = step_lib.create_task(config, Sizes(10))
    params, batch_stats = backbone.fill(state.params, state.batch_stats, with_head=True)
    images, labels = images_of(config, target)
    outputs, _ = forward(task.graphdef, params, batch_stats, images, train=False)
    probabilities = scipy.special.softmax(np.asarray(outputs.logits, np.float64), axis=1)[:, ::-1]
    expected = np.stack([probabilities[labels == c].mean(0) for c in range(10)])
    np.testing.assert_array_equal(match.classes[:, 0], expected.argmax(1))
    np.testing.assert_allclose(match.similarity[:, 0], expected.max(1), rtol=1e-4)
    # The next run has them from the cache.
    again = find_match(config, backbone, Data(replace(target, read=unreadable), None, source))
    np.testing.assert_array_equal(again.similarity, match.similarity)


def test_the_linear_classifier_is_cached(config, records, tmp_path):
    target = records[0]
    backbone = weights_of(config, tmp_path / 'w.safetensors', 10)
    kernel, bias = backbone_classifier(config, backbone, target)

    task, state = step_lib.create_task(config, Sizes(10), backbone)
    images, labels = images_of(config, target)
    outputs, _ = forward(task.graphdef, state.params, state.batch_stats, images, train=False)
    fitted = LogisticRegression(max_iter=1000).fit(outputs.features, labels)
    np.testing.assert_allclose(kernel, fitted.coef_.T, atol=2e-3, rtol=1e-3)
    np.testing.assert_allclose(bias, fitted.intercept_, atol=2e-3, rtol=1e-3)

    def unreadable(number):
        raise AssertionError(f'record {number} was read')

    again = backbone_classifier(config, backbone, replace(target, read=unreadable))
    np.testing.assert_array_equal(again[0], kernel)
    np.testing.assert_array_equal(again[1], bias)


def test_columns_are_found_by_id_word_and_name(config, tmp_path):
    imagenet = weights_of(config, tmp_path / 'w.safetensors', 1000)
    ids = imagenet_ids()
    assert (ids[0], ids[207], ids[999]) == ('n01440764', 'n02099601', 'n15075141')
    assert imagenet.head_columns([ids[207], 'Golden_Retriever', 'golden retriever']).tolist() == [
        207,
        207,
        207,
    ]
    np.testing.assert_array_equal(imagenet.head_columns(readable(ids)), np.arange(1000))
    with pytest.raises(DataError, match='no column'):  # a dog or a garment?
        imagenet.head_columns(['CARDIGAN'])
    own = weights_of(config, tmp_path / 'own.safetensors', 5, ['cat', 'dog', 'emu'])
    assert own.head_columns(['emu', 'cat']).tolist() == [2, 0]  # the other columns have no names


def test_what_has_no_column_is_one_clear_error(config, tmp_path):
    imagenet = weights_of(config, tmp_path / 'w.safetensors', 1000)
    with pytest.raises(DataError, match=r"1 of 2 source classes .*'moose'.*similarity=cosine"):
        imagenet.head_columns(['n01440764', 'moose'])
    with pytest.raises(DataError, match='1 of 1 source classes'):  # two classes have this word
        imagenet.head_columns(['crane'])
    unnamed = weights_of(config, tmp_path / 'unnamed.safetensors', 7)
    with pytest.raises(DataError, match='do not name the 7 classes'):
        unnamed.head_columns(['cat'])
    tensors = load_file(tmp_path / 'w.safetensors')
    save_file({k: v for k, v in tensors.items() if 'fc' not in k}, tmp_path / 'no.safetensors')
    with pytest.raises(DataError, match='have no head'):
        Weights(tmp_path / 'no.safetensors', config.model.name).head_columns(['cat'])


def test_predicted_without_weights_is_refused(config):
    config.match.similarity = 'predicted'
    with pytest.raises(ConfigError, match='needs a pre-trained head'):
        validate(config, 1)
    config.method = 'finetune'  # which matches nothing
    validate(config, 1)


def test_the_report_says_how_classes_were_matched(config, records, tmp_path):
    backbone = weights_of(config, tmp_path / 'w.safetensors', 10, records[2].class_names)
    config.update({'method': 'xmixup', 'weights': str(backbone.path), 'report': True})
    config.match.similarity = 'predicted'
    train_and_evaluate(config, tmp_path / 'run')
    page = ' '.join((tmp_path / 'run' / 'report.html').read_text().split())
    assert 'the mean probability that the pre-trained head gives the source class' in page


@pytest.mark.parametrize('warm', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_source_columns_begin_as_those_of_the_pretrained_head(config, records, tmp_path, warm):
    source = records[2]
    names = source.class_names[::-1]
    backbone = weights_of(config, tmp_path / 'w.safetensors', 10, names)
    config.update({'method': 'xmixup', 'weights': str(backbone.path), 'warm_head': warm})
    config.xmixup.source_head = 'pretrained'
    config.optimizer.learning_rate = 1e-12
    train_and_evaluate(config, tmp_path / 'run')
    match = find_match(config, backbone, Data(records[0], None, source))
    chosen = [names.index(source.class_names[c]) for c in match.selected]
    assert chosen == list(range(9, -1, -1))
    head = load_file(tmp_path / 'run' / 'model.safetensors')
    pretrained = load_file(backbone.path)
    for key in ('fc.weight', 'fc.bias'):
        np.testing.assert_allclose(head[key][10:], pretrained[key][chosen], atol=1e-6)
    bound = head['fc.weight'].shape[1] ** -0.5  # of a head drawn at random
    assert (np.abs(head['fc.weight'][:10]).max() > bound) == warm


def test_pretrained_source_columns_need_a_head(config, tmp_path):
    config.method, config.xmixup.source_head = 'xmixup', 'pretrained'
    with pytest.raises(ConfigError, match=r'fc\.weight'):
        train_and_evaluate(config, tmp_path)


def test_a_source_class_without_images_cannot_be_matched(config, records, tmp_path):
    target, _, source = records
    backbone = weights_of(config, tmp_path / 'w.safetensors', 10, source.class_names)
    config.match.similarity = 'predicted'
    some = source.select(np.flatnonzero(source.labels != 3))
    with pytest.raises(DataError, match=f"class '{source.class_names[3]}' .* no readable image"):
        find_match(config, backbone, Data(target, None, some))


def test_cotuning_calibrates_each_class_by_its_own_column(config, records, tmp_path, monkeypatch):
    names = [f'unused{i}' for i in range(3)] + list(records[2].class_names[::-1])
    backbone = weights_of(config, tmp_path / 'w.safetensors', len(names), names)
    config.update({'method': 'cotuning', 'weights': str(backbone.path), 'steps': 1})
    config.source.update({'split': 'train', 'test_split': 'rest', 'sample_rate': 0.9})
    seen = {}

    def fit(logits, labels):
        seen.update(columns=logits.shape[1], labels=labels)
        return 1.0

    monkeypatch.setattr(cotuning, 'fit_temperature', fit)
    train_and_evaluate(config, tmp_path / 'run')
    train, held_out = train_and_test(config.source, config)
    assert seen['columns'] == len(names) and len(held_out) < len(train)
    expected = [names.index(train.class_names[label]) for label in held_out.labels]
    np.testing.assert_array_equal(np.sort(seen['labels']), np.sort(expected))
