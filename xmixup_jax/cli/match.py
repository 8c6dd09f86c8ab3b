"""Matches every target class with source classes and shows the result, without training.

    xmixup match --config=configs/digits.py
    xmixup match --config=configs/digits.py --config.match.assignment=nearest

Takes the same flags as `xmixup train`. These change the match (the defaults hold unless the
experiment changes them):

  --config.match.similarity=NAME      cosine (default), euclidean or emd between the classes' mean
                                      features; or predicted, by the pre-trained head
  --config.match.assignment=NAME      optimal (default), greedy, nearest, random or least
  --config.match.classes_per_target=N source classes for each target class (default: 1)
  --config.match.images_per_class=N   images for the mean features of a class (default: 50; 0: all)

Prints each target class with its source classes and their similarities, then a table of the images
of each class, and then everything about the data that looks wrong: few test images, images in both
training and test, imbalanced classes. Writes match.json into the folder of the run.
"""

from pathlib import Path

from xmixup_jax.cli.flags import read_command
from xmixup_jax.data.inspection import show
from xmixup_jax.data.names import readable
from xmixup_jax.data.selection import Data
from xmixup_jax.errors import ConfigError
from xmixup_jax.files import MATCH
from xmixup_jax.matching import ClassMatch
from xmixup_jax.methods import METHODS
from xmixup_jax.methods.find import method_of
from xmixup_jax.processes import is_first
from xmixup_jax.run.inputs import check_inputs, open_data
from xmixup_jax.run.start import find_match, report_match
from xmixup_jax.run.train import backbone_weights
from xmixup_jax.text import one_line


def show_match(match: ClassMatch, data: Data, workdir: Path) -> None:
    """Writes match.json, and prints one line per target class in the first process."""
    workdir.mkdir(parents=True, exist_ok=True)
    report_match(workdir, match, data)
    if not is_first():
        return
    assert data.source is not None  # as there is a match
    targets, sources = readable(data.target.class_names), readable(data.source.class_names)
    width = min(30, max(map(len, targets)))
    for target, classes, similarity in zip(targets, match.classes, match.similarity, strict=True):
        pairs = zip(classes, similarity, strict=True)
        words = ', '.join(f'{sources[c]} ({value:.3f})' for c, value in pairs)
        print(f'{target:{width}}  <-  {words}')


def run(argv: list[str]) -> None:
    """Matches the classes of the configuration's data."""
    config, workdir = read_command(argv)
    if not method_of(config).pairs:
        pairing = ', '.join(name for name, method in METHODS.items() if method.pairs)
        raise ConfigError(
            f'config.method={config.method} does not match classes: use one of {pairing}'
        )
    check_inputs(config)
    weights = backbone_weights(config)
    data = open_data(config)
    data.log_usage()
    match = find_match(config, weights, data)
    show_match(match, data, workdir)
    if is_first():
        show(data)
        print(f'->  {one_line(workdir / MATCH)}')
