"""Hybrid encoder: attention inside the coarsest map, convolutions across maps.

RT-DETR: DETRs Beat YOLOs on Real-time Object Detection, arXiv 2304.08069, in the
form that D-FINE, arXiv 2410.13842, gives it.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/hybrid_encoder.py
(Apache-2.0).
Departs from the source:
- positions are right on maps that are not square (see `sincos_position_2d`);
- nothing depends on a size fixed beforehand: positions are computed on the device
  for the maps that come in, and maps are resized to each other, so that any image
  size works.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmbackbones.layers.attention import TransformerEncoderLayer
from mmbackbones.layers.position import sincos_position_2d
from mmbackbones.layers.reparam import (
    ConvNorm,
    RepNCSPELAN,
    SCDown,
    conv_norm,
    switch_to_deploy,
)
from mmbackbones.registry import MODELS

__all__ = ['HybridEncoder']


class MapTransformer(nn.Module):
    """Transformer layers (AIFI) over the positions of one map.

    Args:
        dim: channels of the map.
        num_layers: number of layers; 0 gives the map back.
        num_heads: number of heads.
        feedforward_channels: width between the linear layers of a layer.
    """

    def __init__(
        self, dim: int, num_layers: int, num_heads: int, feedforward_channels: int
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(dim, num_heads, feedforward_channels)
            for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(N, dim, H, W)` to the same shape."""
        if x.requires_grad:
            # Backward through a batch norm of one image on a CPU is wrong in torch
            # 2.13 where the gradient has another memory layout than the input.
            x.register_hook(Tensor.contiguous)
        dim, height, width = x.shape[1:]
        pos = sincos_position_2d(height, width, dim, device=x.device).to(x.dtype)
        x = x.flatten(2).transpose(1, 2)  # (N, H * W, dim)
        for layer in self.layers:
            x = layer(x, pos)
        return x.transpose(1, 2).unflatten(2, (height, width)).contiguous()


