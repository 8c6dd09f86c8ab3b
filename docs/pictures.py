"""Draws the pictures of the methods' pages into docs/images/methods/.

    python docs/pictures.py            # all of them
    python docs/pictures.py xmixup bss

Every picture is computed by the package's own functions on the digits experiment
(configs/digits.py): MNIST as the source, UCI digits with five images a class as the target. Nothing
is downloaded. The network that is trained on MNIST is kept in config.cache_dir.
"""

import csv
import logging
import sys
import tempfile
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from scipy.special import softmax

from configs import digits
from xmixup_jax import losses, match_classes
from xmixup_jax.compute.augment import denormalize, training_view
from xmixup_jax.compute.features import backbone_class_means, images_of
from xmixup_jax.compute.step import network
from xmixup_jax.config import choose_method
from xmixup_jax.data.pairing import train_batches
from xmixup_jax.data.selection import open_split
from xmixup_jax.matching import domain_similarity
from xmixup_jax.methods import METHODS, bituning, delta, fsp, rifle, smile
from xmixup_jax.methods.find import options_of
from xmixup_jax.methods.parts import linear_classifier
from xmixup_jax.methods.stochnorm import StochNorm
from xmixup_jax.models import create_model, forward
from xmixup_jax.optimizer import HEAD
from xmixup_jax.run.inputs import open_data
from xmixup_jax.run.train import backbone_weights, train_and_evaluate
from xmixup_jax.weights.find import find_weights
from xmixup_jax.weights.pretrained import Weights

FOLDER = Path(__file__).parent / 'images' / 'methods'
WIDTH, DOTS = 7.0, 130  # inches, dots per inch: 910 px, shown at about 700
BLUE, ORANGE, GREY = '#1f77b4', '#e8710a', '0.72'
STYLE = {
    'font.size': 9,
    'axes.titlesize': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'legend.frameon': False,
    'figure.facecolor': 'white',
    'image.cmap': 'Blues',
}


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


def finetune(bench):
    batch, changed = bench.batch('finetune')
    assert np.array_equal(changed['image'], batch['image'])
    titles = [bench.names[y] for y in batch['label']]
    return rows_of_images(bench, [('batch', batch['image'], titles, 'black')])


def xmixup(bench):
    batch, mixed = bench.batch('xmixup', seed=3)
    selected = [bench.data.source.class_names[c] for c in bench.match.selected]
    target = [bench.names[y] for y in batch['label']]
    source = [selected[y] for y in batch['source_label']]
    titles = [
        f'{lam:.2f}: {t}\n{1 - lam:.2f}: s{s}'
        for lam, t, s in zip(mixed['lam'], target, source, strict=True)
    ]
    return rows_of_images(
        bench,
        [
            ('target', batch['image'], target, BLUE),
            ('source', batch['source_image'], [f's{name}' for name in source], ORANGE),
            ('mixed', mixed['image'], titles, 'black'),
        ],
    )


def _with_partner(bench, method, seed):
    batch, mixed = bench.batch(method, seed)
    partner = np.roll(np.arange(len(batch['label'])), 1)  # the record before
    assert np.array_equal(mixed['other_label'], batch['label'][partner])
    first, second = ([bench.names[y] for y in mixed[key]] for key in ('label', 'other_label'))
    titles = [
        f'{lam:.2f}: {a}\n{1 - lam:.2f}: {b}'
        for lam, a, b in zip(mixed['lam'], first, second, strict=True)
    ]
    return rows_of_images(
        bench,
        [
            ('image', batch['image'], first, BLUE),
            ('partner', batch['image'][partner], second, ORANGE),
            ('mixed', mixed['image'], titles, 'black'),
        ],
    )


def mixup(bench):
    return _with_partner(bench, 'mixup', seed=1)


def cutmix(bench):
    return _with_partner(bench, 'cutmix', seed=1)


def cotrain(bench):
    batch, both = bench.batch('cotrain')
    selected = [bench.data.source.class_names[c] for c in bench.match.selected]
    half = len(batch['label'])
    return rows_of_images(
        bench,
        [
            ("target's\nhead", both['image'][:half], [bench.names[y] for y in both['label']], BLUE),
            (
                "source's\nhead",
                both['image'][half:],
                [selected[y] for y in both['source_label']],
                ORANGE,
            ),
        ],
    )


