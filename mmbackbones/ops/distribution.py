"""Boxes as distributions over distances: the arithmetic of D-FINE's refinement.

D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution
Refinement, arXiv 2410.13842, equations 1 to 4.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/dfine_utils.py
(Apache-2.0).
Departs from the source:
- the weighting function is a handful of tensor operations, not a list of scalars;
- expectations are taken in float32, whatever the dtype of the logits.

Legend: R = reg_max, B = R + 1 bins, c = reg_scale, u = up. A box has four edges in
the order left, top, right, bottom. A distance is in units of (width or height of
the reference box) / c and counts outwards from that box's own edge.
"""

import torch
from torch import Tensor

__all__ = [
    'distance_to_box',
    'edge_probabilities',
    'integral',
    'weighting_function',
]


def weighting_function(
    reg_max: int, up: Tensor | float, reg_scale: Tensor | float
) -> Tensor:
    """Distance W(n) that each bin stands for: dense near 0, two far ends.

    With the step s = (u c + 1)^(2 / (R - 2)) and m = n - R / 2:

        W(0) = -2 u c,  W(R) = 2 u c,  otherwise  sign(m) (s^|m| - 1)

    Args:
        reg_max: R, even and at least 4.
        up: u, of one element; W(1) and W(R - 1) lie at -u c and u c.
        reg_scale: c, of one element; larger means flatter around 0.

    Returns:
        `(B,)`, strictly increasing, antisymmetric, 0 in the middle; on the device
        of `up`.

    Raises:
        ValueError: `reg_max` is odd or below 4.
    """
    if not isinstance(reg_max, int) or reg_max < 4 or reg_max % 2:
        raise ValueError(f'reg_max is {reg_max!r}; it is an even number from 4 on')
    bound = torch.as_tensor(up * reg_scale).abs().reshape(1)
    exponents = torch.arange(
        1, reg_max // 2, dtype=bound.dtype, device=bound.device
    ) * (2 / (reg_max - 2))
    right = (bound + 1) ** exponents - 1
    return torch.cat(
        (-2 * bound, -right.flip(0), torch.zeros_like(bound), right, 2 * bound)
    )


def edge_probabilities(corners: Tensor) -> Tensor:
    """Softmax over the bins of each edge: `(..., 4 * B)` logits to `(..., 4, B)`.

    The result is float32, or float64 where `corners` are.
    """
    dtype = torch.promote_types(corners.dtype, torch.float32)
    return corners.unflatten(-1, (4, -1)).softmax(-1, dtype=dtype)


def integral(corners: Tensor, weights: Tensor) -> Tensor:
    """Expected distance of each edge, sum over n of softmax(corners)(n) W(n).

    Args:
        corners: `(..., 4 * B)` logits, edge after edge.
        weights: `(B,)`, W.

    Returns:
        `(..., 4)` distances in the dtype of `corners`.
    """
    # Not a matrix product: autocast would run one in half precision.
    return (edge_probabilities(corners) * weights).sum(-1).to(corners.dtype)


def distance_to_box(
    ref_boxes: Tensor, distances: Tensor, reg_scale: Tensor | float
) -> Tensor:
    """Move the edges of reference boxes outwards by distances.

        x1 = cx - (c / 2 + left) w / c,  x2 = cx + (c / 2 + right) w / c, same in y

    Args:
        ref_boxes: `(..., 4)` cxcywh.
        distances: `(..., 4)` left, top, right, bottom.
        reg_scale: c.

    Returns:
        `(..., 4)` cxcywh; a size is negative where the edges crossed.
    """
    ref_centre, ref_size = ref_boxes[..., :2], ref_boxes[..., 2:]
    unit = ref_size / reg_scale
    low, high = distances[..., :2] * unit, distances[..., 2:] * unit
    return torch.cat((ref_centre + (high - low) * 0.5, ref_size + low + high), dim=-1)
