"""The decoder layer of all DETRs here, and D-FINE's with gates.

RT-DETR: DETRs Beat YOLOs on Real-time Object Detection, arXiv 2304.08069; D-FINE,
arXiv 2410.13842.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/dfine_decoder.py
(Apache-2.0).
Departs from the source: as `layers.attention`.

Legend: N images, Q queries, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmbackbones.layers.attention import (
    DeformableAttention,
    SelfAttention,
    Visibility,
)

__all__ = ['DecoderLayer', 'GatedDecoderLayer', 'GatedFusion']


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward; a norm after each.

    Subclasses replace the kinds of their parts, or the parts by others.

    Args:
        dim: D.
        num_heads: of both attentions.
        num_points: sampled points of each level.
        feedforward_channels: width between the linear layers.
        activation: class of the activation between them.
    """

    attention_type: type[DeformableAttention] = DeformableAttention
    norm_type: type[nn.Module] = nn.LayerNorm

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_points: Sequence[int],
        feedforward_channels: int,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads)
        self.norm1 = self.norm_type(dim)
        self.cross_attn = self.attention_type(dim, num_heads, num_points)
        self._init_fusion(dim)
        self._init_feedforward(dim, feedforward_channels, activation)
        self.norm3 = self.norm_type(dim)

    def _init_fusion(self, dim: int) -> None:
        self.norm2 = self.norm_type(dim)

    def _fuse(self, x: Tensor, update: Tensor) -> Tensor:
        """Joins queries and what cross-attention read, both `(N, Q, D)`."""
        return self.norm2(x + update)

    def _init_feedforward(
        self, dim: int, channels: int, activation: type[nn.Module]
    ) -> None:
        self.activation = activation()
        self.linear1 = nn.Linear(dim, channels)
        self.linear2 = nn.Linear(channels, dim)

    def _feedforward(self, x: Tensor) -> Tensor:
        return self.linear2(self.activation(self.linear1(x)))

    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        ref_boxes: Tensor,
        maps: Sequence[Tensor],
        visible_mask: Visibility = None,
    ) -> Tensor:
        """Update the queries.

        Args:
            x: `(N, Q, D)`.
            pos: `(N, Q, D)` encoding of the boxes.
            ref_boxes: `(N, Q, 4)` cxcywh, normalised.
            maps: as `attention_type` takes them.
            visible_mask: as in `SelfAttention`.

        Returns:
            `(N, Q, D)`.
        """
        x = self.norm1(x + self.self_attn(x, pos, visible_mask))
        x = self._fuse(x, self.cross_attn(x + pos, ref_boxes, maps))
        x = x + self._feedforward(x)
        return self.norm3(x.clamp(-65504, 65504))  # the range of float16


class GatedFusion(nn.Module):
    """Norm of a sum whose two terms have learned gates in (0, 1).

    Args:
        dim: D.
        norm: class of the normalisation.
    """

    def __init__(self, dim: int, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * dim, 2 * dim)
        self.norm = norm(dim)
        nn.init.zeros_(self.gate.weight)  # both gates start at 0.5
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        """Two `(N, Q, D)` to one."""
        gate_x, gate_update = (
            self.gate(torch.cat((x, update), -1)).sigmoid().chunk(2, -1)
        )
        return self.norm(gate_x * x + gate_update * update)


class GatedDecoderLayer(DecoderLayer):
    """D-FINE's decoder layer, with gates where cross-attention is added."""

    def _init_fusion(self, dim: int) -> None:
        self.gateway = GatedFusion(dim, self.norm_type)

    def _fuse(self, x: Tensor, update: Tensor) -> Tensor:
        return self.gateway(x, update)

    def _init_feedforward(
        self, dim: int, channels: int, activation: type[nn.Module]
    ) -> None:
        super()._init_feedforward(dim, channels, activation)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)
