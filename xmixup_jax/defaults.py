"""All configuration keys and their defaults: the usual fine-tuning at 224 px, 9,000 steps of SGD.

This is not an experiment by itself. The experiments in configs/ start from it and name the data.
"""

import ml_collections

from xmixup_jax.methods import METHODS

# torchvision's ResNet-50 (weights V1), 76.1 % top-1 on ImageNet; downloaded on first use.
RESNET50 = 'timm/resnet50.tv_in1k'


def optimizer(learning_rate: float, schedule: str = 'step') -> ml_collections.ConfigDict:
    """The options of an optimiser, by default SGD with Nesterov momentum."""
    return ml_collections.ConfigDict(
        {
            'name': 'sgd',  # or 'adamw', 'lamb', with learning rates from 0.0001 to 0.001
            'learning_rate': learning_rate,  # the peak, after the warm-up
            'head_multiplier': 1.0,  # multiplies the learning rate of the head
            'layer_decay': 1.0,  # multiplies the learning rate once for each layer below the head
            'momentum': 0.9,  # of 'sgd'; the first beta of 'adamw' and 'lamb'
            'b2': 0.999,  # the second beta of 'adamw' and 'lamb'
            'nesterov': True,  # Nesterov momentum, for 'sgd'
            'weight_decay': 1e-4,
            'decayed': 'all',  # 'kernels': no weight decay of biases, norms and position embeddings
            'clip_norm': 0.0,  # largest norm of the gradient over all parameters; 0: no clipping
            'schedule': schedule,  # 'step': one drop; 'cosine': down to 0
            'drop_at': 0.67,  # for 'step': the learning rate drops after this share of the steps
            'drop_factor': 0.1,  # for 'step': the learning rate is multiplied by this
            'warmup_steps': 0,  # steps in which the learning rate rises from 0
        }
    )


def dataset(name: str, split: str, test_split: str) -> ml_collections.ConfigDict:
    """A data set and its splits; `name` is `folder:PATH`, `csv:FILE` or a data set of tfds."""
    return ml_collections.ConfigDict(
        {
            'name': name,
            'split': split,  # for training; '': all images, if there are no splits
            'test_split': test_split,  # 'rest': images of `split` not used in training; '': no test
            'shots': 0,  # training images per class, drawn at random with the seed; 0: all
            'sample_rate': 1.0,  # alternatively, the share of each class's training images
            'test_share': 0.2,  # share of each class kept for the test if there are no splits
            # Share of each class's training images kept for validation, which then chooses the best
            # network; the test images are used only once, at the end.
            'validation_share': 0.0,
        }
    )


