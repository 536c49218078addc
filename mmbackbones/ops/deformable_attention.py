"""Multi-scale deformable sampling: the parameter-free core of deformable attention.

Deformable DETR: Deformable Transformers for End-to-End Object Detection, arXiv
2010.04159; with a number of points per level as in RT-DETRv2, arXiv 2407.17140.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/utils.py (Apache-2.0).
Departs from the source:
- values arrive as maps, one view per level that all decoder layers share, so that
  nothing is transposed and copied in each layer.

Legend: N images, Q queries, H heads, D channels of a head, P points of a query and
head over all levels.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

__all__ = ['deformable_sample']


def deformable_sample(
    values: Sequence[Tensor],
    locations: Tensor,
    weights: Tensor,
    num_points: Sequence[int],
) -> Tensor:
    """Weighted sum of bilinear samples from the maps of all levels.

    Args:
        values: one map `(N * H, D, h, w)` per level, image-major.
        locations: `(N, Q, H, P, 2)` x and y; 0 and 1 are the outer borders of every
            map, samples beyond them are 0.
        weights: `(N, Q, H, P)`.
        num_points: points of each level; their sum is P and their order that of P.

    Returns:
        `(N, Q, H * D)`.
    """
    num_images, num_queries, num_heads = weights.shape[:3]
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (N * H, Q, P, 2)
    weights = weights.transpose(1, 2).reshape(-1, 1, num_queries, weights.shape[-1])
    grids, weights = grids.split(tuple(num_points), 2), weights.split(num_points, 3)
    total = 0
    for value, grid, weight in zip(values, grids, weights, strict=True):
        sampled = F.grid_sample(value, grid, align_corners=False)  # (N * H, D, Q, p)
        total = total + (sampled * weight).sum(-1)
    return total.reshape(num_images, -1, num_queries).transpose(1, 2)
