"""Sine-cosine encoding of the positions of a map.

Attention Is All You Need, arXiv 1706.03762; in two dimensions as in RT-DETR, arXiv
2304.08069.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/hybrid_encoder.py
(Apache-2.0).
Departs from the source:
- the grid is laid out like the tokens, row by row. Upstream flattens it column by
  column: the same numbers on square maps, scrambled positions on all others.
"""

import torch
from torch import Tensor

__all__ = ['sincos_position_2d']


def sincos_position_2d(
    height: int,
    width: int,
    channels: int,
    temperature: float = 10000.0,
    device: torch.device | None = None,
) -> Tensor:
    """Encode row and column indices, [sin y, cos y, sin x, cos x] in the channels.

    The i-th of `channels / 4` frequencies is temperature^(-4 i / channels).

    Args:
        height: rows.
        width: columns.
        channels: a multiple of 4.
        temperature: longest wavelength over 2 pi.
        device: of the result.

    Returns:
        `(1, height * width, channels)` float32, row after row.
    """
    exponents = torch.arange(channels // 4, device=device) / (channels // 4)
    frequencies = temperature**-exponents
    y = torch.arange(height, device=device)[:, None] * frequencies  # (h, C / 4)
    x = torch.arange(width, device=device)[:, None] * frequencies  # (w, C / 4)
    y = torch.cat((y.sin(), y.cos()), 1)[:, None].expand(-1, width, -1)
    x = torch.cat((x.sin(), x.cos()), 1)[None].expand(height, -1, -1)
    return torch.cat((y, x), 2).flatten(0, 1)[None]
