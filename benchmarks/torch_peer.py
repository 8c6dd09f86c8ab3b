"""Compares training steps of fine-tuning and mixup with PyTorch's, in turns on one machine:

    python -m benchmarks.torch_peer --config=configs/tiny_caltech.py \\
        --config.model.name=resnet18 --config.model.width=64 --config.model.stem=imagenet

Needs torch, torchvision and timm (`pip install -e '.[test]'`), and uses timm's or torchvision's
network of the same name. Batches are uint8 on the device; in both frameworks, the step includes
crop, flip, normalisation, mixing, forward, backward and SGD. PyTorch runs eagerly, with
channels_last, and compiled with channels_last; under autocast with --config.precision=bfloat16. The
last columns are our images/s divided by PyTorch's in that row; XMixup is compared with PyTorch's
mixup, which mixes the same number of images.

  --methods  methods of ours, comma-separated (default: finetune,xmixup,mixup)
  --output   CSV file to write
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
import torch

from benchmarks import synthetic
from tests.torch_networks import peer
from xmixup_jax.cli.flags import read_command
from xmixup_jax.cli.program import run_and_exit, use_huge_pages
from xmixup_jax.compute import augment, cost
from xmixup_jax.devices import chosen_precision

CLASSES = 100
OURS = {'finetune': 'finetune', 'xmixup': 'mixup', 'mixup': 'mixup'}


class Peer:
    """A training step in PyTorch, in one of its modes."""

    def __init__(self, config, device: str, channels_last: bool, compiled: bool):
        self.config, self.device = config, device
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        network = peer(config.model.name, CLASSES, config.image_size)
        self.network = network.to(device, memory_format=self.memory_format).train()
        optimizer = config.optimizer
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            optimizer.learning_rate,
            optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            nesterov=optimizer.nesterov,
        )
        mean, std = augment.normalization(config.model)
        self.mean = 255 * torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(3, 1, 1)
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def view(self, images):
        """Crops each image at random, mirrors it at random, and normalises it."""
        count, side, size = len(images), images.shape[1], self.config.image_size
        corner = torch.randint(0, side - size + 1, (2, count, 1), device=self.device)
        places = corner + torch.arange(size, device=self.device)
        flip = torch.rand(count, 1, device=self.device) < 0.5
        columns = torch.where(flip & self.config.flip, places[1].flip(1), places[1])
        batch = torch.arange(count, device=self.device)[:, None, None]
        images = images[batch, places[0][:, :, None], columns[:, None, :]]
        images = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        return images.contiguous(memory_format=self.memory_format)

    def _loss(self, images, labels, lam):
        images = self.view(images)
        entropy = torch.nn.functional.cross_entropy
        if lam is None:
            return entropy(self.network(images), labels)
        weight = lam.view(-1, 1, 1, 1)
        logits = self.network(weight * images + (1 - weight) * images.roll(1, 0))
        terms = entropy(logits, labels, reduction='none')
        others = entropy(logits, labels.roll(1, 0), reduction='none')
        return (lam * terms + (1 - lam) * others).mean()

    def step(self, images, labels, mixing: bool) -> None:
        lam = None
        if mixing:
            concentration = torch.full((len(labels),), self.config.mixup.alpha, device=self.device)
            lam = torch.distributions.Beta(concentration, concentration).sample()
        enabled = self.config.precision == 'bfloat16'
        with torch.autocast(self.device, torch.bfloat16, enabled=enabled):
            loss = self.loss(images, labels, lam)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.device == 'cuda':
            torch.cuda.synchronize()


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='torch_peer', add_help=False)
    parser.add_argument('--methods', default=','.join(OURS))
    parser.add_argument('--output', type=Path)
    args, rest = parser.parse_known_args(argv)
    config, _ = read_command(rest)
    config.precision = chosen_precision(config.precision)
    beside = {name: OURS[name] for name in args.methods.split(',')}
    device = 'cuda' if torch.cuda.is_available() and jax.default_backend() == 'gpu' else 'cpu'
    batches = [synthetic.batch(config, CLASSES, i) for i in range(cost.BATCHES)]
    tensors = [
        [torch.from_numpy(batch[key]).to(device) for key in ('image', 'label')] for batch in batches
    ]
    for pair in tensors:
        pair[1] = pair[1].long()
    peers = {
        'plain': Peer(config, device, channels_last=False, compiled=False),
        'channels_last': Peer(config, device, channels_last=True, compiled=False),
        'compiled': Peer(config, device, channels_last=True, compiled=True),
    }
    actions = {
        f'torch {way} {method}': lambda i, peer=peer, mixing=method == 'mixup': peer.step(
            *tensors[i % len(tensors)], mixing
        )
        for way, peer in peers.items()
        for method in dict.fromkeys(beside.values())
    }
    with synthetic.starts(config, list(beside), CLASSES) as (starts, ours, _):
        states = {name: start.state for name, start in starts.items()}

        def our_step(name: str, i: int) -> None:
            start = starts[name]
            inputs = cost.drop_unused(ours[i % len(ours)], start.task.config)
            states[name], metrics = start.task.train_steps(
                start.constants, states[name], {}, inputs
            )
            jax.block_until_ready((states[name], metrics))

        actions |= {f'jax {name}': lambda i, name=name: our_step(name, i) for name in beside}
        times = {name: float(np.median(each)) for name, each in cost.in_turns(actions).items()}
    print(
        f'{config.model.name}, {config.image_size} px, batch {config.batch_size}, '
        f'{config.precision}, {jax.devices()[0].device_kind}, torch {torch.__version__}, '
        f'jax {jax.__version__}'
    )
    rows = []
    for name, ms in times.items():
        row = {'step': name, 'step ms': ms, 'images/s': 1e3 * config.batch_size / ms}
        for method, theirs in beside.items():
            same = name.startswith('torch') and name.endswith(theirs)
            row[f'jax {method} / this'] = ms / times[f'jax {method}'] if same else ''
        rows.append(row)
    synthetic.write_table(rows, args.output)


if __name__ == '__main__':
    use_huge_pages()
    run_and_exit(run, sys.argv)
