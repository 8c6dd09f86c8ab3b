"""Sphinx: python -m sphinx -W --keep-going -n docs docs/_build"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sphinx.util import logging

from xmixup_jax import __version__
from xmixup_jax.cli.program import COMMANDS, help_text, module_of
from xmixup_jax.methods import METHODS
from xmixup_jax.methods.options import options_table

# What the commands print with --help, for the page about them.
help_folder = Path(__file__).with_name('_help')
help_folder.mkdir(exist_ok=True)
for name, module in {name: module_of(name) for name in ('program', *COMMANDS)}.items():
    (help_folder / f'{name}.txt').write_text(help_text(module) + '\n')
(help_folder / 'options.md').write_text(
    options_table({name: method.options for name, method in METHODS.items()})
)

project = 'xmixup-jax'
author = 'The xmixup-jax authors'
release = version = __version__

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
]
exclude_patterns = ['_build', '_help']
html_theme = 'furo'
html_title = 'xmixup-jax'

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3  # links to headings are checked as links to pages are

autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # docstrings give shapes as well
napoleon_google_docstring = True
napoleon_use_rtype = False
# Docstrings name these without their module; they are at the end of the reference.
nitpick_ignore = [('py:exc', name) for name in ('UserError', 'ConfigError', 'DataError')]


def _demand_docstring(app, what, name, obj, options, lines):
    """The reference has nothing undocumented."""
    if not any(lines) and what in ('class', 'function', 'method', 'property'):
        logging.getLogger('docs').warning('%s has no docstring', name)


def setup(app):
    app.connect('autodoc-process-docstring', _demand_docstring)
