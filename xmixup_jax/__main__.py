"""`python -m xmixup_jax COMMAND` is the same as `xmixup COMMAND`."""

from xmixup_jax.cli.program import main

if __name__ == '__main__':
    main()
