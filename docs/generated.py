"""The parts of the pages that are made from the code, in docs/_help: help texts and tables."""

import ast
import io
import re
import tokenize
from pathlib import Path

from ml_collections import ConfigDict

from xmixup_jax import defaults
from xmixup_jax.checks import validate
from xmixup_jax.cli.program import COMMANDS, help_text, module_of
from xmixup_jax.config import is_probe
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods import METHODS
from xmixup_jax.methods.find import method_of, options_of
from xmixup_jax.methods.options import options_table

FOLDER = Path(__file__).with_name('_help')

# Settings that some methods refuse, by the headings of the table in howto/training.md.
FEATURES = {
    '`freeze=backbone`': {'freeze': 'backbone'},
    '`batch_norm=frozen`': {'batch_norm': 'frozen'},
    '`batch_norm=mixed`': {'batch_norm': 'mixed'},
    'networks without batch norm': {'model.name': 'vit_s16'},
    '`warm_head`': {'warm_head': True},
    "`weights=''`": {'weights': ''},
}

# The top-level keys in each table of reference/configuration.md. Every key is in exactly one.
SECTIONS = {
    'run': (
        *('method', 'seed', 'steps', 'batch_size', 'log_every', 'eval_every', 'patience'),
        *('checkpoint_every', 'checkpoint_seconds', 'keep_checkpoints', 'allow_changes'),
        *('report', 'wandb'),
    ),
    'images': (
        *('resize', 'fit', 'image_size', 'crop_min_area', 'flip', 'augment'),
        *('test_views', 'eval_batch_size', 'max_bad_images'),
    ),
    'network': (
        *('model', 'weights', 'warm_head', 'head_init', 'freeze', 'batch_norm'),
        *('batch_norm_over', 'reestimate', 'pretrain'),
    ),
    'match': ('match',),
    'loss': ('label_smoothing', 'ema_decay', 'balance'),
    'machine': (
        *('precision', 'accumulate_steps', 'remat', 'steps_per_dispatch', 'num_threads', 'data'),
        *('data_dir', 'cache_dir'),
    ),
}
# Keys that appear several times, by the function of defaults.py that makes them.
REPEATED = {'dataset': ('target', 'source'), 'optimizer': ('optimizer', 'pretrain.optimizer')}

# What a key means where its comment in defaults.py is missing or too short to stand alone.
PLAIN = {
    'optimizer.learning_rate': 'the learning rate at the start, after the warm-up',
    'optimizer.weight_decay': 'the weight decay',
    'optimizer.warmup_steps': 'steps in which the learning rate rises linearly from 0',
    'dataset.name': '`folder:PATH`, `csv:FILE`, or the name of a tfds data set',
    'model.name': 'the network: see [Choose a network](../howto/networks.md#choose-a-network)',
    'pretrain.seed': 'the seed of the pre-training on the source (`weights=source`)',
    'pretrain.steps': 'the number of steps of the pre-training',
    'pretrain.batch_size': 'the batch size of the pre-training',
    'match.classes_per_target': 'source classes that are matched with each target class',
    'steps': 'the number of training steps',
    'eval_batch_size': 'images that go through the network at a time in a test',
    'log_every': 'steps between two rows of `metrics.csv`',
    'checkpoint_every': 'steps between two possible checkpoints',
    'checkpoint_seconds': 'the least time between two checkpoints, in seconds; 0: save at each of '
    'these steps',
    'keep_checkpoints': 'checkpoints that are kept; older ones are deleted',
}


def write_all() -> None:
    """Writes every generated part."""
    FOLDER.mkdir(exist_ok=True)
    for name in ('program', *COMMANDS):
        (FOLDER / f'{name}.txt').write_text(help_text(module_of(name)) + '\n')
    (FOLDER / 'features.md').write_text(features_table())
    (FOLDER / 'options.md').write_text(
        options_table({name: method.options for name, method in METHODS.items()})
    )
    for name, method in METHODS.items():
        (FOLDER / f'options_{name}.md').write_text(options_table({name: method.options}))
    for name, table in configuration_tables().items():
        (FOLDER / f'config_{name}.md').write_text(table)


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    rows = [rows[0], ['---'] * len(rows[0]), *rows[1:]]
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def features_table() -> str:
    """The settings that each method takes."""
    rows = [['method', *FEATURES]]
    for method in METHODS:
        rows.append([f'`{method}`'])
        for changes in FEATURES.values():
            config = defaults.get_config()
            config.method, config.target.name = method, 'folder:photos'
            config.update_from_flattened_dict(changes)
            rows[-1].append(_taken(config))
    return markdown(rows)


