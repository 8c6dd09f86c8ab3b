"""Does all slow preparation in advance, so that training starts at once.

    xmixup prepare --config=configs/cub.py

Takes the same flags as `xmixup train`.

Downloads and converts the data sets, reads their labels, downloads the weights (or pre-trains the
network on the source), computes the class features and matches the classes. Writes everything to
--config.data_dir, --config.cache_dir and the folder of the run, where `xmixup train` finds it. If
it is interrupted, the same command resumes and repeats nothing.

Ends by printing a table of the images of each class, and everything about the data that looks
wrong.
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
    """Parses the flags and prepares everything."""
    config, workdir = read_command(argv)
    begun = time.perf_counter()

    def done(what: str) -> None:
        log.info('%7.1f s  %s', time.perf_counter() - begun, what)

    missing = {}
    for name in data_sets(config).values():
        try:
            source, what = find_source(name)
            folder = source.prepare(what, config)
        except DataError as error:  # go on, to report what all data sets need in one message
            missing[name] = str(error)
        else:
            if folder:
                done(f'{name} is in {folder}')
    raise_all(missing)
    check_inputs(config)
    weights = backbone_weights(config)
    done(
        f'weights are in {weights.path}'
        if weights
        else 'no weights: training starts from random ones'
    )
    data = open_data(config)
    done('data sets can be opened')
    data.log_usage()
    if method_of(config).pairs:
        show_match(find_match(config, weights, data), data, workdir)
        done(f'classes are matched; the match is in {workdir / MATCH}')
    show(data)
    print('Prepared. Now run  xmixup train  with the same flags.')
