"""The documentation: its links lead somewhere, and its generated tables are complete."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from xmixup_jax import defaults
from xmixup_jax.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for folder in ('docs', 'benchmarks')
    for path in (ROOT / folder).rglob('*.md')
    if not path.relative_to(ROOT / folder).as_posix().startswith('_')
)
PAGES += [ROOT / name for name in ('README.md', 'CONTRIBUTING.md')]


@pytest.fixture(scope='module')
def generated():
    """The module docs/generated.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location('generated', ROOT / 'docs' / 'generated.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(config, path=''):
    """The values of a configuration by dotted path."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f'{path}{key}.')
        else:
            yield f'{path}{key}', value


def prose(path):
    """A page without its blocks of code."""
    return re.sub(r'^```.*?^```$', '', path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r'^#+ (.*)', prose(path), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for link in re.findall(r'\]\(([^)\s]+)\)', prose(page)):
        if '://' in link:
            continue
        name, _, anchor = link.partition('#')
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_page_about_configuration_has_every_key(generated):
    rows = {}
    for name, table in generated.configuration_tables().items():
        head, _, *lines = [
            [cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]]
            for line in table.splitlines()
        ]
        for key, *values, meaning in lines:
            assert meaning, key
            for column, value in zip(head[1:-1], values, strict=True):
                prefix = f'{column.strip("`")}.' if name in generated.REPEATED else ''
                path = prefix + key.strip('`')
                assert path not in rows
                rows[path] = ast.literal_eval(value.strip('`'))
    expected = {
        path: value
        for path, value in leaves(defaults.get_config())
        if path.partition('.')[0] not in METHODS
    }
    assert rows == expected
    page = (ROOT / 'docs' / 'reference' / 'configuration.md').read_text()
    assert all(f'_help/config_{name}.md' in page for name in generated.configuration_tables())


def test_comments_of_keys(generated):
    source = """
def part():
    return ConfigDict({'a': 1, 'b': 2})  # beside

def get_config():
    # Above,
    # in two lines;
    config.x = 1  # and beside.
    config.y = ConfigDict(
        {
            # Of z.
            'z': 0,
        }
    )
    return config
"""
    assert generated.key_comments(source) == {
        'part.a': 'beside',
        'part.b': 'beside',
        'x': 'Above, in two lines; and beside.',
        'y': '',
        'y.z': 'Of z.',
    }
