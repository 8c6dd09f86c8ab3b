"""Class names for people: what ImageNet's WordNet ids mean.

wordnet.txt has the first word of each of the 1,000 synsets of ImageNet's classification task, from
WordNet 3.0 (Princeton University, https://wordnet.princeton.edu).
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from xmixup_jax.text import valid_text


@cache
def _words() -> dict[str, str]:
    text = Path(__file__).with_name('wordnet.txt').read_text()
    return dict(line.split('\t') for line in text.splitlines())


def imagenet_ids() -> tuple[str, ...]:
    """The 1,000 WordNet ids in ascending order, which is that of ImageNet's class numbers."""
    return tuple(sorted(_words()))


def readable(class_names: Sequence[str]) -> list[str]:
    """The same names, with words in the place of WordNet ids, and with escapes for what is not
    Unicode.

    Ids that mean the same word keep themselves beside it, so that no two names become one.

    >>> readable(['n02123045', 'n02012849', 'n03126707', 'my_class'])
    ['tabby', 'crane (n02012849)', 'crane (n03126707)', 'my_class']
    """
    class_names = [valid_text(name) for name in class_names]
    names = [_words().get(name, name) for name in class_names]
    counts = Counter(names)
    return [
        word if word == name or counts[word] == 1 else f'{word} ({name})'
        for name, word in zip(class_names, names, strict=True)
    ]