def _kernels(params, start):
    """(name, kernel, its start) of each layer but the head; 'skip': a projection."""
    start = dict(jax.tree.leaves_with_path(start))
    for path, leaf in jax.tree.leaves_with_path(params):
        if path[-1].key == 'kernel' and path[0].key != HEAD:
            parts = [str(entry.key) for entry in path[:-1]]
            name = 'stem' if len(parts) == 1 else f'{parts[0][-1]}: {parts[2]}'
            yield name.replace('downsample', 'skip'), np.asarray(leaf), np.asarray(start[path])


def l2sp(bench):
    figure, axis = panels(height=2.3)
    for shift, (method, colour) in enumerate((('finetune', GREY), ('l2sp', BLUE))):
        params, _ = bench.trained(method).states
        names, *arrays = zip(*_kernels(params, bench.params), strict=True)
        moved = [np.linalg.norm(w - w0) / np.linalg.norm(w0) for w, w0 in zip(*arrays, strict=True)]
        axis.bar(np.arange(len(names)) + 0.4 * shift, moved, 0.4, color=colour, label=method)
    axis.set_xticks(np.arange(len(names)) + 0.2, names, rotation=70)
    axis.set(xlabel='stage: layer', ylabel='relative distance')
    figure.legend(*axis.get_legend_handles_labels(), loc='outside upper right', ncols=2)
    return figure


def mars(bench):
    distance = 2.0
    figure, axes = panels(1, 2, 2.5, sharey=True)
    runs = (('finetune', {}, GREY), ('mars', {'distance': distance}, BLUE))
    for axis, (method, options, colour) in zip(axes, runs, strict=True):
        params, _ = bench.trained(method, **options).states
        layers = list(_kernels(params, bench.params))
        for i, (_, w, w0) in enumerate(layers):
            norms = np.abs(w - w0).sum(axis=(0, 1, 2))
            axis.plot(i + np.linspace(-0.3, 0.3, len(norms)), norms, '.', color=colour, ms=3)
        axis.axhline(distance, color='black', lw=1)
        axis.set_xticks(range(len(layers)), [name for name, *_ in layers], rotation=70)
        axis.set_title(method if method == 'finetune' else f'mars.distance={distance:g}')
    axes[0].set_ylabel('distance (1-norm)')
    return figure


def delta_(bench):
    classifier = linear_classifier(np.asarray(bench.outputs.features), bench.labels)
    arguments = bench.params, bench.batch_stats, bench.images, bench.labels, classifier
    weights = delta.channel_weights(bench.forward, *arguments)
    figure, axes = panels(1, 4, 2.2, width_ratios=(2.4, 1, 1, 1))
    for i, each in enumerate(weights):
        rank = np.linspace(0, 1, len(each))
        axes[0].plot(rank, np.sort(each * len(each))[::-1], label=f'stage {i + 1}')
    axes[0].axhline(1, color='black', lw=0.5)
    axes[0].set(xlabel='channels, most important first', xticks=[], ylabel='weight × channels')
    axes[0].legend()
    show(axes[1], denormalize(bench.images[15], bench.config.model), 'image')
    order = np.argsort(weights[0])
    for axis, channel, words in zip(axes[2:], order[[-1, 0]], ('largest', 'smallest'), strict=True):
        value = weights[0][channel] * len(order)
        show(
            axis,
            bench.outputs.convs[0][15, ..., channel],
            f'{words} weight\nof stage 1: {value:.2f}',
        )
    return figure


def fsp_(bench):
    def flow_of(graphdef, params, batch_stats):
        stages = forward(graphdef, params, batch_stats, bench.images, train=False)[0].stages
        return np.asarray(fsp.flow(stages[0], stages[1]).mean(axis=0))

    plain, held = bench.trained('finetune'), bench.trained('fsp')
    start = flow_of(plain.graphdef, *bench.weights.fill(*plain.states))
    changes = [flow_of(run.graphdef, *run.states) - start for run in (plain, held)]
    limit = np.abs(changes[0]).max()
    figure, axes = panels(1, 3, 2.1)
    shown = axes[0].imshow(start, aspect='auto')
    figure.colorbar(shown, ax=axes[0])
    axes[0].set(title='pre-trained: G0', ylabel='channel before stage 2')
    for axis, change, method in zip(axes[1:], changes, ('finetune', 'fsp'), strict=True):
        shown = axis.imshow(change, aspect='auto', cmap='RdBu', vmin=-limit, vmax=limit)
        axis.set_title(f'{method}: G − G0')
    figure.colorbar(shown, ax=axes[2])
    axes[1].set_xlabel('channel after stage 2')
    return figure


