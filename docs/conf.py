"""Sphinx: python -m sphinx -W --keep-going -n docs docs/_build"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sphinx.util import logging

from xmixup_jax import __version__, defaults
from xmixup_jax.checks import validate
from xmixup_jax.cli.program import COMMANDS, help_text, module_of
from xmixup_jax.config import is_probe
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods import METHODS
from xmixup_jax.methods.find import method_of, options_of
from xmixup_jax.methods.options import options_table

# What some methods are refused with, by the headings of the table in training.md.
FEATURES = {
    '`freeze=backbone`': {'freeze': 'backbone'},
    '`batch_norm=frozen`': {'batch_norm': 'frozen'},
    '`batch_norm=mixed`': {'batch_norm': 'mixed'},
    'networks without batch norm': {'model.name': 'vit_s16'},
    '`warm_head`': {'warm_head': True},
    "`weights=''`": {'weights': ''},
}


def features_table() -> str:
    """Methods and what they take, as Markdown."""
    rows = [['method', *FEATURES], ['---', *[':---:'] * len(FEATURES)]]
    for method in METHODS:
        rows.append([f'`{method}`'])
        for changes in FEATURES.values():
            config = defaults.get_config()
            config.method, config.target.name = method, 'folder:photos'
            config.update_from_flattened_dict(changes)
            rows[-1].append(_taken(config))
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows) + '\n'


def _taken(config) -> str:
    if not config.weights and method_of(config).needs_head(options_of(config)):
        return '–'
    try:
        validate(config, 1)
    except ConfigError:
        return '–'
    return 'probe' if is_probe(config) else 'yes'


# What the commands print with --help, for the page about them.
help_folder = Path(__file__).with_name('_help')
help_folder.mkdir(exist_ok=True)
for name, module in {name: module_of(name) for name in ('program', *COMMANDS)}.items():
    (help_folder / f'{name}.txt').write_text(help_text(module) + '\n')
(help_folder / 'features.md').write_text(features_table())
(help_folder / 'options.md').write_text(
    options_table({name: method.options for name, method in METHODS.items()})
)
for name, method in METHODS.items():
    (help_folder / f'options_{name}.md').write_text(options_table({name: method.options}))

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
