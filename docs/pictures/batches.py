"""What methods make of a batch, or which images they add to it."""

import numpy as np
from bench import BLUE, GREY, ORANGE, panels, rows_of_images, show

from xmixup_jax.matching import domain_similarity


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
