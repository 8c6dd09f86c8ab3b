"""Readable class names: translates ImageNet's WordNet ids into words.

wordnet.txt lists the first word of each of the 1,000 synsets of ImageNet's classification task,
from WordNet 3.0 (Princeton University, https://wordnet.princeton.edu).
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
    """Returns the 1,000 WordNet ids in ascending order, the order of ImageNet's class numbers."""
    return tuple(sorted(_words()))


def readable(class_names: Sequence[str]) -> list[str]:
    """Replaces WordNet ids by words, and escapes invalid Unicode.

    If several ids have the same word, the id is added to it, so that names stay distinct.

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
