"""The experiment that the pictures show, and what several pictures are made of."""

import csv
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from matplotlib.figure import Figure

from configs import digits
from xmixup_jax import losses, match_classes
from xmixup_jax.compute.augment import denormalize, training_view
from xmixup_jax.compute.features import backbone_class_means, images_of
from xmixup_jax.compute.step import network
from xmixup_jax.config import choose_method
from xmixup_jax.data.pairing import train_batches
from xmixup_jax.data.selection import open_split
from xmixup_jax.methods import METHODS
from xmixup_jax.methods.find import options_of
from xmixup_jax.models import create_model
from xmixup_jax.run.inputs import open_data
from xmixup_jax.run.train import backbone_weights, train_and_evaluate
from xmixup_jax.weights.find import find_weights
from xmixup_jax.weights.pretrained import Weights

WIDTH = 7.0  # inches
BLUE, ORANGE, GREY = '#1f77b4', '#e8710a', '0.72'


class Bench:
    """The digits experiment: its data, its pre-trained network, and runs of it."""

    def __init__(self, runs: Path):
        """Args: runs: a folder for the runs."""
        self.runs = runs
        self.config = digits.get_config()
        self.config.update({'report': False, 'log_every': 5, 'checkpoint_every': 600})
        self.weights = backbone_weights(self.config)
        self.data = open_data(self.config)
        self.names = self.data.target.class_names
        graphdef, params, batch_stats = create_model(self.config.model, 10, 20, 0)
        self.params, self.batch_stats = self.weights.fill(params, batch_stats, with_head=True)
        self.forward = partial(network, graphdef)
        self.images, self.labels = images_of(self.config, self.data.target)
        self.outputs = self.forward(self.params, self.batch_stats, self.images)

    @cached_property
    def means(self):
        """The mean features of the classes of target and source, [10, D] each."""
        each = partial(backbone_class_means, self.config, self.weights)
        return each(self.data.target), each(self.data.source)

    @cached_property
    def match(self):
        """The source class of each target class."""
        return match_classes(*self.means)

    def configured(self, method, **options):
        """The configuration of a method, with values of its options."""
        config = self.config.copy_and_resolve_references()
        choose_method(config, method)
        if options:
            config[method].update(options)
        return config

    def batch(self, method, seed=0, **options):
        """The first batch as it comes from the input, and what the method's transform makes of it.

        Both have images float32 [B, 20, 20, 3] in the network's normalisation.
        """
        config, pairs = self.configured(method, **options), METHODS[method].pairs
        batches = train_batches(
            self.data,
            self.match if pairs else None,
            seed=seed,
            batch_size=config.batch_size,
            resize=config.resize,
            num_threads=1,
        )
        batch = next(iter(batches))
        keys = jax.random.split(jax.random.key(seed), len(batch['label']))
        for name in ('image', 'source_image'):
            if name in batch:
                batch[name] = training_view(config, keys, batch[name])
        return batch, transformed(config, keys, batch)

    @cached_property
    def novel(self):
        """A task of new classes: a network trained on MNIST's 0 to 4, and images of 5 to 9.

        `images` [50, 20, 20, 3] and `labels` [50] from 0, of held-out images; `outputs` of the
        network for them, with its own head of five columns; `temperature`, which calibrates it.
        """
        weights = backbone_weights(self.config, self.data.source.restrict(np.arange(5)))
        graphdef, *states = create_model(self.config.model, 5, 20, 0)
        run = partial(network, graphdef, *weights.fill(*states, with_head=True))
        held_out = open_split(self.config.source, self.config.source.test_split, self.config)
        known, known_labels = images_of(self.config, held_out.restrict(np.arange(5)))
        images, labels = images_of(self.config, held_out.restrict(np.arange(5, 10)))
        some = np.concatenate([np.flatnonzero(labels == c)[:10] for c in range(5)])
        temperature = losses.fit_temperature(np.asarray(run(known).logits), known_labels)
        return SimpleNamespace(
            images=images[some],
            labels=labels[some],
            forward=run,
            outputs=run(images[some]),
            temperature=temperature,
        )

    def trained(self, method, **options):
        """Trains for config.steps; returns params, batch statistics and the loss by step."""
        values = '-'.join(f'{key}{value}' for key, value in options.items())
        folder = self.runs / f'{method}{values}'
        train_and_evaluate(self.configured(method, **options), folder)
        weights = Weights(find_weights(str(folder)), self.config.model.name)
        logits = len(weights.head['bias'])
        graphdef, *states = create_model(self.config.model, logits, 20, 0)
        rows = list(csv.DictReader((folder / 'metrics.csv').open()))
        curve = np.array([(row['step'], row['loss']) for row in rows if row['loss']], float)
        return SimpleNamespace(
            graphdef=graphdef,
            states=weights.fill(*states, with_head=True),
            curve=curve,
        )


def transformed(config, keys, batch):
    """What the transform of config.method makes of a batch, on one device."""
    transform = partial(METHODS[config.method].transform, options_of(config))
    one_device = jax.tree.map(lambda x: x[None], (keys, batch))
    changed = jax.vmap(transform, axis_name='batch')(*one_device)
    return jax.tree.map(lambda x: x[0], changed)


def panels(rows=1, columns=1, height=2.4, **arguments):
    """A figure of the pages' width, and its axes."""
    figure = Figure((WIDTH, height), layout='constrained')
    return figure, figure.subplots(rows, columns, **arguments)


def show(axis, image, title='', colour='black'):
    """A picture without ticks."""
    axis.imshow(np.asarray(image), cmap='gray')
    axis.set_title(title, color=colour)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def rows_of_images(bench, rows, columns=8):
    """Rows of (name, images [B, ...], titles, colour), as the network sees them."""
    figure, axes = panels(len(rows), columns, 0.25 + 1.0 * len(rows), squeeze=False)
    for line, (name, images, titles, colour) in zip(axes, rows, strict=True):
        images = denormalize(images, bench.config.model)
        for axis, image, title in zip(line, images, titles, strict=False):
            show(axis, image, title, colour)
        line[0].set_ylabel(name, color=colour, rotation=0, ha='right', va='center')
    return figure
