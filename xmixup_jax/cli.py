"""XMixup: train an image classifier on few images, with help from a large labelled data set.

    xmixup train --config=configs/digits.py        train and test; writes a report
    xmixup match --config=configs/digits.py        show which source class helps which class
    xmixup compare --config=configs/digits.py --methods=xmixup,finetune --workdir=runs/compare
                                                   several methods and seeds, in one table
    xmixup predict --workdir=RUN photo.jpg dir/    classes of other images
    xmixup export --workdir=RUN --format=torch     weights for other programs
    xmixup prepare --config=configs/cub.py         download and convert in advance

`xmixup COMMAND --help` explains one of them. The first needs no download: it trains on digits that
come inside Python packages. Documentation: README.md and docs/.
"""

import ast
import importlib.util
import signal
import sys
from pathlib import Path

COMMANDS = {
    'train': 'xmixup_jax.main',
    'match': 'xmixup_jax.match',
    'compare': 'xmixup_jax.compare',
    'predict': 'xmixup_jax.predict',
    'export': 'xmixup_jax.export',
    'prepare': 'xmixup_jax.prepare',
}
HELP = {'-h', '--help', '-help', 'help'}


def help_text(module: str) -> str:
    """A module's docstring, without importing it, and JAX with it, which takes seconds."""
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding='utf-8')
    return ast.get_docstring(ast.parse(source))


def main() -> None:
    """The console command `xmixup`."""
    name, *rest = sys.argv[1:] or ['--help']
    if HELP & {name, *rest}:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    if name in HELP:
        print(__doc__)
    elif name == '--version':
        print(importlib.import_module('xmixup_jax').__version__)
    elif name not in COMMANDS:
        print(
            f'xmixup: there is no command {name!r}: {", ".join(COMMANDS)}; try  xmixup --help',
            file=sys.stderr,
        )
        sys.exit(2)
    elif HELP & set(rest):
        print(help_text(COMMANDS[name]))
    else:
        sys.path.insert(0, str(Path.cwd()))  # for configs/, as with `python -m`
        program = importlib.import_module(COMMANDS[name])
        importlib.import_module('xmixup_jax.main').ended(program.run, [f'xmixup {name}', *rest])


if __name__ == '__main__':
    main()
