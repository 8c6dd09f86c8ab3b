"""Escapes and quotes names from outside, for messages, files and shells."""

import os
import re
import shlex
from collections.abc import Iterable, Sequence

# Control characters and Unicode's line separators.
_CONTROLS = re.compile('[\0-\x1f\x7f-\x9f\u2028\u2029]')


def valid_text(name: str) -> str:
    r"""Escapes bytes that are not valid Unicode, as in file names of another encoding.

    >>> print(valid_text(os.fsdecode(b'caf\xe9')))
    caf\xe9
    """
    try:
        return os.fsencode(name).decode('utf-8', 'backslashreplace')
    except UnicodeEncodeError:  # surrogates that do not stand for a byte
        return name.encode('utf-8', 'backslashreplace').decode()


def one_line(name: object) -> str:
    r"""Like `valid_text`, but also escapes line ends and other control characters.

    >>> print(one_line('two\nlines'))
    two\nlines
    """
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], valid_text(str(name)))


def first_few(words: Sequence[str], count: int = 5) -> str:
    """Joins the first `count` words, with an ellipsis for the others.

    >>> first_few(['a', 'b', 'c'], 2), first_few(['a', 'b'], 2)
    ('a, b, ...', 'a, b')
    """
    return ', '.join(words[:count]) + (', ...' if len(words) > count else '')


def shell_line(words: Iterable[object]) -> str:
    """Joins words into a command line that a shell splits into the same words.

    >>> print(shell_line(['xmixup', 'predict', '--workdir=my runs/1']))
    xmixup predict '--workdir=my runs/1'
    """
    return ' '.join(_quoted(str(word)) for word in words)


def _quoted(word: str) -> str:
    if one_line(word) == word:
        return shlex.quote(word)
    # The $'...' quoting of Bash and zsh, for characters that cannot be shown.
    shown = ''.join(
        chr(byte) if 32 <= byte < 127 and chr(byte) not in "\\'" else f'\\x{byte:02x}'
        for byte in os.fsencode(word)
    )
    return f"$'{shown}'"
