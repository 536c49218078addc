"""Self-attention, the encoder layer made of it, and deformable cross-attention.

RT-DETR: DETRs Beat YOLOs on Real-time Object Detection, arXiv 2304.08069; D-FINE,
arXiv 2410.13842.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/dfine_decoder.py and
hybrid_encoder.py (Apache-2.0).
Departs from the source:
- attention weights are not returned, which lets torch use its fused kernels;
- masks say which keys are visible (True), not which are blocked;
- dropout is gone: no published model has any.

Legend: N images, Q queries, L tokens, D width, P points of a query and head.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbackbones.ops.deformable_attention import deformable_sample

__all__ = [
    'DeformableAttention',
    'SelfAttention',
    'TransformerEncoderLayer',
    'Visibility',
]

Visibility = Tensor | int | None
"""Which tokens see which, see `SelfAttention.forward`."""


class SelfAttention(nn.Module):
    """Multi-head self-attention with positions in queries and keys only.

    Parameters have the names, shapes and initial values of `nn.MultiheadAttention`.

    Args:
        dim: D, a multiple of `num_heads`.
        num_heads: number of heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x: Tensor, pos: Tensor, visible_mask: Visibility = None
    ) -> Tensor:
        """Attend from every token to all visible ones.

        Args:
            x: `(N, L, D)`.
            pos: added to queries and keys, broadcastable to `x`.
            visible_mask: `(L, L)` bool; row i says which tokens token i may see. Or a
                number R: the first R tokens see all, the others each other only,
                which takes no memory of L * L. None hides nothing.

        Returns:
            `(N, L, D)`.
        """
        dim = x.shape[-1]
        weight_qk, weight_v = self.in_proj_weight.split((2 * dim, dim))
        bias_qk, bias_v = self.in_proj_bias.split((2 * dim, dim))
        q, k = F.linear(x + pos, weight_qk, bias_qk).chunk(2, -1)
        v = F.linear(x, weight_v, bias_v)
        # (N, L, D) -> (N, heads, L, D / heads)
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v)
        )
        if isinstance(visible_mask, int):
            x = _attend_in_two(q, k, v, visible_mask)
        else:
            x = F.scaled_dot_product_attention(q, k, v, visible_mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))


def _attend_in_two(q: Tensor, k: Tensor, v: Tensor, num_first: int) -> Tensor:
    """The first tokens see all, the others only each other; `(N, heads, L, d)`."""
    first = F.scaled_dot_product_attention(q[:, :, :num_first], k, v)
    q, k, v = (t[:, :, num_first:] for t in (q, k, v))
    return torch.cat((first, F.scaled_dot_product_attention(q, k, v)), 2)


class TransformerEncoderLayer(nn.Module):
    """Post-norm layer over all positions of a map; GELU between its linear layers.

    Args:
        dim: D.
        num_heads: number of heads.
        feedforward_channels: width between the linear layers.
    """

    def __init__(self, dim: int, num_heads: int, feedforward_channels: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads)
        self.linear1 = nn.Linear(dim, feedforward_channels)
        self.linear2 = nn.Linear(feedforward_channels, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """`(N, L, D)` tokens and `(1, L, D)` positions to `(N, L, D)`."""
        x = self.norm1(x + self.self_attn(x, pos))
        return self.norm2(x + self.linear2(F.gelu(self.linear1(x))))


class DeformableAttention(nn.Module):
    """Samples a few points of the maps around the reference box of each query.

    Points lie at  ref_xy + offset / points of the level * ref_wh / 2. The weights
    of all points of a query and head sum to 1. There is no projection of values or
    output: D-FINE reads the encoder's maps as they are.

    Args:
        dim: D, a multiple of `num_heads`.
        num_heads: number of heads, each with offsets of its own.
        num_points: points of each level.

    Attributes:
        sample: reads the maps; called like `deformable_sample`, the default.
    """

    def __init__(self, dim: int, num_heads: int, num_points: Sequence[int]) -> None:
        super().__init__()
        self.num_heads, self.num_points = num_heads, tuple(num_points)
        self.sample = deformable_sample
        self._is_folded = False
        total = num_heads * sum(num_points)
        self.sampling_offsets = nn.Linear(dim, total * 2)
        self.attention_weights = nn.Linear(dim, total)
        scale = [1 / n for n in num_points for _ in range(n)]
        self.register_buffer('num_points_scale', torch.tensor(scale))
        self._init_weights()

    def _init_weights(self) -> None:
        """Point j of a level starts at j steps in the direction of its head."""
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack((angles.cos(), angles.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # unit square
        steps = torch.cat([torch.arange(1, n + 1) for n in self.num_points])
        offsets = direction[:, None] * steps[:, None]  # (heads, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())

    def forward(
        self, queries: Tensor, ref_boxes: Tensor, values: Sequence[Tensor]
    ) -> Tensor:
        """Read the maps.

        Args:
            queries: `(N, Q, D)`.
            ref_boxes: `(N, Q, 4)` cxcywh, normalised.
            values: one map `(N * heads, D / heads, h, w)` per level.

        Returns:
            `(N, Q, D)`.
        """
        offsets = self.sampling_offsets(queries)
        if self._is_folded:
            # Long rows: runtimes are slow with a last dimension of 2 to broadcast.
            ref_xy, ref_wh = ref_boxes.unflatten(-1, (2, 2))[..., None].unbind(-3)
            locations = ref_xy + offsets.unflatten(-1, (2, -1)) * ref_wh
            locations = locations.unflatten(-1, (self.num_heads, -1))
            locations = locations.permute(0, 1, 3, 4, 2)
        else:
            ref_xy, ref_wh = ref_boxes[:, :, None, None].chunk(2, -1)
            scale = self.num_points_scale[:, None] * 0.5
            offsets = offsets.unflatten(-1, (self.num_heads, -1, 2))
            locations = ref_xy + offsets * scale * ref_wh  # (N, Q, heads, P, 2)
        weights = self.attention_weights(queries).unflatten(-1, (self.num_heads, -1))
        # Over a short last dimension torch's softmax on a CPU is ten times slower.
        weights = weights.movedim(1, 3).softmax(2).movedim(3, 1)
        return self.sample(values, locations, weights, self.num_points)

    @torch.no_grad()
    def fold_scale(self) -> None:
        """Let `sampling_offsets` predict all x and then all y, scaled, in place.

        The same numbers, but training is over.
        """
        if self._is_folded:
            return
        scale = (self.num_points_scale * 0.5).repeat(self.num_heads)
        for parameter in self.sampling_offsets.parameters():
            by_axis = parameter.unflatten(0, (-1, 2)).transpose(0, 1).clone()
            by_axis *= scale.view(-1, *(1,) * (parameter.ndim - 1))
            parameter.copy_(by_axis.flatten(0, 1))
        self._is_folded = True
