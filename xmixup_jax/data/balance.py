"""Class weights for the loss on imbalanced data."""

import numpy as np

WEIGHTS = ('none', 'inverse', 'effective')
SAMPLINGS = ('natural', 'balanced')
CLASS_WEIGHTS = 'config.balance'
"""Key of the class weights among a run's constants. No method would use this name."""


def class_weights(labels: np.ndarray, num_classes: int, law: str, beta: float) -> np.ndarray:
    """Computes class weights whose mean over all training images is 1.

    Args:
      labels: labels of the training images, int [N].
      num_classes: K.
      law: the weight of a class of n images: 'inverse', 1 / n; or 'effective',
        (1 - beta) / (1 - beta ** n), from Cui et al., "Class-Balanced Loss Based on Effective
        Number of Samples" (CVPR 2019), equation 3.
      beta: of 'effective': 0 gives equal weights; the limit 1 gives those of 'inverse'.

    Returns:
      float32 [K].

    >>> class_weights(np.array([0, 0, 1]), 2, 'inverse', 0.0).tolist()
    [0.75, 1.5]
    """
    counts = np.maximum(np.bincount(labels, minlength=num_classes), 1)
    weights = 1 / counts if law == 'inverse' else (1 - beta) / (1 - beta**counts)
    return (weights / weights[labels].mean()).astype(np.float32)
