"""Defaults of every experiment: fine-tuning at 224 px as in the field (SGD, 9,000 steps of 48).

Not an experiment by itself: the files beside this one start from it and name the data.
"""

import ml_collections

from xmixup_jax.methods import METHODS

# torchvision's network (weights V1), 76.1 % top-1 on ImageNet; fetched when it is first used.
RESNET50 = 'timm/resnet50.tv_in1k'


def optimizer(learning_rate: float, schedule: str = 'step') -> ml_collections.ConfigDict:
    """SGD with momentum."""
    return ml_collections.ConfigDict(
        {
            'name': 'sgd',  # 'adamw', 'lamb': smaller learning rates, 0.0001 to 0.001
            'learning_rate': learning_rate,
            'head_multiplier': 1.0,  # learning rate of the head, as a multiple
            'layer_decay': 1.0,  # and of each layer, as a multiple of that of the layer above
            'momentum': 0.9,  # of 'adamw' and 'lamb' the first beta
            'b2': 0.999,  # and the second one
            'nesterov': True,  # of 'sgd'
            'weight_decay': 1e-4,
            'decayed': 'all',  # 'kernels': not biases, normalisation and positions
            'clip_norm': 0.0,  # of the gradient of all parameters; 0: none
            'schedule': schedule,  # 'step': one drop; 'cosine': down to 0
            'drop_at': 0.67,  # 'step': fraction of the steps after which the rate drops ...
            'drop_factor': 0.1,  # ... to this multiple
            'warmup_steps': 0,
        }
    )


