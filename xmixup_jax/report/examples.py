"""Example images of a run: the class match, and the inputs of the first batch."""

import itertools
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.data.names import readable
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import Data
from xmixup_jax.matching import ClassMatch
from xmixup_jax.report.classes import thumbnail
from xmixup_jax.report.page import image_uri

PAIRS, INPUTS = 200, 16  # limits
IMAGES = 2  # of each class in the match
_SIMILARITY = {
    'cosine': 'the cosine of their mean features in the pre-trained network',
    'euclidean': 'minus the distance of their mean features in the pre-trained network',
    'emd': "the earth mover's similarity of their mean features in the pre-trained network",
    'predicted': 'the mean probability that the pre-trained head gives the source class',
}


def _first_images(records: Records, c: int, config: ConfigDict) -> list[str]:
    """Thumbnails of the first images of a class that can be decoded."""
    places = np.flatnonzero(records.labels == c)[: 3 * IMAGES]
    uris = (thumbnail(records, i, config) for i in places)
    return list(itertools.islice(filter(None, uris), IMAGES))


def match_part(
    match: ClassMatch | None, data: Data, config: ConfigDict, limit: int = PAIRS
) -> dict[str, Any]:
    """The values of match.html, except for the number of pairs that are not folded.

    Args:
      match: of the classes; None without pairs.
      data: of the run; some images are read.
      config: of the run.
      limit: pairs to show, the most similar ones.
    """
    if match is None:
        return {'match': None, 'match_left_out': 0, 'similarity': ''}
    source = data.source
    assert source is not None  # as there is a match
    targets, sources = readable(data.target.class_names), readable(source.class_names)
    order = np.argsort(-match.similarity[:, 0], kind='stable')[:limit]
    pairs = [
        {
            'target': targets[t],
            'target_images': _first_images(data.target, t, config),
            'sources': [
                {
                    'name': sources[s],
                    'similarity': f'{similarity:.3f}',
                    'images': _first_images(source, s, config),
                }
                for s, similarity in zip(match.classes[t], match.similarity[t], strict=True)
            ],
        }
        for t in order
    ]
    return {
        'match': pairs,
        'match_left_out': len(targets) - len(pairs),
        'similarity': _SIMILARITY[config.match.similarity],
    }


def inputs_part(
    inputs: dict[str, np.ndarray], data: Data, match: ClassMatch | None
) -> dict[str, Any]:
    """The values of inputs.html: the first images, or the most evenly mixed ones.

    Args:
      inputs: of the first batch, see `step.input_step`.
      data: of the run.
      match: of the classes, if the method pairs.
    """
    names = readable(data.target.class_names)
    if 'source_label' in inputs:
        assert match is not None and data.source is not None  # the method pairs
        selected = readable(data.source.class_names)
        others = [selected[match.selected[c]] for c in inputs['source_label']]
    else:
        others = [names[c] for c in inputs.get('other_label', ())]
    shown = np.arange(len(inputs['image']))
    if 'lam' in inputs:
        shown = np.argsort(np.abs(inputs['lam'] - 0.5), kind='stable')
    shown = shown[:INPUTS]
    cards = []
    for i in shown:
        own = names[inputs['label'][i]]
        labels = [{'kind': 'target', 'words': own}]
        if 'lam' in inputs:
            lam = float(inputs['lam'][i])
            kind = 'source' if 'source_label' in inputs else 'target'
            labels = [
                {'kind': 'target', 'words': f'{lam:.2f} × {own}'},
                {'kind': kind, 'words': f'{1 - lam:.2f} × {others[i]}'},
            ]
        words = ' + '.join(label['words'] for label in labels)
        cards.append({'uri': image_uri(inputs['image'][i]), 'labels': labels, 'words': words})
    return {'inputs': cards, 'mixed': 'lam' in inputs}
