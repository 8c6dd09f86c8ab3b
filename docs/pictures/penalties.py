"""What penalties and projections do to weights, features and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench import BLUE, GREY, ORANGE, panels, show

from xmixup_jax import losses
from xmixup_jax.compute.augment import denormalize
from xmixup_jax.methods import delta, fsp
from xmixup_jax.methods.parts import linear_classifier
from xmixup_jax.models import forward
from xmixup_jax.optimizer import HEAD


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
    classifier = linear_classifier(np.asarray(bench.outputs.features), bench.labels, bench.names)
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
