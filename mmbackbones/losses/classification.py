"""Classification losses of detectors that score a box by its quality.

VarifocalNet: An IoU-aware Dense Object Detector, arXiv 2008.13367, equation 2;
DEIM: DETR with Improved Matching for Fast Convergence, arXiv 2412.04234.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/dfine_criterion.py and
https://github.com/Intellindust-AI-Lab/DEIM engine/deim/deim_criterion.py (both
Apache-2.0).
Departs from the source: none.

Legend: S prediction sets, M queries of the batch, C classes, P matched pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbackbones.registry import MODELS

__all__ = [
    'MatchabilityTerm',
    'VarifocalTerm',
    'matchability_aware_loss',
    'varifocal_loss',
]


def varifocal_loss(
    logits: Tensor,
    query: Tensor,
    labels: Tensor,
    quality: Tensor,
    *,
    alpha: float,
    gamma: float,
) -> Tensor:
    """Varifocal loss, summed over queries and classes.

    With p the score (the sigmoid of the logit) and q the quality of a matched
    query's box, at the class of its target

        q * BCE(p, q),    and everywhere else    alpha * p^gamma * BCE(p, 0)

    Weights and targets carry no gradient.

    Args:
        logits: `(S, M, C)`.
        query: `(S, P)` int64, matched queries, each at most once in a set.
        labels: `(S, P)` int64, classes of their targets, 0-based.
        quality: `(S, P)` IoU of predicted and target box, in [0, 1].
        alpha: weight of the unmatched entries.
        gamma: how fast easy unmatched entries lose weight.

    Returns:
        `(S,)`, to be divided by the number of boxes.
    """
    num_classes = logits.shape[-1]
    logits = logits.flatten(1)  # (S, M * C)
    entry = query * num_classes + labels
    quality = quality.detach()
    weights = logits.detach().sigmoid().pow_(gamma).mul_(alpha)
    weights.scatter_(1, entry, quality)
    scores = torch.zeros_like(weights).scatter_(1, entry, quality)
    losses = F.binary_cross_entropy_with_logits(
        logits, scores, weights, reduction='none'
    )
    return losses.sum(1)


def matchability_aware_loss(
    logits: Tensor, query: Tensor, labels: Tensor, quality: Tensor, *, gamma: float
) -> Tensor:
    """Matchability-aware loss (MAL), summed over queries and classes.

    With p the score and q the quality of a matched query's box, at the class of its
    target

        BCE(p, q^gamma),    and everywhere else    p^gamma * BCE(p, 0)

    so that a match of low quality is not ignored, as `varifocal_loss` does. Weights
    and targets carry no gradient. Arguments and result as there.
    """
    num_classes = logits.shape[-1]
    logits = logits.flatten(1)  # (S, M * C)
    entry = query * num_classes + labels
    weights = logits.detach().sigmoid().pow_(gamma)
    scores = torch.zeros_like(weights).scatter_(1, entry, quality.detach().pow(gamma))
    weights.scatter_(1, entry, 1.0)
    losses = F.binary_cross_entropy_with_logits(
        logits, scores, weights, reduction='none'
    )
    return losses.sum(1)


@MODELS.register_module()
class VarifocalTerm(nn.Module):
    """`varifocal_loss` for a config.

    Args:
        alpha: see there.
        gamma: see there.
    """

    name = 'loss_vfl'

    def __init__(self, alpha: float = 0.75, gamma: float = 2.0) -> None:
        super().__init__()
        self.alpha, self.gamma = alpha, gamma

    def forward(
        self, logits: Tensor, query: Tensor, labels: Tensor, quality: Tensor
    ) -> Tensor:
        """See `varifocal_loss`."""
        return varifocal_loss(
            logits, query, labels, quality, alpha=self.alpha, gamma=self.gamma
        )


@MODELS.register_module()
class MatchabilityTerm(nn.Module):
    """`matchability_aware_loss` for a config.

    Args:
        gamma: see there.
    """

    name = 'loss_mal'

    def __init__(self, gamma: float = 1.5) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(
        self, logits: Tensor, query: Tensor, labels: Tensor, quality: Tensor
    ) -> Tensor:
        """See `matchability_aware_loss`."""
        return matchability_aware_loss(logits, query, labels, quality, gamma=self.gamma)