def bss(bench):
    features = bench.outputs.features[:32]
    figure, axis = panels(height=2.5)
    values = partial(np.linalg.svd, compute_uv=False)
    places = np.arange(1, 33)
    axis.plot(places, values(features), 'o', color=GREY, label='features of 32 images')
    for k, marker in ((8, 'x'), (1, '.')):
        after = features - 0.25 * jax.grad(losses.batch_spectral_shrinkage)(features, k)
        axis.plot(
            places, values(after), marker, label=f'after a step of 0.25 on the penalty, k = {k}'
        )
    axis.set(xlabel='rank', ylabel='singular value', yscale='log')
    axis.legend()
    return figure


def _angle_cosines(bench, steps):
    """Cosines with the loss's gradient of L2-SP's gradient, their sum, and DTNH's, by step."""
    options = bench.config.dtnh

    def loss(params, images, labels):
        logits = bench.forward(params, bench.batch_stats, images).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def penalty(params):
        return options.alpha / 2 * losses.distance_to_start(params, bench.params)

    def cosine(a, b):
        norms = optax.tree.norm(a) * optax.tree.norm(b)
        return optax.tree.vdot(a, b) / jnp.maximum(norms, 1e-12)

    @jax.jit
    def step(params, images, labels):
        g, r = jax.grad(loss)(params, images, labels), jax.grad(penalty)(params)
        combined = losses.combine_gradients(g, r)
        others = r, optax.tree.add(g, r), combined
        params = optax.apply_updates(params, optax.tree.scale(-0.02, combined))
        return params, [cosine(g, each) for each in others]

    params, rng, rows = bench.params, np.random.default_rng(0), []
    for _ in range(steps):
        some = rng.choice(len(bench.images), 25, replace=False)
        params, cosines = step(params, bench.images[some], bench.labels[some])
        rows.append(cosines)
    return np.array(rows)


def dtnh(bench):
    cosines = _angle_cosines(bench, 300)
    figure, axes = panels(1, 2, 2.4)
    axes[0].plot(cosines[:, 0], '.', color=ORANGE, ms=3)
    axes[0].axhline(0, color='black', lw=1)
    axes[0].set(
        title="L2-SP's gradient r", xlabel='step', ylabel="cosine with the loss's gradient g"
    )
    axes[1].plot(cosines[:, 1], '.', color=GREY, ms=3, label='g + r')
    axes[1].plot(cosines[:, 2], '.', color=BLUE, ms=3, label='DTNH')
    axes[1].set(title='direction that is followed', xlabel='step')
    axes[1].legend()
    return figure


def seqtrain(bench):
    target, source = bench.means
    records = bench.data.source
    counts = np.bincount(bench.data.target.labels)
    similarity = domain_similarity(target, counts, source)
    chosen = np.argsort(-similarity)[:5]
    figure, axis = panels(height=2.3)
    colours = [BLUE if c in chosen else GREY for c in range(10)]
    axis.bar(range(10), similarity, color=colours)
    low, high = similarity.min(), similarity.max()
    axis.set(ylim=(low - (high - low), high + 0.6 * (high - low)), ylabel='exp(−0.01 EMD)')
    axis.set_xticks(range(10), [f'MNIST {name}' for name in records.class_names])
    for c, value in enumerate(similarity):
        first = int(np.flatnonzero(records.labels == c)[0])
        place = axis.inset_axes(
            (c - 0.3, value + 0.05 * (high - low), 0.6, 0.45 * (high - low)),
            transform=axis.transData,
        )
        show(place, records.image(first, 22))
    return figure


def lwf(bench):
    task = bench.novel
    figure, axes = panels(2, 4, 2.7, height_ratios=(1, 1.5))
    for column, label in zip(axes.T, (0, 2, 3, 4), strict=True):
        i = int(np.flatnonzero(task.labels == label)[0])
        show(column[0], denormalize(task.images[i], bench.config.model), f'target {5 + label}')
        for shift, (T, colour) in enumerate(((1.0, GREY), (2.0, BLUE))):
            values = softmax(np.asarray(task.outputs.logits[i]) / T)
            places = np.arange(5) + 0.4 * shift
            column[1].bar(places, values, 0.4, color=colour, label=f'T = {T:g}')
        column[1].set(ylim=(0, 1), xticks=np.arange(5) + 0.2, xticklabels=range(5))
        column[1].set_xlabel('source class')
    axes[1, 0].set_ylabel('probability by the\npre-trained head')
    axes[1, 1].legend()
    return figure


