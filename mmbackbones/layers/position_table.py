"""Learned position tables, at the size of any grid.

Window Attention is Bugged: How not to Interpolate Position Embeddings,
arXiv 2311.05613. A table trained along with window attention repeats itself from
window to window, and stretching it puts that pattern out of step with the windows.
Hence the sum of two: a background that is stretched, and one window that is tiled.
Upstream: https://github.com/facebookresearch/sam2
sam2/modeling/backbones/hieradet.py (Apache-2.0).
Departs from the source:
- the grid need not be a multiple of the window;
- a table of one dimension (time) can be stretched too.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['resample_table', 'tile_table']


def resample_table(
    table: Tensor, size: Sequence[int], *, antialias: bool = False
) -> Tensor:
    """Stretch a table to a grid: bicubic in space, linear in time.

    Args:
        table: `(1, C, L)` or `(1, C, H, W)`.
        size: of the grid, one or two numbers.
        antialias: for two dimensions, the cubic kernel of Pillow: a = -0.5 instead
            of -0.75, and widened where the grid is smaller than the table. Weights
            want the kernel they were trained with.

    Returns:
        `(1, C, *size)`, which is `table` itself if it has that size.
    """
    size = tuple(size)
    if tuple(table.shape[2:]) == size:
        return table
    mode = 'linear' if len(size) == 1 else 'bicubic'
    # A CPU has no antialiased kernel of half precision.
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    return F.interpolate(
        wide, size=size, mode=mode, align_corners=False, antialias=antialias
    ).to(table.dtype)


def tile_table(table: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat the table of one window over a grid, from the top left corner.

    Args:
        table: `(1, C, S, S)`.
        size: H and W of the grid; the last windows may be cut.

    Returns:
        `(1, C, H, W)`.
    """
    height, width = size
    rows, columns = -(-height // table.shape[2]), -(-width // table.shape[3])
    return table.repeat(1, 1, rows, columns)[..., :height, :width]
