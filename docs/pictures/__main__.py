"""Draws the pictures of the methods' pages into docs/images/methods/.

    python docs/pictures            # all of them
    python docs/pictures xmixup bss

Every picture is computed by the package's own functions on the digits experiment
(configs/digits.py): MNIST as the source, UCI digits with five images a class as the target. Nothing
is downloaded. The network that is trained on MNIST is kept in config.cache_dir.
"""

import logging
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import batches
import heads
import matplotlib
import penalties
from bench import Bench

from xmixup_jax.methods import METHODS

FOLDER = Path(__file__).parents[1] / 'images' / 'methods'
DOTS = 130  # per inch: 910 px, shown at about 700
STYLE = {
    'font.size': 9,
    'axes.titlesize': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'legend.frameon': False,
    'figure.facecolor': 'white',
    'image.cmap': 'Blues',
}


def drawing(name):
    """The function that draws a method; it ends in _ where a module has the name, too."""
    known = vars(batches) | vars(penalties) | vars(heads)
    return known.get(f'{name}_') or known[name]


def main(names):
    """Draws the pictures of these methods; of all without names."""
    logging.getLogger('absl').setLevel(logging.ERROR)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE), tempfile.TemporaryDirectory() as runs:
        bench = Bench(Path(runs))
        for name in names or METHODS:
            path = FOLDER / f'{name}.png'
            drawing(name)(bench).savefig(path, dpi=DOTS, pil_kwargs={'optimize': True})
            print(f'{path.name}: {path.stat().st_size / 1000:.0f} kB')


if __name__ == '__main__':
    main(sys.argv[1:])
