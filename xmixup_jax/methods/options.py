"""The options of a method: default, bounds and meaning, in one line each.

>>> option = positive(0.2, 'lam ~ Beta(alpha, alpha)')
>>> option.default, option.allowed, option.holds(0.5), option.holds(float('nan'))
(0.2, 'positive, below 2**32', True, False)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# Coefficients are float32 in the compiled step, and whole numbers int32.
_MOST = 2**32
_MOST_COUNT = 2**31 - 1


class Option(NamedTuple):
    """One value of the configuration, `config.METHOD.KEY`. The default gives its type."""

    default: Any
    meaning: str
    """One line for the table of options in the documentation."""
    allowed: str
    """Completes "must be"."""
    holds: Callable[[Any], bool]
    """Whether a value of the default's type is allowed."""
    traced: bool = False
    """Whether `view.options` holds it as an array, so that runs with other values share their
    compiled steps. For numbers that the program only computes with: it cannot branch on an array,
    and extra_logits, norm and prepare get none."""


def positive(default: float, meaning: str, traced: bool = False) -> Option:
    """A number above 0."""
    allowed = 'positive, below 2**32'
    return _checked(
        Option(float(default), meaning, allowed, lambda value: 0 < value < _MOST, traced)
    )


def non_negative(default: float, meaning: str, traced: bool = False) -> Option:
    """A number from 0 on."""
    allowed = 'at least 0, below 2**32'
    return _checked(
        Option(float(default), meaning, allowed, lambda value: 0 <= value < _MOST, traced)
    )


def fraction(default: float, meaning: str, traced: bool = False) -> Option:
    """A number from 0 to 1, both included."""
    return _checked(
        Option(float(default), meaning, 'from 0 to 1', lambda value: 0 <= value <= 1, traced)
    )


def count(default: int, meaning: str, least: int = 1) -> Option:
    """A whole number from `least` on."""
    allowed = f'a whole number from {least} to 2**31 - 1'
    return _checked(Option(default, meaning, allowed, lambda value: least <= value <= _MOST_COUNT))


def choice(default: str, choices: Sequence[str], meaning: str) -> Option:
    """One of several words."""
    allowed = f'one of {", ".join(choices)}'
    return _checked(Option(default, meaning, allowed, lambda value: value in choices))


def flag(default: bool, meaning: str) -> Option:
    """True or False."""
    return _checked(Option(default, meaning, 'True or False', lambda value: value in (True, False)))


def _checked(option: Option) -> Option:
    if not option.holds(option.default):
        raise ValueError(f'the default {option.default!r} must be {option.allowed}')
    return option


def options_table(methods: Mapping[str, Mapping[str, Option]]) -> str:
    """Every option of every method, as a Markdown table for the documentation.

    >>> print(options_table({'mine': {'p': fraction(0.5, 'probability of a change')}}))
    | option | default | must be | meaning |
    | --- | --- | --- | --- |
    | `mine.p` | `0.5` | from 0 to 1 | probability of a change |
    """
    rows = ['| option | default | must be | meaning |', '| --- | --- | --- | --- |']
    for name, options in methods.items():
        for key, option in options.items():
            allowed = option.allowed.replace('**', r'\*\*')
            cells = f'`{name}.{key}`', f'`{option.default}`', allowed, option.meaning
            rows.append(f'| {" | ".join(cells)} |')
    return '\n'.join(rows)
