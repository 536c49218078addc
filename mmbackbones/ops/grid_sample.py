"""Bilinear sampling by gathering, for runtimes whose GridSample is wrong or missing.

Same definition as `torch.nn.functional.grid_sample` with `mode='bilinear'`,
`padding_mode='zeros'`, `align_corners=False`.
"""

import torch
from torch import Tensor

__all__ = ['grid_sample_by_gather']


def grid_sample_by_gather(maps: Tensor, grid: Tensor) -> Tensor:
    """Sample maps at points by gathering the four pixels around each.

    Args:
        maps: `(N, C, H, W)`.
        grid: `(N, h, w, 2)` x and y; -1 and 1 are the outer borders of a map, and
            pixels beyond them are 0. Any finite values.

    Returns:
        `(N, C, h, w)`.
    """
    height, width = maps.shape[-2:]
    grid = grid.to(torch.promote_types(grid.dtype, torch.float32))  # places are exact
    x = ((grid[..., 0] + 1) * width - 1) / 2
    y = ((grid[..., 1] + 1) * height - 1) / 2
    # Clamped, so that far points neither overflow as integers nor weigh anything: at
    # -2 and at `width` both neighbours are outside.
    x, y = x.clamp(-2, width + 1), y.clamp(-2, height + 1)
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    pixels = maps.flatten(2)  # (N, C, H * W)
    total = 0
    for dy, share_y in ((0, 1 - bottom_share), (1, bottom_share)):
        for dx, share_x in ((0, 1 - right_share), (1, right_share)):
            column, row = left + dx, top + dy
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            # Integers first: graphs may be turned to half precision, which has no 2049.
            row, column = row.clamp(0, height - 1), column.clamp(0, width - 1)
            index = row.long() * width + column.long()
            index = index.flatten(1)[:, None].expand(-1, maps.shape[1], -1)
            values = pixels.gather(2, index).unflatten(2, tuple(grid.shape[1:3]))
            weight = (share_x * share_y * inside.to(x.dtype)).to(maps.dtype)
            total = total + values * weight[:, None]
    return total
