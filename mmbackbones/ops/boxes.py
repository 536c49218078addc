"""Box arithmetic on tensors; the format is in every name.

`cxcywh` is centre and size, `xyxy` is left, top, right, bottom. Nothing here
knows whether boxes are in pixels or normalised; both arguments of a function
share one frame.
"""

import torch
from torch import Tensor

__all__ = [
    'cxcywh_to_ordered_xyxy',
    'cxcywh_to_xyxy',
    'elementwise_giou',
    'elementwise_iou',
    'inverse_sigmoid',
    'scale_boxes',
    'xyxy_to_cxcywh',
]


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert `(..., 4)` centre-size boxes to corner boxes."""
    centre, half = boxes[..., :2], boxes[..., 2:] * 0.5
    return torch.cat((centre - half, centre + half), dim=-1)


def cxcywh_to_ordered_xyxy(boxes: Tensor) -> Tensor:
    """As `cxcywh_to_xyxy`, a negative size counting as 0, so that x2 >= x1."""
    centre, size = boxes.split(2, dim=-1)
    half = size.clamp(min=0) * 0.5
    return torch.cat((centre - half, centre + half), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert `(..., 4)` corner boxes to centre-size boxes."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) * 0.5, high - low), dim=-1)


def _product(size: Tensor) -> Tensor:
    # not `prod(-1)`: its backward reads from the device to look for zeros
    width, height = size.unbind(-1)
    return width * height


def _areas(boxes_a: Tensor, boxes_b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union of pairs; broadcast over leading dimensions."""
    low_a, high_a = boxes_a.split(2, dim=-1)
    low_b, high_b = boxes_b.split(2, dim=-1)
    size = torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)
    inter = _product(size.clamp(min=0))
    return inter, _product(high_a - low_a) + _product(high_b - low_b) - inter


def _smallest_area(dtype: torch.dtype) -> float:
    # far below a pixel in normalised units, yet its inverse leaves room for the
    # gradient of boxes without area
    return max(torch.finfo(dtype).tiny, 1e-12)


def elementwise_iou(boxes_xyxy_a: Tensor, boxes_xyxy_b: Tensor) -> Tensor:
    """IoU of the i-th box of one set with the i-th of the other.

    Args:
        boxes_xyxy_a: `(..., 4)`.
        boxes_xyxy_b: broadcastable against it.

    Returns:
        `(...)` in [0, 1]; 0 where both boxes have no area.
    """
    inter, union = _areas(boxes_xyxy_a, boxes_xyxy_b)
    return inter / union.clamp(min=_smallest_area(union.dtype))


def elementwise_giou(boxes_xyxy_a: Tensor, boxes_xyxy_b: Tensor) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of pairs, in (-1, 1].

    Shapes as in `elementwise_iou`. Boxes without area are allowed: the term
    that would divide by nothing is 0.
    """
    inter, union = _areas(boxes_xyxy_a, boxes_xyxy_b)
    least = _smallest_area(union.dtype)
    low_a, high_a = boxes_xyxy_a.split(2, dim=-1)
    low_b, high_b = boxes_xyxy_b.split(2, dim=-1)
    hull = _product(torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b))
    return inter / union.clamp(min=least) - (hull - union) / hull.clamp(min=least)


def scale_boxes(boxes: Tensor, scale_x: float, scale_y: float) -> Tensor:
    """Multiply the horizontal and vertical entries of `(..., 4)` boxes.

    Plain numbers, because a tensor of factors would be a copy to the device that
    waits for it.
    """
    x, y = boxes[..., 0::2] * scale_x, boxes[..., 1::2] * scale_y
    return torch.stack((x, y), dim=-1).flatten(-2)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of `x`, clipped to [0, 1] and kept `eps` away from infinity."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
