"""Trains on the most similar source classes first, and then on the target.

Cui, Song, Sun, Howard, Belongie, "Large Scale Fine-Grained Categorization and Domain-Specific
Transfer Learning" (Seq-Train), CVPR 2018, section 4, https://arxiv.org/abs/1806.06193. The earth
mover's distance between each single source class and the target domain ranks the source classes
(`matching.domain_similarity`). The network is trained on the best of them, and then fine-tuned on
the target.

The authors' notebook (richardaecn/cvpr18-inaturalist-transfer, `DomainSimilarityDemo.ipynb`) has
the same distance. It takes the means over all images of a class and leaves out source classes with
fewer than 200; here they are over the first `match.images_per_class` images, of all classes. The
choice of the best classes is not in the notebook.
"""

from dataclasses import replace

import numpy as np

from xmixup_jax.matching import domain_similarity
from xmixup_jax.methods.base import Method, Prepared, Setup
from xmixup_jax.methods.options import count
from xmixup_jax.methods.parts import always, linear_classifier, with_linear_head
from xmixup_jax.optimizer import HEAD


def prepare(setup: Setup) -> Prepared:
    options, target, source = setup.options, setup.target, setup.source
    similarity = domain_similarity(
        setup.class_means(target),
        np.bincount(target.labels, minlength=len(target.class_names)),
        setup.class_means(source),
    )
    most_similar = np.argsort(-similarity, kind='stable')
    chosen = np.sort(most_similar[: options.num_classes or len(target.class_names)])
    auxiliary = setup.config.copy_and_resolve_references()
    auxiliary.steps = options.steps or auxiliary.steps
    params, batch_stats = setup.train(auxiliary, source.restrict(chosen), 'auxiliary')
    params = params | {HEAD: setup.state.params[HEAD]}
    state = replace(setup.state, params=params, batch_stats=batch_stats)

    def classifier():
        outputs = setup.outputs(state, target)
        return linear_classifier(outputs['features'], outputs['label'], target.class_names)

    setup = setup._replace(state=state, classifier=classifier)  # of the network just trained
    return Prepared(with_linear_head(setup) if setup.config.warm_head else state, {})


METHOD = Method(
    options={
        'num_classes': count(0, 'source classes to train on; 0: as many as the target has', 0),
        'steps': count(0, 'steps on the source; 0: as many as on the target', 0),
    },
    reads_source=always,
    prepare=prepare,
    needs_backbone=True,
)
