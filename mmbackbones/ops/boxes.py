"""Box arithmetic on tensors; the format is in every name.

`cxcywh` is centre and size, `xyxy` is left, top, right, bottom. Nothing here
knows whether boxes are in pixels or normalised; both arguments of a function
share one frame.
"""

import torch
from torch import Tensor

__all__ = [
    'cxcywh_to_xyxy',
    'elementwise_giou',
    'elementwise_iou',
    'inverse_sigmoid',
    'xyxy_to_cxcywh',
]


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert `(..., 4)` centre-size boxes to corner boxes."""
    centre, half = boxes[..., :2], boxes[..., 2:] * 0.5
    return torch.cat((centre - half, centre + half), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert `(..., 4)` corner boxes to centre-size boxes."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) * 0.5, high - low), dim=-1)


def _areas(boxes_a: Tensor, boxes_b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union of pairs; broadcast over leading dimensions."""
    size = torch.minimum(boxes_a[..., 2:], boxes_b[..., 2:]) - torch.maximum(
        boxes_a[..., :2], boxes_b[..., :2]
    )
    inter = size.clamp(min=0).prod(-1)
    area_a = (boxes_a[..., 2:] - boxes_a[..., :2]).prod(-1)
    area_b = (boxes_b[..., 2:] - boxes_b[..., :2]).prod(-1)
    return inter, area_a + area_b - inter


def elementwise_iou(boxes_xyxy_a: Tensor, boxes_xyxy_b: Tensor) -> Tensor:
    """IoU of the i-th box of one set with the i-th of the other.

    Args:
        boxes_xyxy_a: `(..., 4)`.
        boxes_xyxy_b: broadcastable against it.

    Returns:
        `(...)` in [0, 1]; 0 where both boxes have no area.
    """
    inter, union = _areas(boxes_xyxy_a, boxes_xyxy_b)
    return inter / union.clamp(min=torch.finfo(union.dtype).tiny)


def elementwise_giou(boxes_xyxy_a: Tensor, boxes_xyxy_b: Tensor) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of pairs, in (-1, 1].

    Shapes as in `elementwise_iou`. Boxes without area are allowed: the term
    that would divide by nothing is 0.
    """
    tiny = torch.finfo(boxes_xyxy_a.dtype).tiny
    inter, union = _areas(boxes_xyxy_a, boxes_xyxy_b)
    hull = (
        torch.maximum(boxes_xyxy_a[..., 2:], boxes_xyxy_b[..., 2:])
        - torch.minimum(boxes_xyxy_a[..., :2], boxes_xyxy_b[..., :2])
    ).prod(-1)
    return inter / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of `x`, clipped to [0, 1] and kept `eps` away from infinity."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