def dataset(name: str, split: str, test_split: str) -> ml_collections.ConfigDict:
    """A data set, `folder:PATH`, `csv:FILE` or a name of tfds, and its splits."""
    return ml_collections.ConfigDict(
        {
            'name': name,
            'split': split,  # '': all images, where there are no splits
            'test_split': test_split,  # 'rest': what `shots` leaves of `split`; '': none
            'shots': 0,  # training images of each class, drawn by the seed; 0: all
            'sample_rate': 1.0,  # or the share of each class's training images
            'test_share': 0.2,  # of each class's images, where a folder or list has no splits
            # Of each class's training images, to choose the best network by; the test images
            # are then used only once, at the end.
            'validation_share': 0.0,
        }
    )


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    # A file of xmixup_jax/methods/, the path of a file of your own, or an installed package's.
    config.method = 'xmixup'
    config.seed = 0  # of the few-shot draw, initialisation, order, pairing and augmentation

    config.source = dataset('imagenet2012', 'train', 'validation')
    config.target = dataset('', 'train', 'test')
    config.resize = 256  # each image becomes a square of this side ...
    config.fit = 'crop'  # ... its middle; 'pad': all of it, beside black; 'squash': all, distorted
    config.image_size = 224  # random crops of this side are trained on, the middle one is tested
    config.crop_min_area = 0.0  # or: crops are from this share of the area to all of it, resized
    config.flip = True  # mirror left to right at random
    config.augment = ml_collections.ConfigDict(
        {
            'policy': '',  # 'randaugment', 'trivialaugment', with torchvision's operations
            'num_ops': 2,  # of 'randaugment', one after the other
            'magnitude': 9,  # of 'randaugment', 0 to 30
            'color_jitter': 0.0,  # brightness, contrast and saturation change by up to this share
            'erasing': 0.0,  # probability that a random box becomes the mean colour
        }
    )

    config.model = ml_collections.ConfigDict(
        {
            'name': 'resnet50',  # or resnet10 to 101, efficientnet_lite0 to 2, inception_v3, ...
            'width': 64,  # of a ResNet's first stage
            'stem': 'imagenet',  # of a ResNet; 'tiny' for 64 px, 'cifar' for 32 px and less
            # 'imagenet', 'inception', 'clip'; '': what timm's weights were made with.
            'normalization': '',
        }
    )
    # A file of weights (FILE#ENTRY chooses among several sets), OWNER/NAME on the Hugging Face Hub,
    # an installed package or the folder of a run; 'source': train on the source, once for all
    # runs; '': random.
    config.weights = 'source'
    # Begin the target's head as a linear classifier of the pre-trained features, not at random.
    config.warm_head = False
    # The law of a head drawn at random: 'uniform' (PyTorch's Linear), 'normal' (0.01), 'zero'.
    config.head_init = 'uniform'
    # What keeps its pre-trained weights: 'backbone', all but the head (with finetune: a linear
    # probe); '1', '2', ...: so many stages, from the first one; '': nothing.
    config.freeze = ''
    # What batch norm normalises by in training: 'batch', the statistics of the batch; 'frozen',
    # the pre-trained ones throughout; 'mixed', the mean of both.
    config.batch_norm = 'batch'
    # Batches of clean training images from which the statistics are estimated anew before a test,
    # where training saw other images (mixed ones, or the source's); 0: none.
    config.reestimate = 40
    config.pretrain = ml_collections.ConfigDict(
        {
            'seed': 0,
            'steps': 450_000,
            'batch_size': 256,
            'optimizer': optimizer(0.1, 'cosine'),
        }
    )

    config.match = ml_collections.ConfigDict(
        {
            # 'cosine', 'euclidean', 'emd' of the classes' mean features; 'predicted': by the
            # pre-trained head, without a pass over the source
            'similarity': 'cosine',
            'assignment': 'optimal',  # 'optimal', 'greedy', 'nearest', 'random', 'least'
            'classes_per_target': 1,
            'images_per_class': 50,  # for the class means; 0: all
        }
    )
    # Each method's options, as its file in xmixup_jax/methods/ gives and explains them.
    for name, method in METHODS.items():
        if method.options:
            config[name] = ml_collections.ConfigDict(method.defaults)

    config.steps = 9000
    config.batch_size = 48  # over all devices and processes
    config.eval_batch_size = 256
    config.test_views = 1  # middle crop; 2: mirrored too; 10: corners too; probabilities averaged
    config.optimizer = optimizer(0.01)
    config.label_smoothing = 0.0  # share of the label that is spread over all classes
    config.ema_decay = 0.0  # also test the moving average of the weights; 0: none; usual: 0.999
    config.balance = ml_collections.ConfigDict(
        {
            'sampling': 'natural',  # 'balanced' draws each class equally often
            'weights': 'none',  # of the classes in the loss: 'inverse', 'effective' number
            'beta': 0.999,  # of 'effective'
        }
    )

    config.precision = 'float32'  # of the network; 'bfloat16' is fast on GPU and TPU
    config.accumulate_steps = 1  # parts of each batch, one after the other, to save memory
    config.remat = False  # compute blocks again for the gradient, to save memory
    config.steps_per_dispatch = 1  # in one program, where steps are very short

    config.data_dir = ''  # of tfds; '': $TFDS_DATA_DIR or ~/tensorflow_datasets
    config.cache_dir = '~/.cache/xmixup_jax'  # networks trained on a source, label indices
    config.num_threads = 0  # that read and decode images; 0: one a core
    config.data = ml_collections.ConfigDict(
        {
            # Where decoded images are kept: 'none', 'memory', 'disk' (in cache_dir), 'device';
            # 'auto': in the first of device, memory and disk that has ample room.
            'cache': 'auto',
        }
    )
    config.max_bad_images = 20  # that cannot be decoded and are skipped, in each split
    config.allow_changes = False  # continue a run though its configuration has changed
    config.report = True  # write report.html at the end of the run
    config.wandb = ''  # project of Weights & Biases to log to as well; '': none
    config.log_every = 50
    config.eval_every = 0  # 0: only at the end
    config.patience = 0  # validations in a row that do not improve before training stops; 0: never
    config.checkpoint_every = 500
    config.keep_checkpoints = 2
    return config
