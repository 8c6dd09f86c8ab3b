"""Does everything slow in advance, so that training starts at once.

    xmixup prepare --config=configs/cub.py

Downloads and converts the data sets, finds every record's label, fetches the weights (or trains
the network on the source), computes the class features and matches the classes. Leaves everything
where the same run will look for it. It can be interrupted: the same command goes on, and does
nothing twice. Ends with a table of the target's classes and everything about the data that looks
wrong.

Takes the same flags as `xmixup train`. (`python -m xmixup_jax prepare` is the same.)
"""

import logging
import time

from xmixup_jax.cli.flags import read_command
from xmixup_jax.cli.match import show_match
from xmixup_jax.data.inspection import show
from xmixup_jax.data.sources import find_source
from xmixup_jax.errors import DataError, raise_all
from xmixup_jax.files import MATCH
from xmixup_jax.methods.find import method_of
from xmixup_jax.run.inputs import check_inputs, data_sets, open_data
from xmixup_jax.run.start import find_match
from xmixup_jax.run.train import backbone_weights

log = logging.getLogger('xmixup_jax')


def run(argv: list[str]) -> None:
    """Goes through the steps."""
    config, workdir = read_command(argv)
    begun = time.perf_counter()

    def done(what: str) -> None:
        log.info('%7.1f s  %s', time.perf_counter() - begun, what)

    missing = {}
    for name in data_sets(config).values():
        try:
            source, what = find_source(name)
            folder = source.prepare(what, config)
        except DataError as error:  # what the other data sets need is said in the same message
            missing[name] = str(error)
        else:
            if folder:
                done(f'{name} is in {folder}')
    raise_all(missing)
    check_inputs(config)
    weights = backbone_weights(config)
    done(f'weights are in {weights.path}' if weights else 'no weights: random ones')
    data = open_data(config)
    done('data sets are open')
    data.log_usage()
    if method_of(config).pairs:
        show_match(find_match(config, weights, data), data, workdir)
        done(f'classes are matched; also in {workdir / MATCH}')
    show(data)
    print('prepared; now run  xmixup train  with the same flags')
