"""Benchmarks of accuracy, speed and memory; the package does not depend on them."""

import ast
import contextlib
import os
import sys
from pathlib import Path

from xmixup_jax.cli.program import HELP


def _print_help() -> None:
    """Prints the docstring of the module that `python -m` is about to run, and ends the process.

    Importing the module would need its packages, which include PyTorch for some, and a device.
    """
    name = sys.orig_argv[sys.orig_argv.index('-m') + 1]
    if not name.startswith(f'{__name__}.'):
        return
    path = Path(__file__).parent.joinpath(*name.split('.')[1:])
    path = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
    if path.is_file():
        with contextlib.suppress(BrokenPipeError):  # the reader, for example `head`, has exited
            print(ast.get_docstring(ast.parse(path.read_text())), flush=True)
        os._exit(0)


if sys.argv[:1] == ['-m'] and '-m' in sys.orig_argv and HELP & set(sys.argv[1:]):
    _print_help()