@MODELS.register_module()
class HybridEncoder(BaseModule):
    """Projects maps to one width, attends, and fuses down and up again.

    Relatives differ in the convolutions that fuse: they override `_input_proj`,
    `_lateral`, `_downsample`, `_fusion_block` and `_join`.

    Args:
        in_channels: channels of the incoming maps, fine to coarse.
        in_strides: their strides in pixels, each twice the one before.
        hidden_dim: channels of all outgoing maps.
        use_encoder_idx: indices of the maps that pass through attention.
        num_encoder_layers: transformer layers on each of those.
        num_heads: their number of heads.
        feedforward_channels: their width between linear layers.
        expansion: width of the branches in a fusion block, in halves of
            `hidden_dim`.
        depth_mult: number of RepVGG blocks in a branch, in units of 3.
        init_cfg: mmengine's.

    Attributes:
        out_channels: `hidden_dim` for each map.
        out_strides: `in_strides`.

    Raises:
        ValueError: the arguments contradict each other.
    """

    def __init__(
        self,
        in_channels: tuple[int, ...],
        in_strides: tuple[int, ...],
        hidden_dim: int = 256,
        use_encoder_idx: tuple[int, ...] = (2,),
        num_encoder_layers: int = 1,
        num_heads: int = 8,
        feedforward_channels: int = 1024,
        expansion: float = 1.0,
        depth_mult: float = 1.0,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        num_levels = len(in_channels)
        self._check(in_channels, in_strides, hidden_dim, num_heads, use_encoder_idx)
        self.hidden_dim, self.expansion = hidden_dim, expansion
        self.depth_mult = depth_mult
        self.use_encoder_idx = tuple(use_encoder_idx)
        self.out_channels = (hidden_dim,) * num_levels
        self.out_strides = tuple(in_strides)

        self.input_proj = nn.ModuleList(
            self._input_proj(channels) for channels in in_channels
        )
        self.encoder = nn.ModuleList(
            MapTransformer(
                hidden_dim, num_encoder_layers, num_heads, feedforward_channels
            )
            for _ in use_encoder_idx
        )
        steps = range(num_levels - 1)
        self.lateral_convs = nn.ModuleList(self._lateral() for _ in steps)
        self.fpn_blocks = nn.ModuleList(self._fusion_block() for _ in steps)
        self.downsample_convs = nn.ModuleList(self._downsample() for _ in steps)
        self.pan_blocks = nn.ModuleList(self._fusion_block() for _ in steps)
        self._upsamples_late = False

    @staticmethod
    def _check(
        in_channels: tuple[int, ...],
        in_strides: tuple[int, ...],
        hidden_dim: int,
        num_heads: int,
        use_encoder_idx: tuple[int, ...],
    ) -> None:
        if len(in_strides) != len(in_channels):
            raise ValueError(
                f'in_strides is {tuple(in_strides)} but in_channels is '
                f'{tuple(in_channels)}; give one stride per map'
            )
        if any(2 * a != b for a, b in pairwise(in_strides)):
            raise ValueError(
                f'in_strides is {tuple(in_strides)}; each must be twice the one before'
            )
        if hidden_dim % 4 or hidden_dim % num_heads:
            raise ValueError(
                f'hidden_dim is {hidden_dim}; it must be a multiple of 4 and of '
                f'num_heads, {num_heads}'
            )
        if not set(use_encoder_idx) <= set(range(len(in_channels))):
            raise ValueError(
                f'use_encoder_idx is {tuple(use_encoder_idx)}; choose from 0 to '
                f'{len(in_channels) - 1}'
            )

    def _input_proj(self, in_channels: int) -> nn.Module:
        return conv_norm(in_channels, self.hidden_dim)

    def _lateral(self) -> nn.Module:
        return ConvNorm(self.hidden_dim, self.hidden_dim, 1)

    def _downsample(self) -> nn.Module:
        return nn.Sequential(SCDown(self.hidden_dim))

    def _fusion_block(self) -> nn.Module:
        return RepNCSPELAN(
            in_channels=2 * self.hidden_dim,
            out_channels=self.hidden_dim,
            mid_channels=2 * self.hidden_dim,
            branch_channels=int(self.expansion * self.hidden_dim // 2),
            num_blocks=round(3 * self.depth_mult),
        )

    @staticmethod
    def _join(resized: Tensor, x: Tensor) -> Tensor:
        """What a fusion block gets of two maps `(N, hidden_dim, h, w)`."""
        return torch.cat((resized, x), 1)

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Fuse maps.

        Args:
            features: `(N, in_channels[i], H_i, W_i)`, fine to coarse, each half the
                size of the one before, rounded up.

        Returns:
            `(N, hidden_dim, H_i, W_i)` each.
        """
        maps = [proj(x) for proj, x in zip(self.input_proj, features, strict=True)]
        for index, transformer in zip(self.use_encoder_idx, self.encoder, strict=True):
            maps[index] = transformer(maps[index])

        # Down: `inner` collects the laterals, coarse to fine, then the finest map.
        inner, x = [], maps[-1]
        for low, lateral, block in zip(
            maps[-2::-1], self.lateral_convs, self.fpn_blocks, strict=True
        ):
            inner.append(lateral(x))
            if self._upsamples_late:
                x = block((inner[-1], low))
            else:
                upsampled = F.interpolate(inner[-1], low.shape[-2:])  # nearest
                x = block(self._join(upsampled, low))

        # And up again.
        outs = [x]
        for high, downsample, block in zip(
            inner[::-1], self.downsample_convs, self.pan_blocks, strict=True
        ):
            outs.append(block(self._join(downsample(outs[-1]), high)))
        return tuple(outs)

    def switch_to_deploy(self) -> None:
        """Re-parameterise in place; the same numbers, but training is over.

        As published, `input_proj` keeps its batch-norms.
        """
        self.eval()
        switch_to_deploy(self)

    def upsample_late(self) -> None:
        """Enlarge maps after the projections that follow, in place, where they do.

        The same numbers, but training is over; for a deployed encoder.
        """
        blocks = self.fpn_blocks
        concatenates = type(self)._join is HybridEncoder._join
        if concatenates and all(isinstance(b, RepNCSPELAN) for b in blocks):
            for block in blocks:
                block.split_projection(self.hidden_dim)
            self._upsamples_late = True
