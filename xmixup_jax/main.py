"""`python -m xmixup_jax.main` is the same as `xmixup train`."""

import sys

from xmixup_jax.cli.program import main

if __name__ == '__main__':
    main(['train', *sys.argv[1:]])
