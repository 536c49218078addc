"""ELAN blocks of DEIMv2: one projection, split, instead of two side by side.

Real-Time Object Detection Meets DINOv3, arXiv 2509.20787.
Upstream: https://github.com/Intellindust-AI-Lab/DEIMv2 engine/deim/hybrid_encoder.py
(Apache-2.0).
Departs from the source: as `layers.reparam`.
"""

from torch import Tensor, nn

from mmbackbones.layers.reparam import ConvNorm, RepNCSPELAN, RepVGGBlock

__all__ = ['CSPSplitLayer', 'SplitELAN', 'SplitELANConv']


class CSPSplitLayer(nn.Module):
    """One 1x1 projection, RepVGG blocks on its second half, and the sum of both.

    Args:
        in_channels: of the input.
        out_channels: of each half and of the output.
        num_blocks: RepVGG blocks.
    """

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, 2 * out_channels, 1, activation=nn.SiLU)
        self.bottlenecks = nn.Sequential(
            *(RepVGGBlock(out_channels) for _ in range(num_blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_channels, H, W)` to `(N, out_channels, H, W)`."""
        first, second = self.conv1(x).chunk(2, 1)
        return first + self.bottlenecks(second)


class SplitELAN(RepNCSPELAN):
    """`RepNCSPELAN` of split layers, without convolutions after them."""

    @staticmethod
    def _branch(in_channels: int, out_channels: int, num_blocks: int) -> nn.Sequential:
        return nn.Sequential(CSPSplitLayer(in_channels, out_channels, num_blocks))


class SplitELANConv(RepNCSPELAN):
    """`RepNCSPELAN` of split layers, each with a 3x3 convolution after it."""

    @staticmethod
    def _branch(in_channels: int, out_channels: int, num_blocks: int) -> nn.Sequential:
        return nn.Sequential(
            CSPSplitLayer(in_channels, out_channels, num_blocks),
            ConvNorm(out_channels, out_channels, 3, activation=nn.SiLU),
        )
