"""The stem of HGNetV2.

Upstream: https://github.com/PaddlePaddle/PaddleClas
ppcls/arch/backbone/legendary_models/pp_hgnet_v2.py (Apache-2.0).
Departs from the source:
- the edge of the pooling is an option;
- for inference the convolution of the two concatenated maps can be split in two
  (`split_concatenation`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbackbones.layers.conv import ConvBNAct, split_inputs

__all__ = ['HGStem', 'StemPool']

_RIGHT_BOTTOM = (0, 1, 0, 1)


class StemPool(nn.Module):
    """2x2 pooling of stride 1 that keeps the size, beyond whose edge is a constant.

    Args:
        edge: that constant.
    """

    def __init__(self, edge: float = 0.0) -> None:
        super().__init__()
        self.edge = edge

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        """`(N, C, H, W)`, and the same padded by a row and a column of zeros.

        Both may be overwritten. Returns `(N, C, H, W)`.
        """
        if self.edge != 0:
            padded = F.pad(x, _RIGHT_BOTTOM, value=self.edge)
        return F.max_pool2d(padded, kernel_size=2, stride=1)


class HGStem(nn.Module):
    """Stride 4 in two steps; between them 2x2 convolutions beside a 2x2 pooling.

    Args:
        in_channels: of the image.
        mid_channels: inside.
        out_channels: of the map that comes out.
        conv: makes a `ConvBNAct` with the options of the network.
        pool_edge: of `StemPool`.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        conv: Callable[..., ConvBNAct],
        *,
        pool_edge: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem1 = conv(in_channels, mid_channels, 3, stride=2)
        self.stem2a = conv(mid_channels, mid_channels // 2, 2)
        self.stem2b = conv(mid_channels // 2, mid_channels, 2)
        self.stem3 = conv(2 * mid_channels, mid_channels, 3, stride=2)
        self.stem4 = conv(mid_channels, out_channels, 1)
        self.pool = StemPool(pool_edge)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in, H, W)` to `(N, out, ceil(H / 4), ceil(W / 4))`."""
        x = self.stem1(x)
        padded = F.pad(x, _RIGHT_BOTTOM)
        convolved = self.stem2b(F.pad(self.stem2a(padded), _RIGHT_BOTTOM))
        pooled = self.pool(x, padded)
        if isinstance(self.stem3, nn.ModuleList):
            of_pooled, of_convolved = self.stem3
            return self.stem4(of_convolved(convolved, of_pooled(pooled)))
        return self.stem4(self.stem3(torch.cat((pooled, convolved), dim=1)))

    def split_concatenation(self) -> None:
        """Convolve both maps apart, in place; the same numbers, training is over.

        Nothing is concatenated then, which of maps of this size takes as long as a
        convolution of them. For a stem whose norms and affines are folded.
        """
        if isinstance(self.stem3, nn.ModuleList):
            return
        conv = self.stem3.conv
        self.stem3 = nn.ModuleList(
            split_inputs(conv, self.stem3.act, conv.in_channels // 2)
        )