def stochnorm(bench):
    maps = bench.outputs.convs[0][:32]  # before the last batch norm of the first stage
    scale, stats = (tree['layer1'][0]['bn2'] for tree in (bench.params, bench.batch_stats))

    def normalised(key, p):
        layer = StochNorm(maps.shape[-1], epsilon=1e-5, rngs=nnx.Rngs(0), p=p)
        layer.scale[...], layer.bias[...] = scale['scale'], scale['bias']
        layer.mean[...], layer.var[...] = stats['mean'], stats['var']
        layer.key = key
        layer.train()
        return layer(maps)

    draw = jax.vmap(normalised, (0, None), axis_name='batch')
    keys = jax.random.split(jax.random.key(0), 12)
    by_batch = draw(keys[:1], 1.0)[0]
    taken = [(draw(key[None], 0.5)[0] == by_batch).all(axis=(0, 1, 2)) for key in keys]
    figure, axes = panels(1, 2, 2.6, width_ratios=(1.3, 1))
    axes[0].imshow(np.array(taken), cmap=matplotlib.colors.ListedColormap([ORANGE, BLUE]))
    axes[0].set(xlabel='channel', ylabel='step', xticks=[0, 5, 10, 15])
    axes[0].set_title('p = 0.5: each step draws anew')
    mean = maps.mean(axis=(0, 1, 2))
    for chosen, colour, words in (
        (taken[0], BLUE, "the batch's"),
        (~taken[0], ORANGE, 'the moving'),
    ):
        axes[1].plot(
            stats['mean'][chosen], mean[chosen], 'o', color=colour, label=f'{words} statistics'
        )
    axes[1].set(xlabel='pre-trained mean', ylabel="batch's mean", title='the first of these steps')
    axes[1].legend()
    return figure


def cotuning(bench):
    task = bench.novel
    logits = np.asarray(task.outputs.logits)
    table = losses.relationship(logits, task.labels, 5, task.temperature)
    figure, axes = panels(1, 2, 2.6, width_ratios=(1, 5))
    firsts = [int(np.flatnonzero(task.labels == c)[0]) for c in range(5)]
    show(axes[0], np.concatenate(denormalize(task.images[firsts], bench.config.model)))
    axis = axes[1]
    shown = axis.imshow(table, vmin=0, vmax=1, aspect='auto')
    for (row, column), value in np.ndenumerate(table):
        colour = 'white' if value > 0.5 else 'black'
        axis.text(column, row, f'{value:.2f}', ha='center', va='center', color=colour)
    axis.set(xlabel='source class', ylabel='target class', xticks=range(5), yticks=range(5))
    axis.set_yticklabels(range(5, 10))
    axis.set_title(f'p(source class | target class), calibrated by T = {task.temperature:.2f}')
    figure.colorbar(shown)
    return figure


def bituning_(bench):
    run = bench.trained('bituning')
    order = np.argsort(bench.labels, kind='stable')
    keys = jax.random.split(jax.random.key(0), len(order))
    stored = np.stack([bench.data.target.image(int(i), bench.config.resize) for i in order])
    crops = [training_view(bench.config, keys, stored), bench.images[order]]
    view = SimpleNamespace(num_classes=10)
    start = bench.weights.fill(*create_model(bench.config.model, 138, 20, 0)[1:])
    figure, axes = panels(1, 2, 3.2)
    for axis, states, words in zip(
        axes, (start, run.states), ('before', 'after 600 steps'), strict=True
    ):
        pairs = [forward(run.graphdef, *states, images, train=False)[0] for images in crops]
        query, key = (bituning.encode(view, each)[1] for each in pairs)
        shown = axis.imshow(query @ key.T, cmap='RdBu_r', vmin=-1, vmax=1)
        axis.set(title=words, xticks=range(2, 50, 5), yticks=range(2, 50, 5), xlabel='key of class')
        axis.set(xticklabels=bench.names, yticklabels=bench.names)
    axes[0].set_ylabel('query of class')
    figure.colorbar(shown, ax=axes, label='cosine')
    return figure


