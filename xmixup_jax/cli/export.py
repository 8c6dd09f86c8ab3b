r"""Converts a trained network for other programs, with a model card.

    xmixup export --workdir=runs/digits-xmixup-seed0 --format=torch

  --workdir=DIR   the folder of a finished run (required)
  --format=NAME   safetensors (the default) or torch: the weights with timm's keys; orbax: the
                  weights as this program's pytrees; onnx or stablehlo (a serialised jax.export
                  function for CPU, CUDA and TPU): the network from uint8 images to logits, for any
                  batch size
  --output=PATH   a file, or a folder that gets a file named by the format (default: DIR/export/)
  --network=NAME  final (default): the network that the run ended with; best: the one with the
                  highest top-1 in the tests of --config.eval_every; ema: the moving average of
                  --config.ema_decay

Two files appear next to the network. PATH.json has the class names and the preprocessing of one
view, the centre crop; an ONNX file also has them in its metadata. PATH.md is the model card: data,
training, scores, limits, licences, and how to load the file. Exported weights can be the
--config.weights of another run. The head has the target's classes only.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np

import xmixup_jax
from xmixup_jax.cli.program import Parser
from xmixup_jax.compute import augment
from xmixup_jax.errors import ConfigError, DataError
from xmixup_jax.files import atomic_write, write_json
from xmixup_jax.models.onnx_export import to_onnx
from xmixup_jax.predictor import NETWORKS, TrainedModel, load
from xmixup_jax.report.card import MARK, card
from xmixup_jax.report.facts import read_run
from xmixup_jax.text import one_line
from xmixup_jax.trees import write_tree
from xmixup_jax.weights.files import save_weights, torch_tensors
from xmixup_jax.weights.licences import licence_of

FILES = {
    'safetensors': 'model.safetensors',
    'torch': 'model.pth',
    'orbax': 'orbax',
    'onnx': 'model.onnx',
    'stablehlo': 'model.jax_export',
}


def export(trained: TrainedModel, form: str, output: Path) -> None:
    """Writes the network in one of `FILES`' formats, `output`.json, and the card `output`.md.

    Raises:
      ConfigError: somebody else's file is where the card would be.
      DataError: `torch` or `onnx` is asked for and its package is not installed.
    """
    _check_card(_card_path(output))
    config, model = trained.config, trained.config.model
    mean, std = augment.normalization(model)
    description = {
        'model': model.to_dict(),
        'class_names': trained.class_names,
        'resize': config.resize,
        'fit': config.fit,
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
    elif form == 'onnx':
        _save_onnx(output, trained, {key: json.dumps(value) for key, value in description.items()})
    else:
        (batch,) = jax.export.symbolic_shape('batch')
        shape = (batch, config.image_size, config.image_size, 3)
        exported = jax.export.export(jax.jit(trained.logits), platforms=('cpu', 'cuda', 'tpu'))(
            jax.ShapeDtypeStruct(shape, np.uint8)
        )
        with atomic_write(output) as partial:
            partial.write_bytes(exported.serialize())
    write_json(output.with_name(output.name + '.json'), description)
    with atomic_write(_card_path(output)) as partial:
        partial.write_text(_card(trained, form, output.name), encoding='utf-8')


def _card_path(output: Path) -> Path:
    return output.with_name(output.name + '.md')


def _check_card(path: Path) -> None:
    """Refuses to overwrite a card that was edited, or another file.

    Raises:
      ConfigError: it is one.
    """
    if path.exists() and MARK not in path.read_text(encoding='utf-8', errors='replace'):
        raise ConfigError(
            f'{one_line(path)} is not, or no longer, a card that this command wrote: move it, or '
            'choose another --output'
        )


def _card(trained: TrainedModel, form: str, file: str) -> str:
    config = trained.config
    networks = {name: network for network, name in NETWORKS.items()}
    network = networks.get(trained.path.name)
    return card(
        config,
        trained.class_names,
        network or 'final',
        read_run(trained.path.parent) if network else None,
        None if config.weights in ('', 'source') else licence_of(config.weights),
        form,
        file,
        xmixup_jax.__version__,
    )


def _save_torch(output: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        import torch
    except ImportError as error:
        raise DataError(
            '--format=torch needs PyTorch: run  pip install torch , or take --format=safetensors'
        ) from error
    with atomic_write(output) as partial:
        torch.save({key: torch.from_numpy(array) for key, array in tensors.items()}, partial)


def _save_onnx(output: Path, trained: TrainedModel, metadata: dict[str, str]) -> None:
    try:
        model = to_onnx(trained.logits, trained.config.image_size, metadata)
    except ImportError as error:
        raise DataError(
            '--format=onnx needs the package onnx: run  pip install onnx , or take '
            '--format=stablehlo'
        ) from error
    with atomic_write(output) as partial:
        partial.write_bytes(model.SerializeToString())


def output_path(output: str | None, workdir: Path, form: str) -> Path:
    """Where to write: `output`, or a file in it if it is a folder.

    An orbax checkpoint is a folder itself: one that `export` wrote is written anew.

    Raises:
      ConfigError: a file is in the way.
    """
    if output is None:
        return workdir / 'export' / FILES[form]
    path = Path(output)
    earlier = form == 'orbax' and path.with_name(f'{path.name}.json').is_file()
    is_folder = output.endswith((os.sep, '/')) or (path.is_dir() and not earlier)
    path = path / FILES[form] if is_folder else path
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise ConfigError(f'--output={one_line(output)}: {one_line(there)} is a file, not a folder')
    return path


def run(argv: list[str]) -> None:
    """Parses the flags and exports."""
    parser = Parser('export')
    parser.add_argument('--workdir', required=True, type=Path)
    parser.add_argument('--format', default='safetensors', choices=FILES)
    parser.add_argument('--output')
    parser.add_argument('--network', default='final', choices=NETWORKS)
    args = parser.parse_args(argv[1:])
    output = output_path(args.output, args.workdir, args.format)
    trained = load(args.workdir, args.network)
    export(trained, args.format, output)
    print(f'{one_line(trained.path)}  ->  {one_line(output)}')
