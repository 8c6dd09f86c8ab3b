"""Tests a trained network on other labelled images.

    xmixup evaluate --workdir=runs/mine --data=folder:other_photos
    xmixup evaluate --workdir=runs/mine --data=csv:list.csv --split=holdout --output=holdout/

  --workdir=DIR    the folder of a finished run, or a .safetensors file of a run (required)
  --data=NAME      the images (required): folder:PATH, csv:FILE or the name of a tfds data set;
                   all of their classes must be classes of the run
  --split=NAME     the split to test on (default: test, or all images of data without splits)
  --network=NAME   final (default), the result of the run; best, the network with the highest top-1
                   in the tests during training (--config.eval_every); or ema, the moving average
                   of the weights (--config.ema_decay)
  --output=DIR     folder for the results (default: evaluation-NAME in the folder of the run)
  --views=N        views of each image to average over (default: the run's config.test_views):
                   1, the centre crop; 2, also mirrored; 10, also the four corners, mirrored too
  --batch_size=N   images per batch (default: 64)

Prints top-1, macro top-1 and macro F1. Writes result.json, per_class.csv, confusion.csv,
predictions.csv and report.html, like the test of a run. A line on standard error says which network
is tested and which files of the data are left out.
"""

import contextlib
import sys
from pathlib import Path

from ml_collections import ConfigDict

from xmixup_jax import defaults
from xmixup_jax.cli.program import Parser, setup
from xmixup_jax.compute.views import VIEWS
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import open_split, renumber
from xmixup_jax.data.sources import short_name
from xmixup_jax.data.sources.splits import NoSplit
from xmixup_jax.errors import DataError
from xmixup_jax.files import RESULT, write_json
from xmixup_jax.predictor import NETWORKS, TrainedModel, load
from xmixup_jax.report.evaluation import write_report
from xmixup_jax.report.scores import scores, write_scores
from xmixup_jax.text import one_line


def open_labelled(name: str, split: str, model: TrainedModel) -> Records:
    """Opens labelled images whose classes are those of a network.

    Args:
      name: name of the data set.
      split: name of the split; '' means 'test', or all images of a data set without splits.
      model: the network, for its classes and their order, and for the folders of its data.

    Returns:
      the records, labelled with the network's classes.

    Raises:
      DataError: they cannot be opened, or have a class that the network does not know.
    """
    config = model.config.copy_and_resolve_references()
    records = _open(name, split, config)
    unknown = [each for each in records.class_names if each not in model.class_names]
    if unknown:
        raise DataError(
            f'{len(unknown)} of {len(records.class_names)} classes of {name} are unknown to '
            f'{one_line(model.path)} (for example {unknown[0]!r}; it has, for example, '
            f'{model.class_names[0]!r}): rename the class folders, or leave those classes out'
        )
    return renumber(records, model.class_names)


def _open(name: str, split: str, config: ConfigDict) -> Records:
    dataset = defaults.dataset(name, 'train', split or 'test')
    dataset.test_share = config.target.test_share  # the run's own test images, if it is its data
    config.target = dataset
    if not split:
        with contextlib.suppress(NoSplit):  # raised if the data set has splits
            return open_split(dataset, '', config)
    try:
        return open_split(dataset, split or 'test', config)
    except NoSplit as error:
        raise DataError(f'{error.what}: name one with --split') from error


def run(argv: list[str]) -> None:
    """Parses the flags, tests the network, and writes the results."""
    parser = Parser('evaluate')
    parser.add_argument('--workdir', required=True, type=Path)
    parser.add_argument('--data', required=True)
    parser.add_argument('--split', default='')
    parser.add_argument('--network', default='final', choices=NETWORKS)
    parser.add_argument('--output', type=Path)
    parser.add_argument('--views', type=int, choices=VIEWS)
    parser.add_argument('--batch_size', default=64, type=int)
    args = parser.parse_args(argv[1:])
    if args.batch_size < 1:
        parser.error('--batch_size must be at least 1')
    model = load(args.workdir, args.network, args.views)
    setup(model.config.cache_dir)
    records = open_labelled(args.data, args.split, model)
    print(f'xmixup: {model.describe()}; {records.usage_line()}', file=sys.stderr)
    tested = model.test(records, args.batch_size)
    if not len(tested.label):
        raise DataError(
            f'none of the {len(records)} images of {args.data} can be decoded: replace them, or '
            'name other images with --data'
        )
    output = args.output or model.path.parent / f'evaluation-{short_name(args.data)}'
    output.mkdir(parents=True, exist_ok=True)
    figures = scores(tested)
    result = {
        'network': str(model.path),
        'data': args.data,
        'split': args.split,
        'digest': records.identity,
        'views': model.config.test_views,
        **figures,
        'test_images': len(tested.label),
        'skipped_images': records.skipped,
        'left_out': dict(records.left_out),
        'num_classes': len(model.class_names),
    }
    write_json(output / RESULT, result)
    write_scores(output, tested, records)
    write_report(output, model, result, records, tested)
    print(
        f'top1 {100 * figures["top1"]:.2f} %, macro top1 {100 * figures["macro_top1"]:.2f} %, '
        f'macro F1 {100 * figures["macro_f1"]:.2f} %  on {len(tested.label)} images of '
        f'{one_line(args.data)}  ->  {one_line(output)}'
    )
