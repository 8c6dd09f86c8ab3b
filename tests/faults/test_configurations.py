"""Random configurations: impossible ones fail at once with one line, all others train."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from xmixup_jax.checks import validate
from xmixup_jax.cli import flags, program
from xmixup_jax.cli import train as main
from xmixup_jax.cli.flags import parse_flags
from xmixup_jax.config import flatten
from xmixup_jax.data.cache import CACHES
from xmixup_jax.errors import ConfigError, UserError
from xmixup_jax.matching import ASSIGNMENTS, SIMILARITIES
from xmixup_jax.methods import METHODS
from xmixup_jax.mixing import LABEL_SPACES
from xmixup_jax.models import NORMALIZATIONS
from xmixup_jax.models.resnet import STEMS
from xmixup_jax.run.inputs import check_inputs

DEFAULTS = flatten(parse_flags(['main', '--config=configs/digits.py'])[0])
# The methods that need no pre-trained head.
HEADLESS = sorted(set(METHODS) - {'lwf', 'cotuning', 'smile'})
NUMBERS = [key for key, x in DEFAULTS.items() if isinstance(x, int | float) and x is not True]
pytestmark = pytest.mark.slow  # tests/test_config.py tests chosen values quickly

UNLIMITED = settings(suppress_health_check=list(HealthCheck), derandomize=False, database=None)


def some(*values):
    return st.sampled_from(values)


def argv(values, workdir):
    flags = [f'--config.{key}={value}' for key, value in values.items()]
    return ['main', '--config=configs/digits.py', f'--workdir={workdir}', *flags]


@st.composite
def valid(draw):
    """Draws values with which two steps are quick."""
    resize = draw(st.integers(8, 26))
    every = draw(some(1, 2))
    values = {
        'steps': 2,
        'method': draw(st.sampled_from(HEADLESS)),
        'seed': draw(st.integers(0, 2**32 - 1)),
        'resize': resize,
        'image_size': draw(st.integers(8, resize)),
        'crop_min_area': draw(st.floats(0, 1)),
        'flip': draw(st.booleans()),
        'model.width': draw(some(1, 2, 4)),
        'model.stem': draw(st.sampled_from(sorted(STEMS))),
        'model.normalization': draw(some('', *NORMALIZATIONS)),
        'match.similarity': draw(some('cosine', 'euclidean', 'emd')),
        'head_init': draw(some('uniform', 'normal')),
        'reestimate': draw(st.integers(0, 3)),
        'xmixup.lam': draw(some('sample', 'batch')),
        'match.assignment': draw(st.sampled_from(ASSIGNMENTS)),
        'match.images_per_class': draw(st.integers(0, 5)),
        'xmixup.alpha': draw(st.floats(0.01, 10)),
        'xmixup.reflect': draw(st.booleans()),
        'xmixup.label_space': draw(st.sampled_from(LABEL_SPACES)),
        'batch_size': draw(some(16, 32)),
        'accumulate_steps': draw(some(1, 2)),
        'eval_batch_size': draw(some(1024, 2048)),
        'optimizer.learning_rate': draw(st.floats(1e-6, 0.1)),
        'optimizer.head_multiplier': draw(st.floats(0, 10)),
        'optimizer.name': draw(some('sgd', 'adamw', 'lamb')),
        'optimizer.momentum': draw(st.floats(0, 0.99)),
        'optimizer.b2': draw(st.floats(0, 0.9999)),
        'optimizer.layer_decay': draw(some(1.0, 0.7)),
        'optimizer.decayed': draw(some('all', 'kernels')),
        'optimizer.clip_norm': draw(some(0.0, 0.5)),
        'optimizer.nesterov': draw(st.booleans()),
        'optimizer.weight_decay': draw(st.floats(0, 0.01)),
        'optimizer.drop_at': draw(st.floats(0.5, 1)),
        'optimizer.schedule': draw(some('step', 'cosine')),
        'optimizer.warmup_steps': draw(some(0, 1)),
        'precision': draw(some('float32', 'bfloat16')),
        'remat': draw(st.booleans()),
        'steps_per_dispatch': every,
        'log_every': 2 * draw(some(1, 5)),
        'eval_every': draw(some(0, 2)),
        'checkpoint_every': 2 * draw(some(1, 5)),
        'keep_checkpoints': draw(st.integers(1, 3)),
        'data.cache': draw(st.sampled_from(CACHES)),
        'num_threads': draw(st.integers(0, 4)),
        'max_bad_images': draw(st.integers(0, 100)),
    }
    if draw(st.booleans()):
        values |= {'target.shots': 0, 'target.sample_rate': draw(st.floats(0.01, 0.2))}
    else:
        values['target.shots'] = draw(st.integers(1, 9))
    if draw(st.booleans()):
        values['source.sample_rate'] = draw(st.floats(0.05, 0.2))
    return values


# (key, impossible value).
WRONG = st.one_of(
    st.tuples(st.sampled_from(NUMBERS), some('', 'x', '1,5', '0x1g', '1e', '--', '[1]', 'None')),
    st.tuples(some('steps', 'batch_size', 'seed', 'resize', 'num_threads'), some('1.5', '1e3')),
    st.tuples(some('flip', 'remat', 'xmixup.reflect'), some('2', 'perhaps', '')),
    st.tuples(
        some('method', 'precision', 'data.cache', 'match.similarity', 'model.name', 'model.stem'),
        st.text(st.characters(codec='ascii', exclude_characters='\0\n'), max_size=9).filter(
            lambda text: text not in (*METHODS, *CACHES, *SIMILARITIES, *STEMS)
        ),
    ),
    st.tuples(
        some('steps', 'batch_size', 'resize', 'checkpoint_every', 'model.width', 'xmixup.alpha',
             'optimizer.learning_rate', 'keep_checkpoints', 'source.sample_rate'),
        st.integers(max_value=0).map(str),
    ),
    st.tuples(
        some('optimizer.momentum', 'crop_min_area', 'target.test_share', 'optimizer.drop_at'),
        st.floats(1.001, 1e300).map(str) | st.floats(-1e300, -1e-9).map(str) | some('nan', 'inf'),
    ),
    st.tuples(some('seed', 'num_threads', 'max_bad_images', 'l2sp.alpha'), some('-1', '-9999')),
    st.tuples(some('optimizer.learning_rate', 'xmixup.alpha', 'optimizer.weight_decay'),
              some('nan', 'inf', '-inf')),
    st.tuples(some('batch_size', 'eval_batch_size'), st.integers(0, 99).map('{0}3'.format)),
    st.tuples(
        st.from_regex(r'[a-z_]{1,12}(\.[a-z_]{1,12})?', fullmatch=True).filter(
            lambda key: not any(full.startswith(key) for full in DEFAULTS)
        ),
        some('1', 'x'),
    ),
)  # fmt: skip


@pytest.fixture
def outcome(monkeypatch):
    """Runs the program; returns its exit code and its last line."""

    def fail(message, code):
        raise SystemExit(code, message)

    monkeypatch.setattr(program, 'fail', fail)
    monkeypatch.setattr(flags, 'setup', lambda cache_dir: None)  # of the whole process

    def run(arguments):
        try:
            program.run_and_exit(main.run, arguments)
        except SystemExit as end:
            return end.args
        return 0, ''

    return run


def test_impossible_values(config, tmp_path, outcome, faults, record_property):
    tried = 0

    @settings(UNLIMITED, max_examples=400 * faults)
    @given(WRONG)
    def check(wrong):
        nonlocal tried
        key, value = wrong
        code, message = outcome(argv({key: value}, tmp_path / 'run'))
        assert code == 2, (key, value, message)
        assert '\n' not in message and key.split('.')[-1] in message
        assert not (tmp_path / 'run').exists()
        tried += 1

    check()
    record_property('impossible configurations', f'{tried}, each ended with code 2 and one line')


def test_values_of_any_kind(config, faults):
    """Any input leads to a one-line error, or to a configuration whose data can be looked up."""
    anything = st.one_of(
        st.text(st.characters(exclude_characters='\0'), max_size=20),
        st.integers().map(str),
        st.floats().map(str),
        some('../x', '/', '~', 'folder:', 'folder:/', 'a/b/c', 'a:1.0', '%s', '{}', "'", '"'),
    )

    @settings(UNLIMITED, max_examples=400 * faults)
    @given(st.sampled_from(sorted(DEFAULTS)), anything)
    def check(key, value):
        values = {'data_dir': config.data_dir, 'cache_dir': config.cache_dir, key: value}
        try:
            parsed, _ = parse_flags(argv(values, 'run'))
            validate(parsed, 8)
        except ConfigError as error:
            assert '\n' not in str(error)
            return
        json.dumps(parsed.to_dict())
        try:
            check_inputs(parsed)
        except UserError as error:
            assert str(error)

    check()


def test_possible_values(config, records, tmp_path, outcome, faults, record_property):
    tried = 0

    # Failing examples are not shrunk, since each is a run.
    @settings(UNLIMITED, max_examples=2 * faults, phases=(Phase.generate,))
    @given(valid())
    def check(values):
        nonlocal tried
        shutil.rmtree(tmp_path / 'run', ignore_errors=True)
        jax.clear_caches()  # each example compiles its own programs, which would fill the memory
        folders = {'data_dir': config.data_dir, 'cache_dir': config.cache_dir, 'weights': ''}
        code, message = outcome(argv(folders | values, tmp_path / 'run'))
        tried += 1
        if code == 1 and 'not finite' in message:  # a width of 1 may lead there
            return
        assert code == 0, (values, message)
        result = json.loads((tmp_path / 'run' / 'result.json').read_text())
        assert result['steps'] == 2 and 0 <= result['top1'] <= 1
        assert math.isfinite(result['loss'])
        assert np.isfinite(result['images_per_second'] or 1.0)

    check()
    record_property('possible configurations', f'{tried}, each trained two steps')
