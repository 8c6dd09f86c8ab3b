"""Predicts the classes of images with a trained network.

    xmixup predict --workdir=runs/digits-xmixup-seed0 photo.jpg more_photos/
    xmixup predict --workdir=runs/mine --format=csv --top=1 photos/ > classes.csv

  IMAGE ...       image files, or folders, which are searched for images at any depth (required);
                  put -- before names that begin with a dash
  --workdir=DIR   the folder of a finished run, or a .safetensors file that `export` wrote
                  (required)
  --network=NAME  final (default), the result of the run; best, the network with the highest top-1
                  in the tests during training (--config.eval_every); or ema, the moving average
                  of the weights (--config.ema_decay)
  --format=NAME   table (default), csv or json
  --top=N         classes to show for each image (default: 5; 0: all)
  --views=N       views of each image to average over (default: the run's config.test_views):
                  1, the centre crop; 2, also mirrored; 10, also the four corners, mirrored too
  --batch_size=N  images per batch (default: 64)

Writes the predictions to standard output. Images may have any size, and any format that can be used
in training. Other files in the folders are counted on standard error. Images that cannot be decoded
are named there and skipped; the exit code is then 1.

The same from Python:

    model = xmixup_jax.load('runs/digits-xmixup-seed0')
    model.predict(['photo.jpg'])

"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from xmixup_jax.cli.program import Parser, setup
from xmixup_jax.compute.views import VIEWS
from xmixup_jax.data.sources import listing
from xmixup_jax.errors import DataError, UserError
from xmixup_jax.predictor import NETWORKS, Prediction, load
from xmixup_jax.text import one_line, valid_text

FORMATS = ('table', 'csv', 'json')


def find_images(paths: list[Path]) -> tuple[list[Path], Counter[str]]:
    """Lists the files among `paths`, and all images in the folders among them.

    Returns:
      (files, left_out): left_out counts the other files in the folders by kind.

    Raises:
      DataError: a path does not exist, or a folder contains no images.
    """
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                what = 'is a broken link' if path.is_symlink() else 'does not exist'
                raise DataError(f'{one_line(path)} {what}: name image files, or folders of them')
            found.append(path)
            continue
        within = listing.find_images(path)
        if not within.images:
            other = listing.format_counts(within.left_out)
            raise DataError(
                f'{one_line(path)} contains no images{other and f" (it has {other})"}: name image '
                'files, or folders of them'
            )
        found += [Path(image.path) for image in within.images]
        left_out += within.left_out
    return found, left_out


def write(results: Iterable[tuple[Path, Prediction]], form: str, top: int, out: TextIO) -> None:
    """Writes predictions one by one, as they are made.

    Args:
      results: files with their predictions.
      form: one of `FORMATS`.
      top: number of classes to write for each file.
      out: the stream to write to.
    """
    table = csv.writer(out, lineterminator='\n')
    if form == 'csv':
        table.writerow(['image', 'rank', 'class', 'probability'])
    before = '[\n'
    for path, prediction in results:
        pairs = list(zip(prediction.class_names, prediction.probabilities, strict=True))[:top]
        if form == 'table':
            lines = (f'{100 * p:6.2f} %  {one_line(name)}' for name, p in pairs)
            print(one_line(path), *lines, sep='\n  ', file=out)
        elif form == 'csv':
            shown = valid_text(str(path))
            table.writerows([shown, i, name, f'{p:.6f}'] for i, (name, p) in enumerate(pairs, 1))
        else:
            classes = [{'class': name, 'probability': round(float(p), 6)} for name, p in pairs]
            out.write(before + json.dumps({'image': valid_text(str(path)), 'classes': classes}))
            before = ',\n'
    if form == 'json':
        out.write('[]\n' if before == '[\n' else '\n]\n')


def run(argv: list[str]) -> None:
    """Parses the flags and predicts."""
    parser = Parser('predict')
    parser.add_argument('images', nargs='+', type=Path, metavar='IMAGE')
    parser.add_argument('--workdir', required=True, type=Path)
    parser.add_argument('--network', default='final', choices=NETWORKS)
    parser.add_argument('--format', default='table', choices=FORMATS)
    parser.add_argument('--top', default=5, type=int)
    parser.add_argument('--views', type=int, choices=VIEWS)
    parser.add_argument('--batch_size', default=64, type=int)
    args = parser.parse_args(argv[1:])
    if args.top < 0 or args.batch_size < 1:
        parser.error('--top must be at least 0, and --batch_size at least 1')
    paths, left_out = find_images(args.images)
    model = load(args.workdir, args.network, args.views)
    setup(model.config.cache_dir)
    print(f'xmixup: {model.describe()}', file=sys.stderr)
    if left_out:
        print(f'xmixup: left out: {listing.format_counts(left_out)}', file=sys.stderr)
    bad = 0

    def decoded() -> Iterator[tuple[Path, Prediction]]:
        nonlocal bad
        bar = tqdm(paths, 'predict', unit='image', disable=None, leave=False)
        for path, result in zip(paths, model.stream(bar, args.batch_size), strict=True):
            if isinstance(result, DataError):
                tqdm.write(f'xmixup: {result}', file=sys.stderr)
                bad += 1
            else:
                yield path, result

    write(decoded(), args.format, args.top or len(model.class_names), sys.stdout)
    if bad:
        raise UserError(f'{bad} of {len(paths)} images could not be decoded; see the lines above')
