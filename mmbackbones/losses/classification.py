"""Classification losses of detectors that score a box by its quality.

VarifocalNet: An IoU-aware Dense Object Detector, arXiv 2008.13367, equation 2.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/dfine_criterion.py
(Apache-2.0).
Departs from the source: none.

Legend: S prediction sets, M queries of the batch, C classes, P matched pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['varifocal_loss']


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
