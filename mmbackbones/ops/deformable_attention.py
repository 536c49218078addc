"""Multi-scale deformable sampling: the parameter-free core of deformable attention.

Deformable DETR: Deformable Transformers for End-to-End Object Detection, arXiv
2010.04159; with a number of points per level as in RT-DETRv2, arXiv 2407.17140.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/utils.py (Apache-2.0).
Departs from the source:
- values arrive as maps, one view per level that all decoder layers share, so that
  nothing is transposed and copied in each layer;
- the samples of a level are summed before the next level is read, which spares a
  concatenation of all of them;
- discrete sampling is right on maps that are not square (upstream keeps columns
  below the number of rows).

Legend: N images, Q queries, H heads, D channels of a head, P points of a query and
head over all levels.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

__all__ = ['deformable_sample', 'discrete_sample']


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
    num_images, _, num_heads = weights.shape[:3]
    # Points become rows and queries columns: on a CPU the sampler works along rows.
    grids = (2 * locations - 1).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (NH, P, Q, 2)
    weights = weights.permute(0, 2, 3, 1).flatten(0, 1)[:, None]  # (NH, 1, P, Q)
    total = 0
    for value, grid, weight in zip(
        values,
        grids.split(tuple(num_points), 1),
        weights.split(tuple(num_points), 2),
        strict=True,
    ):
        sampled = F.grid_sample(value, grid, align_corners=False)  # (NH, D, p, Q)
        total = total + (sampled * weight).sum(2)
    return total.unflatten(0, (num_images, num_heads)).flatten(1, 2).transpose(1, 2)


def discrete_sample(
    values: Sequence[Tensor],
    locations: Tensor,
    weights: Tensor,
    num_points: Sequence[int],
) -> Tensor:
    """As `deformable_sample`, but of whole pixels, which needs no interpolation.

    RT-DETRv2's: column `x * w` of a map w pixels wide, rounded to the nearest
    integer and kept inside the map; rows likewise. That is the pixel right below the
    location by half a pixel, and it is what weights were fine-tuned with. Locations
    get no gradient.
    """
    num_images, num_queries, num_heads = weights.shape[:3]
    locations = locations.detach().permute(0, 2, 3, 1, 4).flatten(0, 1)  # NH, P, Q, 2
    weights = weights.permute(0, 2, 3, 1).flatten(0, 1)[:, None]  # (NH, 1, P, Q)
    total = 0
    for value, location, weight in zip(
        values,
        locations.split(tuple(num_points), 1),
        weights.split(tuple(num_points), 2),
        strict=True,
    ):
        height, width = value.shape[-2:]
        x, y = location.unbind(-1)  # (NH, p, Q)
        column = (x * width + 0.5).long().clamp(0, width - 1)
        row = (y * height + 0.5).long().clamp(0, height - 1)
        pixel = (row * width + column).flatten(1)[:, None]  # (NH, 1, p * Q)
        sampled = value.flatten(2).gather(2, pixel.expand(-1, value.shape[1], -1))
        total = total + (sampled.unflatten(2, (-1, num_queries)) * weight).sum(2)
    return total.unflatten(0, (num_images, num_heads)).flatten(1, 2).transpose(1, 2)
