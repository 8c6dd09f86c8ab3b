"""`python -m xmixup_jax.main` is the same as `xmixup train`."""

import sys

from xmixup_jax.cli.program import main

if __name__ == '__main__':
    sys.argv.insert(1, 'train')
    main()
