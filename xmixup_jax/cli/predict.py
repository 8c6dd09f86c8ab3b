"""What a trained network says of images.

    xmixup predict --workdir=runs/digits-xmixup-seed0 photo.jpg more_photos/
    xmixup predict --workdir=runs/mine --format=csv --top=1 photos/ > classes.csv

  IMAGE ...       image files, and folders, which are searched for images
  --workdir=DIR   the folder of a finished run (or a .safetensors file that `export` wrote)
  --format=NAME   table (default), csv or json
  --top=N         classes for each image (default: 5; 0: all)
  --batch_size=N  images that go through the network at a time (default: 64)

Images of any size, in any format that OpenCV or Pillow reads. What cannot be decoded is named, the
others are predicted all the same, and the exit code is 1. The same from Python:

    model = xmixup_jax.load('runs/digits-xmixup-seed0')
    model.predict(['photo.jpg'])

"""

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from PIL import Image
from tqdm import tqdm

from xmixup_jax.cli.program import setup
from xmixup_jax.data.decode import image_suffixes
from xmixup_jax.errors import DataError, UserError
from xmixup_jax.predictor import Prediction, load

FORMATS = ('table', 'csv', 'json')


def find_images(paths: list[Path]) -> list[Path]:
    """The files among `paths`, and what looks like an image in the folders among them.

    Raises:
      DataError: one does not exist, or a folder holds no image.
    """
    Image.init()
    suffixes = {*image_suffixes(), *Image.registered_extensions()}
    found = []
    for path in paths:
        if path.is_file():
            found.append(path)
            continue
        files = sorted(file for file in path.rglob('*') if file.is_file())
        within = [file for file in files if file.suffix.lower() in suffixes]
        if not within:
            what = 'holds no images' if path.is_dir() else 'does not exist'
            raise DataError(f'{path} {what}: name image files, or folders of them')
        found += within
    return found


def write(results: Iterable[tuple[Path, Prediction]], form: str, top: int, out: TextIO) -> None:
    """Writes predictions as they come.

    Args:
      results: files and what the network says of them.
      form: one of `FORMATS`.
      top: classes of each file.
      out: where to.
    """
    table = csv.writer(out, lineterminator='\n')
    if form == 'csv':
        table.writerow(['image', 'rank', 'class', 'probability'])
    before = '[\n'
    for path, prediction in results:
        pairs = list(zip(prediction.class_names, prediction.probabilities, strict=True))[:top]
        if form == 'table':
            print(path, *(f'{100 * p:6.2f} %  {name}' for name, p in pairs), sep='\n  ', file=out)
        elif form == 'csv':
            table.writerows([path, i, name, f'{p:.6f}'] for i, (name, p) in enumerate(pairs, 1))
        else:
            classes = [{'class': name, 'probability': round(float(p), 6)} for name, p in pairs]
            out.write(before + json.dumps({'image': str(path), 'classes': classes}))
            before = ',\n'
    if form == 'json':
        out.write('[]\n' if before == '[\n' else '\n]\n')


def run(argv: list[str]) -> None:
    """Parses the flags and predicts."""
    parser = argparse.ArgumentParser(
        prog='xmixup predict', add_help=False
    )  # `run_and_exit` gives help
    parser.add_argument('images', nargs='+', type=Path)
    parser.add_argument('--workdir', required=True, type=Path)
    parser.add_argument('--format', default='table', choices=FORMATS)
    parser.add_argument('--top', default=5, type=int)
    parser.add_argument('--batch_size', default=64, type=int)
    args = parser.parse_args(argv[1:])
    if args.top < 0 or args.batch_size < 1:
        parser.error('--top must be 0 or more, --batch_size 1 or more')
    model = load(args.workdir)
    setup(model.config.cache_dir)
    paths = find_images(args.images)
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
        raise UserError(f'{bad} of {len(paths)} images could not be decoded; they are named above')
