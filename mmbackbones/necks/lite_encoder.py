"""Lite encoder: a second scale made from one map, and both fused; no attention.

Real-Time Object Detection Meets DINOv3, arXiv 2509.20787.
Upstream: https://github.com/Intellindust-AI-Lab/DEIMv2 engine/deim/lite_encoder.py
(Apache-2.0).
Departs from the source:
- maps are resized to each other, so that any image size works.
"""

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmbackbones.layers.reparam import ConvNorm, conv_norm, switch_to_deploy
from mmbackbones.layers.split_elan import SplitELANConv
from mmbackbones.registry import MODELS

__all__ = ['LiteEncoder']


class GlobalFusion(nn.Module):
    """Adds the mean of a map to all its positions; then a 1x1 conv-norm and SiLU.

    Args:
        channels: of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv = ConvNorm(channels, channels, 1, activation=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, channels, H, W)` to the same shape."""
        return self.cv(x + F.adaptive_avg_pool2d(x, 1))


@MODELS.register_module()
class LiteEncoder(BaseModule):
    """Projects one map, makes one of half its size, and fuses down and up again.

    Args:
        in_channels: channels of the incoming map, one entry.
        in_strides: its stride in pixels, one entry.
        hidden_dim: channels of both outgoing maps.
        expansion: width of the branches in a fusion block, in halves of
            `hidden_dim`.
        depth_mult: number of RepVGG blocks in a branch, in units of 3.
        init_cfg: mmengine's.

    Attributes:
        out_channels: `hidden_dim` for each map.
        out_strides: the incoming stride and its double.

    Raises:
        ValueError: there is more than one incoming map.
    """

    def __init__(
        self,
        in_channels: tuple[int, ...],
        in_strides: tuple[int, ...],
        hidden_dim: int = 256,
        expansion: float = 1.0,
        depth_mult: float = 1.0,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if len(in_channels) != 1 or len(in_strides) != 1:
            raise ValueError(
                f'in_channels is {tuple(in_channels)} and in_strides '
                f'{tuple(in_strides)}; LiteEncoder takes one map, so give the backbone '
                'one of out_indices'
            )
        self.out_channels = (hidden_dim, hidden_dim)
        self.out_strides = (in_strides[0], 2 * in_strides[0])

        self.input_proj = nn.ModuleList([conv_norm(in_channels[0], hidden_dim)])
        self.down_sample1 = _halve(hidden_dim)
        self.down_sample2 = _halve(hidden_dim)
        self.bi_fusion = GlobalFusion(hidden_dim)
        self.fpn_block, self.pan_block = (
            SplitELANConv(
                in_channels=hidden_dim,
                out_channels=hidden_dim,
                mid_channels=2 * hidden_dim,
                branch_channels=int(expansion * hidden_dim // 2),
                num_blocks=round(3 * depth_mult),
            )
            for _ in range(2)
        )

    def forward(self, features: tuple[Tensor]) -> tuple[Tensor, Tensor]:
        """Fuse a map with one made of it.

        Args:
            features: `(N, in_channels[0], H, W)`, alone.

        Returns:
            `(N, hidden_dim, H, W)` and half of that size, rounded up.
        """
        (x,) = features
        fine = self.input_proj[0](x)
        coarse = self.bi_fusion(self.down_sample1(fine))
        upsampled = F.interpolate(coarse, fine.shape[-2:])  # nearest
        fine = self.fpn_block(fine + upsampled)
        return fine, self.pan_block(coarse + self.down_sample2(fine))

    def switch_to_deploy(self) -> None:
        """Re-parameterise in place; the same numbers, but training is over.

        As published, `input_proj` and both halvings keep their batch-norms.
        """
        self.eval()
        switch_to_deploy(self)


def _halve(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.AvgPool2d(3, stride=2, padding=1),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.SiLU(),
    )
