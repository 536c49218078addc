"""The decoder layer of RT-DETR: deformable attention with projections, no gates.

RT-DETR: DETRs Beat YOLOs on Real-time Object Detection, arXiv 2304.08069; RT-DETRv2,
arXiv 2407.17140.
Upstream: https://github.com/lyuwenyu/RT-DETR
rtdetrv2_pytorch/src/zoo/rtdetr/rtdetrv2_decoder.py (Apache-2.0).
Departs from the source:
- as `layers.attention`;
- queries are kept inside the range of float16 in v2 as in v1.

Legend: N images, Q queries, D width.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mmbackbones.layers.attention import DeformableAttention
from mmbackbones.layers.decoder_layer import DecoderLayer
from mmbackbones.ops.deformable_attention import discrete_sample

__all__ = ['ProjectedDeformableAttention', 'RTDETRDecoderLayer']


class ProjectedDeformableAttention(DeformableAttention):
    """Deformable attention with linear projections of the maps and of the result.

    Args:
        dim: D, a multiple of `num_heads`.
        num_heads: number of heads.
        num_points: points of each level.
    """

    def __init__(self, dim: int, num_heads: int, num_points: Sequence[int]) -> None:
        super().__init__(dim, num_heads, num_points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, queries: Tensor, ref_boxes: Tensor, maps: Sequence[Tensor]
    ) -> Tensor:
        """Read the maps.

        Args:
            queries: `(N, Q, D)`.
            ref_boxes: `(N, Q, 4)` cxcywh, normalised.
            maps: `(N, D, h, w)` of each level.

        Returns:
            `(N, Q, D)`.
        """
        # As 1x1 convolutions, so that maps stay maps: heads then split for free.
        weight, bias = self.value_proj.weight[..., None, None], self.value_proj.bias
        values = [
            F.conv2d(x, weight, bias)
            .reshape(-1, x.shape[1] // self.num_heads, *x.shape[2:])
            .to(ref_boxes.dtype)
            for x in maps
        ]
        return self.output_proj(super().forward(queries, ref_boxes, values))

    def freeze_to_pixels(self) -> None:
        """Read whole pixels from now on; where they lie is no longer learned."""
        self.sample = discrete_sample
        self.sampling_offsets.requires_grad_(False)


class RTDETRDecoderLayer(DecoderLayer):
    """RT-DETR's decoder layer, whose cross-attention has projections."""

    attention_type = ProjectedDeformableAttention
