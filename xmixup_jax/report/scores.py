"""What the test's outputs say beside the accuracy: confusion and calibration."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binned_statistic


@dataclass(frozen=True)
class Reliability:
    """How often a network is right that is so sure; in bins of equal width."""

    edges: np.ndarray
    """float64 [bins + 1], of the confidence, 0 to 1."""
    count: np.ndarray
    """int [bins], images."""
    confidence: np.ndarray
    """float64 [bins], mean of the largest probability; NaN in empty bins."""
    accuracy: np.ndarray
    """float64 [bins], share of right answers; NaN in empty bins."""

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean |accuracy - confidence| over all images, 0 to 1.

        Naeini, Cooper, Hauskrecht, AAAI 2015; Guo, Pleiss, Sun, Weinberger, ICML 2017, eq. 3.
        """
        gaps = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float(np.sum(gaps * self.count) / np.sum(self.count))


def reliability(probabilities: np.ndarray, label: np.ndarray, bins: int = 15) -> Reliability:
    """Bins the answers by their confidence.

    Args:
      probabilities: [N, K], rows sum to 1.
      label: int [N].
      bins: how many.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = (probabilities.argmax(axis=1) == label).astype(np.float64)
    means, edges, _ = binned_statistic(
        confidence, [confidence, correct], 'mean', bins=bins, range=(0.0, 1.0)
    )
    count, _ = np.histogram(confidence, edges)
    return Reliability(edges, count, *means)
