"""What methods do with heads, statistics and teachers."""

from types import SimpleNamespace

import jax
import matplotlib
import numpy as np
from bench import BLUE, GREY, ORANGE, panels, show, transformed
from flax import nnx
from scipy.special import softmax

from xmixup_jax import losses
from xmixup_jax.compute.augment import denormalize, training_view
from xmixup_jax.methods import bituning, rifle, smile
from xmixup_jax.methods.stochnorm import StochNorm
from xmixup_jax.models import create_model, forward


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