def _taken(config) -> str:
    if not config.weights and method_of(config).needs_head(options_of(config)):
        return '–'
    try:
        validate(config, 1)
    except ConfigError:
        return '–'
    return 'probe' if is_probe(config) else 'yes'


def configuration_tables() -> dict[str, str]:
    """Every key of the configuration with its default and meaning, but not the methods' options.

    Raises:
      ValueError: a key has no meaning, or is in no table.
    """
    comments = key_comments(Path(defaults.__file__).read_text())
    config = defaults.get_config()
    left = set(config) - set(METHODS) - {'source', 'target', 'optimizer'}
    tables = {}
    for name, top in SECTIONS.items():
        left -= set(top)
        paths = [p for key in top for p in comments if p == key or p.startswith(f'{key}.')]
        values = {path: _at(config, path) for path in paths}
        rows = [
            [f'`{path}`', _shown(value), _meaning(comments, path)]
            for path, value in values.items()
            if not isinstance(value, ConfigDict)
        ]
        tables[name] = markdown([['key', 'default', 'meaning'], *rows])
    if left:
        raise ValueError(f'in no table of reference/configuration.md: {sorted(left)}')
    for function, prefixes in REPEATED.items():
        rows = [['key', *(f'`{prefix}`' for prefix in prefixes), 'meaning']]
        for path in (path for path in comments if path.startswith(f'{function}.')):
            key = path.removeprefix(f'{function}.')
            values = [_shown(_at(config, f'{prefix}.{key}')) for prefix in prefixes]
            rows.append([f'`{key}`', *values, _meaning(comments, path)])
        tables[function] = markdown(rows)
    return tables


def _at(config: ConfigDict, path: str):
    for part in path.split('.'):
        config = config[part]
    return config


def _meaning(comments: dict[str, str], path: str) -> str:
    text = PLAIN.get(path) or comments[path]
    if not text:
        raise ValueError(f'{path} has no comment in xmixup_jax/defaults.py')
    as_code = re.sub(r"(?<!\w)'(\w*)'(?!\w)", r"`'\1'`", text)  # not apostrophes
    return as_code.replace('|', r'\|')


def _shown(value) -> str:
    """A default as it is written in Python."""
    return f'`{value!r}`'


def key_comments(source: str) -> dict[str, str]:
    """The comment above and beside each key in the functions of defaults.py.

    Args:
      source: the text of the file.

    Returns:
      comments ('' where there is none) by key: 'augment.policy' for get_config, else
      'FUNCTION.KEY'. In the order of the file.
    """
    lines, beside, above = source.splitlines(), {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            alone = not lines[row - 1][:column].strip()
            (above if alone else beside)[row] = token.string.lstrip('# ')

    found = {}

    def add(path: str, row: int) -> None:
        first = row
        while first - 1 in above:
            first -= 1
        parts = [*(above[each] for each in range(first, row)), beside.get(row, '')]
        found[path] = ' '.join(part for part in parts if part)

    def visit(node: ast.expr, path: str) -> None:
        """Reads the keys of a `ConfigDict({...})`."""
        for dictionary in (
            each for each in getattr(node, 'args', ()) if isinstance(each, ast.Dict)
        ):
            for key, value in zip(dictionary.keys, dictionary.values, strict=True):
                add(f'{path}.{key.value}', key.lineno)
                visit(value, f'{path}.{key.value}')

    for function in (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)):
        for node in function.body:
            if isinstance(node, ast.Return):
                visit(node.value, function.name)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                path = ast.unparse(node.targets[0]).removeprefix('config.')
                add(path, node.lineno)
                visit(node.value, path)
    return found
