"""Sphinx: python -m sphinx -W --keep-going -n docs docs/_build"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import generated
from sphinx.util import logging

from xmixup_jax import __version__

generated.write_all()

project = 'xmixup-jax'
author = 'The xmixup-jax authors'
release = version = __version__

extensions = [
    'mathml',
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
]
exclude_patterns = ['_build', '_help']
html_theme = 'furo'
html_title = 'xmixup-jax'
html_math_renderer = 'mathml'

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3  # Sphinx then checks links to headings as well.

autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # The docstrings also give shapes.
napoleon_google_docstring = True
napoleon_use_rtype = False
# Docstrings name these without their module; they are at the end of the reference.
nitpick_ignore = [('py:exc', name) for name in ('UserError', 'ConfigError', 'DataError')]


def _demand_docstring(app, what, name, obj, options, lines):
    """Warns about anything undocumented in the reference."""
    if not any(lines) and what in ('class', 'function', 'method', 'property'):
        logging.getLogger('docs').warning('%s has no docstring', name)


def setup(app):
    app.connect('autodoc-process-docstring', _demand_docstring)
