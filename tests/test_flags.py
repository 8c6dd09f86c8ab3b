"""Errors in flags name the flag that is wrong."""

import re

import pytest

from xmixup_jax import defaults
from xmixup_jax.cli.flags import parse_flags
from xmixup_jax.config import flatten
from xmixup_jax.errors import ConfigError

KNOWN = flatten(defaults.get_config())
SECTIONS = sorted({key.rpartition('.')[0] for key in KNOWN} - {''})
LAST = sorted({key.rpartition('.')[2] for key in KNOWN})


def complaint(*arguments):
    with pytest.raises(ConfigError) as error:
        parse_flags(['xmixup train', '--config=digits', *arguments])
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('section', ['', *SECTIONS, 'optimizer.target', 'nowhere'])
def test_a_key_of_another_section_is_blamed_on_the_flag_itself(section):
    """For example --config.optimizer.width, although config.model.width is a key."""
    keys = [f'{section}.{last}'.lstrip('.') for last in LAST]
    unknown = [key for key in keys if key not in KNOWN and key not in SECTIONS]
    for key in unknown[:: max(1, len(unknown) // 4)]:
        for given in ((f'--config.{key}=x',), (f'--config.{key}', 'x'), (f'-config.{key}=3',)):
            words = complaint('--config.seed=1', *given)
            assert words.startswith(f'{given[0]}: there is no such key')


NUMBERS = [key for key, value in KNOWN.items() if isinstance(value, (bool, int, float))]


@pytest.mark.parametrize('key', NUMBERS)
def test_a_value_of_another_type_is_blamed_on_its_flag(key):
    words = complaint('--config.seed=1', '--config.batch_size=5', f'--config.{key}=maybe')
    kind = {bool: 'True or False', int: 'a whole number', float: 'a number'}[type(KNOWN[key])]
    assert re.fullmatch(
        rf'--config\.{re.escape(key)}=maybe: must be {kind}; the experiment has .+', words
    )


@pytest.mark.parametrize('section', SECTIONS)
def test_a_group_is_no_value(section):
    words = complaint(f'--config.{section}=3')
    example = re.fullmatch(
        rf'--config\.{section}=3: names a group of values, for example --config\.(.+)', words
    )[1]
    assert example in KNOWN and example.startswith(f'{section}.')