def get_config() -> ml_collections.ConfigDict:
    """Returns a configuration with all keys and their defaults."""
    config = ml_collections.ConfigDict()
    # A built-in method, a method of an installed package, or the path of a file of your own.
    config.method = 'xmixup'
    config.seed = 0  # for the choice of `shots`, initialisation, order, pairs and augmentation

    config.source = dataset('imagenet2012', 'train', 'validation')
    config.target = dataset('', 'train', 'test')
    config.resize = 256  # side of the square in px to which each image is resized
    config.fit = 'crop'  # how: 'crop' to the middle, 'pad' with black, 'squash' (distort)
    config.image_size = 224  # side of the network's input in px: random crops, in tests the middle
    config.crop_min_area = 0.0  # above 0: random resized crops of at least this share of the area
    config.flip = True  # mirror training images left to right at random
    config.augment = ml_collections.ConfigDict(
        {
            'policy': '',  # 'randaugment' or 'trivialaugment', as in torchvision; '': none
            'num_ops': 2,  # operations per image, for 'randaugment'
            'magnitude': 9,  # strength from 0 to 30, for 'randaugment'
            'color_jitter': 0.0,  # largest relative change of brightness, contrast and saturation
            'erasing': 0.0,  # probability of replacing a random box by the mean colour
        }
    )

    config.model = ml_collections.ConfigDict(
        {
            'name': 'resnet50',  # or resnet10 to 101, efficientnet_lite0 to 2, inception_v3, ...
            'width': 64,  # channels of the first stage, for ResNets
            'stem': 'imagenet',  # for ResNets: 'tiny' suits 64 px, 'cifar' 32 px and less
            # 'imagenet', 'inception' or 'clip'; '': as timm's weights of this network.
            'normalization': '',
        }
    )
    # A weights file (FILE#ENTRY chooses among several sets), OWNER/NAME on the Hugging Face Hub, an
    # installed package, or a run folder. 'source': train on the source first, once for all runs.
    # '': random weights.
    config.weights = 'source'
    # Start the target's head as a linear classifier of the pre-trained features, not at random.
    config.warm_head = False
    # Random values of a new head: 'uniform' (as PyTorch's Linear), 'normal' (std 0.01), 'zero'.
    config.head_init = 'uniform'
    # What to freeze: 'backbone', all but the head (with finetune: a linear probe); '1', '2', ...:
    # that many stages, counted from the first; '': nothing.
    config.freeze = ''
    # Statistics that batch norm uses in training: 'batch', those of the batch; 'frozen', the
    # pre-trained ones; 'mixed', the mean of both.
    config.batch_norm = 'batch'
    # Devices whose parts of the batch share their statistics in training: 'all'; 'host', those of a
    # process; 'device', each has its own.
    config.batch_norm_over = 'all'
    # Number of batches of clean training images to re-estimate batch statistics before a test, if
    # the method trains on other images (mixed ones, or the source's); 0: do not re-estimate.
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
            # 'cosine', 'euclidean' or 'emd' compare mean features of classes; 'predicted' uses the
            # pre-trained head, without a pass over the source.
            'similarity': 'cosine',
            'assignment': 'optimal',  # or 'greedy', 'nearest', 'random', 'least'
            'classes_per_target': 1,  # source classes for each target class
            'images_per_class': 50,  # for the mean features; 0: all
        }
    )
    # The options of each method, which its file in xmixup_jax/methods/ explains.
    for name, method in METHODS.items():
        if method.options:
            config[name] = ml_collections.ConfigDict(method.defaults)

    config.steps = 9000  # training steps
    config.batch_size = 48  # over all devices and processes
    config.eval_batch_size = 256  # in tests, over all devices and processes
    config.test_views = 1  # views to average; 1: the centre; 2: and mirrored; 10: and the corners
    config.optimizer = optimizer(0.01)
    config.label_smoothing = 0.0  # share of the label spread over all classes
    config.ema_decay = 0.0  # decay of a moving average of the weights, usually 0.999; 0: no average
    config.balance = ml_collections.ConfigDict(
        {
            'sampling': 'natural',  # 'balanced' draws every class equally often
            'weights': 'none',  # class weights in the loss: 'inverse' or 'effective' number
            'beta': 0.999,  # for 'effective'
        }
    )

    # Of the network: 'float32'; 'bfloat16'; 'auto': bfloat16 on GPUs and TPUs, float32 on CPUs. A
    # run keeps what it began with.
    config.precision = 'auto'
    config.accumulate_steps = 1  # split each batch into this many parts, to save memory
    config.remat = False  # recompute activations in the backward pass, to save memory
    config.steps_per_dispatch = 1  # steps in one program; more are faster if steps are very short

    config.data_dir = ''  # of tfds; '': $TFDS_DATA_DIR or ~/tensorflow_datasets
    config.cache_dir = '~/.cache/xmixup_jax'  # networks pre-trained on a source, label indices
    config.num_threads = 0  # that read and decode images; 0: one per core
    config.data = ml_collections.ConfigDict(
        {
            # Where to keep decoded images: 'none', 'memory', 'disk' (in cache_dir) or 'device';
            # 'auto': the first of device (on one host), memory and disk with ample space.
            'cache': 'auto',
        }
    )
    config.max_bad_images = 20  # undecodable images to skip in each split before the run fails
    config.allow_changes = False  # resume a run even if its configuration has changed
    config.report = True  # write report.html at the end of the run
    config.wandb = ''  # also log to this Weights & Biases project; '': none
    config.log_every = 50  # steps
    config.eval_every = 0  # steps between tests, or validations; 0: only at the end
    config.patience = 0  # early stopping after this many validations without improvement; 0: never
    config.checkpoint_every = 500  # steps
    config.checkpoint_seconds = 60.0  # no checkpoint sooner after the last one
    config.keep_checkpoints = 2  # number of checkpoints to keep
    return config
