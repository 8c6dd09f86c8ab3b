"""A trained network for other programs:

    python -m xmixup_jax.export --workdir=runs/digits-xmixup-seed0 --format=safetensors

  --workdir=DIR   the folder of a finished run
  --format=NAME   safetensors or torch (timm's keys), orbax (this program's pytrees), or stablehlo
                  (a serialised jax.export function from uint8 images to logits, for CPU, CUDA and
                  TPU, any batch size)
  --output=PATH   where to (default: DIR/export/ and a name by the format)

Beside it a JSON file says what the classes are and how images have to be prepared. All but
stablehlo can be given to --config.weights. The head is the target's alone.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from xmixup_jax import augment
from xmixup_jax.errors import DataError
from xmixup_jax.files import whole_file, write_json
from xmixup_jax.main import ended
from xmixup_jax.models import create_model, forward
from xmixup_jax.models.find_weights import WEIGHTS_FILE
from xmixup_jax.models.pretrained import Weights, read_metadata, save_weights, torch_tensors
from xmixup_jax.optimizer import HEAD
from xmixup_jax.trees import write_tree

PyTree = Any
FILES = {
    'safetensors': 'model.safetensors',
    'torch': 'model.pth',
    'orbax': 'orbax',
    'stablehlo': 'model.jax_export',
}


class Trained(NamedTuple):
    """The network of a finished run, with the target's head alone."""

    config: ConfigDict
    class_names: list[str]
    graphdef: Any
    params: PyTree
    batch_stats: PyTree


def load_trained(workdir: Path) -> Trained:
    """Reads what a finished run left.

    Raises:
      DataError: there is no finished run in the folder, or its weights cannot be read.
    """
    path = workdir / WEIGHTS_FILE
    if not path.is_file():
        raise DataError(f'{workdir} holds no finished run ({WEIGHTS_FILE} is missing)')
    config_and_names = read_metadata(path)
    config, names = ConfigDict(config_and_names['config']), config_and_names['class_names']
    weights = Weights(path, config.model.name)
    width = len(weights.head['bias'])
    _, params, batch_stats = create_model(config.model, width, config.image_size, 0)
    params, batch_stats = weights.fill(params, batch_stats, with_head=True)
    params[HEAD] = {key: leaf[..., : len(names)] for key, leaf in params[HEAD].items()}
    graphdef, _, _ = create_model(config.model, len(names), config.image_size, 0)
    return Trained(config, names, graphdef, params, batch_stats)


def logits_of(trained: Trained, images: jax.Array) -> jax.Array:
    """uint8 RGB [B, S, S, 3], S = config.image_size, to logits float32 [B, K]."""
    images = augment.normalize(images, trained.config.model)
    outputs, _ = forward(trained.graphdef, trained.params, trained.batch_stats, images, train=False)
    return outputs.logits


def export(trained: Trained, form: str, output: Path) -> None:
    """Writes the network in one of `FILES`' formats, and `output`.json.

    Raises:
      DataError: `torch` is asked for and PyTorch is not installed.
    """
    config, model = trained.config, trained.config.model
    mean, std = augment.normalization(model)
    description = {
        'model': model.to_dict(),
        'class_names': trained.class_names,
        'resize': config.resize,
        'image_size': config.image_size,
        'mean': mean,
        'std': std,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    if form == 'safetensors':
        metadata = {'class_names': trained.class_names, 'config': config.to_dict()}
        save_weights(output, model.name, trained.params, trained.batch_stats, metadata)
    elif form == 'torch':
        _save_torch(output, torch_tensors(model.name, trained.params, trained.batch_stats))
    elif form == 'orbax':
        write_tree(output, {'params': trained.params, 'batch_stats': trained.batch_stats})
    else:
        (batch,) = jax.export.symbolic_shape('batch')
        shape = (batch, config.image_size, config.image_size, 3)
        exported = jax.export.export(
            jax.jit(lambda images: logits_of(trained, images)), platforms=('cpu', 'cuda', 'tpu')
        )(jax.ShapeDtypeStruct(shape, np.uint8))
        with whole_file(output) as partial:
            partial.write_bytes(exported.serialize())
    write_json(output.with_name(output.name + '.json'), description)


def _save_torch(output: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        import torch
    except ImportError as error:
        raise DataError(
            '--format=torch needs PyTorch: run  pip install torch , or take --format=safetensors'
        ) from error
    with whole_file(output) as partial:
        torch.save({key: torch.from_numpy(array) for key, array in tensors.items()}, partial)


def run(argv: list[str]) -> None:
    """Parses the flags and exports."""
    parser = argparse.ArgumentParser(prog='export', add_help=False)  # `ended` gives help
    parser.add_argument('--workdir', required=True, type=Path)
    parser.add_argument('--format', default='safetensors', choices=FILES)
    parser.add_argument('--output', type=Path)
    args = parser.parse_args(argv[1:])
    output = args.output or args.workdir / 'export' / FILES[args.format]
    export(load_trained(args.workdir), args.format, output)
    print(f'{args.workdir}  ->  {output}')


if __name__ == '__main__':
    ended(run, sys.argv)
