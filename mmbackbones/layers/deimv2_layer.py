"""Decoder layers of DEIMv2: root-mean-square norms and gated feed-forward.

Real-Time Object Detection Meets DINOv3, arXiv 2509.20787.
Upstream: https://github.com/Intellindust-AI-Lab/DEIMv2 engine/deim/deim_decoder.py
(Apache-2.0).
Departs from the source: as `layers.attention`.

Legend: N images, Q queries, D width.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from mmbackbones.layers.attention import (
    DeformableAttention,
    GatedFusion,
    SelfAttention,
    Visibility,
)
from mmbackbones.layers.mlp import SwiGLU
from mmbackbones.layers.norm import RMSNorm

__all__ = ['SwiGLUDecoderLayer', 'SwiGLUGatedDecoderLayer']


class SwiGLUDecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward; a norm after each.

    Args:
        dim: D.
        num_heads: of both attentions.
        num_points: sampled points of each level.
        feedforward_channels: outputs of the first linear layer, half of which gate
            the other half; even.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_points: Sequence[int],
        feedforward_channels: int,
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads)
        self.norm1 = RMSNorm(dim)
        self.cross_attn = DeformableAttention(dim, num_heads, num_points)
        self._init_fusion(dim)
        self.swish_ffn = SwiGLU(dim, feedforward_channels // 2)
        self.norm3 = RMSNorm(dim)

    def _init_fusion(self, dim: int) -> None:
        self.norm2 = RMSNorm(dim)

    def _fuse(self, x: Tensor, update: Tensor) -> Tensor:
        """Joins queries and what cross-attention read, both `(N, Q, D)`."""
        return self.norm2(x + update)

    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        ref_boxes: Tensor,
        values: Sequence[Tensor],
        visible_mask: Visibility = None,
    ) -> Tensor:
        """Update the queries.

        Args:
            x: `(N, Q, D)`.
            pos: `(N, Q, D)` encoding of the boxes that were selected.
            ref_boxes: `(N, Q, 4)` cxcywh, normalised.
            values: as in `DeformableAttention`.
            visible_mask: as in `SelfAttention`.

        Returns:
            `(N, Q, D)`.
        """
        x = self.norm1(x + self.self_attn(x, pos, visible_mask))
        x = self._fuse(x, self.cross_attn(x + pos, ref_boxes, values))
        x = x + self.swish_ffn(x)
        return self.norm3(x.clamp(-65504, 65504))  # the range of float16


class SwiGLUGatedDecoderLayer(SwiGLUDecoderLayer):
    """With gates, as D-FINE, where cross-attention is added."""

    def _init_fusion(self, dim: int) -> None:
        self.gateway = GatedFusion(dim, RMSNorm)

    def _fuse(self, x: Tensor, update: Tensor) -> Tensor:
        return self.gateway(x, update)
