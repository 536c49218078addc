"""Decoder layers of DEIMv2: root-mean-square norms and gated feed-forward.

Real-Time Object Detection Meets DINOv3, arXiv 2509.20787.
Upstream: https://github.com/Intellindust-AI-Lab/DEIMv2 engine/deim/deim_decoder.py
(Apache-2.0).
Departs from the source: as `layers.attention`.

Legend: N images, Q queries, D width.
"""

from collections.abc import Sequence

from torch import Tensor

from mmbackbones.layers.decoder_layer import DecoderLayer, GatedFusion
from mmbackbones.layers.mlp import SwiGLU
from mmbackbones.layers.norm import RMSNorm

__all__ = ['SwiGLUDecoderLayer', 'SwiGLUGatedDecoderLayer']


class SwiGLUDecoderLayer(DecoderLayer):
    """Self-attention, cross-attention, feed-forward; a norm after each.

    Args:
        dim: D.
        num_heads: of both attentions.
        num_points: sampled points of each level.
        feedforward_channels: outputs of the first linear layer, half of which gate
            the other half; even.
    """

    norm_type = RMSNorm

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_points: Sequence[int],
        feedforward_channels: int,
    ) -> None:
        super().__init__(dim, num_heads, num_points, feedforward_channels)

    def _init_feedforward(self, dim: int, channels: int, _: object) -> None:
        self.swish_ffn = SwiGLU(dim, channels // 2)  # which is its own activation

    def _feedforward(self, x: Tensor) -> Tensor:
        return self.swish_ffn(x)


class SwiGLUGatedDecoderLayer(SwiGLUDecoderLayer):
    """With gates, as D-FINE, where cross-attention is added."""

    def _init_fusion(self, dim: int) -> None:
        self.gateway = GatedFusion(dim, self.norm_type)

    def _fuse(self, x: Tensor, update: Tensor) -> Tensor:
        return self.gateway(x, update)
