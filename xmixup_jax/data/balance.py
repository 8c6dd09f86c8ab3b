"""Class imbalance: weights of the classes in the loss."""

import numpy as np

WEIGHTS = ('none', 'inverse', 'effective')
SAMPLINGS = ('natural', 'balanced')
CLASS_WEIGHTS = 'config.balance'
"""Their key among the constants of a run; no name that a method would give."""


def class_weights(labels: np.ndarray, num_classes: int, law: str, beta: float) -> np.ndarray:
    """Weights of the classes; their mean over all images is 1.

    Args:
      labels: of the training images, int [N].
      num_classes: K.
      law: 'inverse', 1 / n of a class of n images; 'effective', (1 - beta) / (1 - beta ** n), Cui
        et al., "Class-Balanced Loss Based on Effective Number of Samples" (CVPR 2019), equation 3.
      beta: from 0 (all alike) to below 1 (as 'inverse').

    Returns:
      float32 [K].

    >>> class_weights(np.array([0, 0, 1]), 2, 'inverse', 0.0).tolist()
    [0.75, 1.5]
    """
    counts = np.maximum(np.bincount(labels, minlength=num_classes), 1)
    weights = 1 / counts if law == 'inverse' else (1 - beta) / (1 - beta**counts)
    return (weights / weights[labels].mean()).astype(np.float32)
