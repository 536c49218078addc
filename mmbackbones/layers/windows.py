"""Square windows of a grid of tokens: cut, put together again, pooled.

Upstream: the padding is that of https://github.com/facebookresearch/sam2
sam2/modeling/backbones/utils.py (Apache-2.0).
Departs from the source:
- grids have a time axis; windows never span frames.

Legend: N batch, T frames (1 for images), H W grid, C width, S side of a window.
"""

import torch.nn.functional as F
from torch import Tensor

__all__ = ['max_pool_tokens', 'merge_windows', 'partition_windows']


def partition_windows(x: Tensor, side: int) -> Tensor:
    """Cut a grid into windows, row by row.

    Args:
        x: `(N, T, H, W, C)`; zeros are appended at the right and at the bottom where
            a side is no multiple of the window's.
        side: S, in tokens.

    Returns:
        `(N * T * ceil(H / S) * ceil(W / S), 1, S, S, C)`.
    """
    bottom, right = -x.shape[2] % side, -x.shape[3] % side
    if bottom or right:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    n, t, h, w, c = x.shape
    rows, columns = h // side, w // side
    x = x.reshape(n * t, rows, side, columns, side, c).transpose(2, 3)
    return x.reshape(n * t * rows * columns, 1, side, side, c)


def merge_windows(windows: Tensor, size: tuple[int, int, int, int]) -> Tensor:
    """Undo `partition_windows`, and drop what it appended.

    Args:
        windows: `(N * T * ceil(H / S) * ceil(W / S), 1, S, S, C)`.
        size: N, T, H and W of the grid.

    Returns:
        `(N, T, H, W, C)`.
    """
    n, t, h, w = size
    side, c = windows.shape[-2:]
    rows, columns = -(-h // side), -(-w // side)
    x = windows.reshape(n * t, rows, columns, side, side, c).transpose(2, 3)
    return x.reshape(n, t, rows * side, columns * side, c)[:, :, :h, :w]


def max_pool_tokens(x: Tensor) -> Tensor:
    """Maxima of 2x2 tokens: `(N, T, H, W, C)` to `(N, T, H / 2, W / 2, C)`."""
    maps = x.flatten(0, 1).permute(0, 3, 1, 2)  # (N * T, C, H, W)
    pooled = F.max_pool2d(maps, kernel_size=2)
    return pooled.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