def rifle_(bench):
    periods = 3
    figure, axis = panels(height=2.5)
    runs = (
        ('finetune', {}, GREY, 'finetune'),
        ('rifle', {'periods': periods}, BLUE, 'rifle.periods=3'),
    )
    for method, options, colour, words in runs:
        axis.plot(*bench.trained(method, **options).curve.T, color=colour, label=words)
    for i in range(1, periods):
        axis.axvline(i * rifle.period(periods, 600), color='black', lw=0.8, ls=':')
    axis.set(xlabel='step', ylabel='training loss', yscale='log')
    axis.legend()
    return figure


def smile_(bench):
    task, config = bench.novel, bench.configured('smile')
    batch = {'image': task.images[[5, 45]], 'label': task.labels[[5, 45]]}
    keys = jax.random.split(jax.random.key(3), 2)
    mixed = transformed(config, keys, batch)
    lam = float(mixed['lam'][1])
    teacher, student = task.forward(batch['image']), task.forward(mixed['image'])

    def mix(values):
        return lam * values[1] + (1 - lam) * values[0]

    figure, axes = panels(1, 4, 2.2, width_ratios=(1, 1, 1, 2.6))
    titles = f'{lam:.2f} × image', f'{1 - lam:.2f} × partner', 'mixed: what\nthe student sees'
    pictures = batch['image'][1], batch['image'][0], mixed['image'][1]
    for axis, image, title in zip(axes, pictures, titles, strict=False):
        show(axis, denormalize(image, bench.config.model), title)
    bars = (
        (mix(jax.nn.softmax(teacher.logits)), ORANGE, 'teacher, mixed'),
        (jax.nn.softmax(student.logits)[1], BLUE, 'student'),
    )
    for shift, (values, colour, words) in enumerate(bars):
        axes[3].bar(np.arange(5) + 0.4 * shift, values, 0.4, color=colour, label=words)
    axes[3].set(xticks=np.arange(5) + 0.2, xticklabels=range(5), ylim=(0, 1))
    axes[3].set(xlabel='source class', ylabel='probability')
    maps = student.stages[-1][1], mix(teacher.stages[-1])
    one_image = jax.tree.map(lambda x: x[None, None], maps)
    distance = jax.vmap(smile.feature_distance, axis_name='batch')(*one_image)
    axes[3].set_title(f'distance of their feature maps: {float(distance[0]):.2f}')
    axes[3].legend()
    return figure


def mmd(bench):
    rng = np.random.default_rng(0)
    some = rng.permutation(len(bench.labels))[:32]
    batches = some, some[np.argsort(bench.labels[some], kind='stable')]
    features = bench.outputs.features
    centre = features.mean(axis=0)
    plane = np.linalg.svd(features - centre, full_matrices=False)[2][:2].T
    figure, axes = panels(1, 2, 2.7, sharex=True, sharey=True)
    for axis, batch, words in zip(
        axes, batches, ('drawn at random', 'sorted by class'), strict=True
    ):
        x = features[batch]
        value, slope = jax.value_and_grad(losses.maximum_mean_discrepancy)(x)
        places, arrows = (x - centre) @ plane, -slope @ plane
        for half, colour in ((slice(16), BLUE), (slice(16, None), ORANGE)):
            axis.plot(*places[half].T, 'o', color=colour, ms=4)
        axis.quiver(*places.T, *arrows.T, color='0.4', width=0.004, scale=0.2, angles='xy')
        axis.set_title(f'halves {words}: MMD² = {float(value):.3f}')
        axis.set_xlabel('first principal axis')
    axes[0].set_ylabel('second principal axis')
    return figure


# A name with _ at its end is that of a module as well.
DRAWN = {name: globals().get(f'{name}_') or globals()[name] for name in METHODS}


def main(names):
    """Draws the pictures of these methods; of all without names."""
    logging.getLogger('absl').setLevel(logging.ERROR)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE), tempfile.TemporaryDirectory() as runs:
        bench = Bench(Path(runs))
        for name in names or METHODS:
            path = FOLDER / f'{name}.png'
            DRAWN[name](bench).savefig(path, dpi=DOTS, pil_kwargs={'optimize': True})
            print(f'{path.name}: {path.stat().st_size / 1000:.0f} kB')


if __name__ == '__main__':
    main(sys.argv[1:])
