"""What every decoder does around its layers: select, denoise, decode, split.

RT-DETR: DETRs Beat YOLOs on Real-time Object Detection, arXiv 2304.08069.
Upstream: https://github.com/lyuwenyu/RT-DETR
rtdetrv2_pytorch/src/zoo/rtdetr/rtdetrv2_decoder.py (Apache-2.0).
Departs from the source:
- in a batch without boxes the denoising embedding has a zero gradient, not none.

Legend: N images, Q queries, D width, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmbackbones.decoders.denoising import (
    denoising_visible_mask,
    make_denoising_queries,
)
from mmbackbones.decoders.query_selection import QuerySelection, prior_bias
from mmbackbones.layers.attention import Visibility
from mmbackbones.layers.mlp import MLP
from mmbackbones.ops.predictions import BoxTargets, DecoderOutput, QueryPredictions

__all__ = ['DETRDecoder']


class DETRDecoder(QuerySelection):
    """Base of the dialects: each has its own layers, box heads and `_decode`.

    Args:
        num_classes: C.
        in_channels: channels of the incoming maps, fine to coarse.
        in_strides: their strides in pixels.
        hidden_dim: D.
        num_queries: Q; fewer where an image has fewer positions.
        num_layers: decoder layers.
        num_heads: of both attentions of a layer.
        num_points: sampled points of each map.
        feedforward_channels: of a layer.
        num_denoising: denoising positives per image, see `make_denoising_queries`;
            0 for none.
        label_noise_ratio: likewise.
        box_noise_scale: likewise.
        eval_layer: 0-based layer that predicts in evaluation, -1 the last.
        eval_size_hw: image size in pixels whose anchors are kept in a buffer. Other
            sizes work as well.

    Raises:
        ValueError: the arguments contradict each other.

    Attributes:
        flip_crossed: of the denoising boxes, see `make_denoising_queries`.
    """

    flip_crossed = True

    def __init__(
        self,
        num_classes: int,
        in_channels: tuple[int, ...],
        in_strides: tuple[int, ...],
        *,
        hidden_dim: int = 256,
        num_queries: int = 300,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: tuple[int, ...] = (4, 4, 4),
        feedforward_channels: int = 1024,
        num_denoising: int = 100,
        label_noise_ratio: float = 0.5,
        box_noise_scale: float = 1.0,
        eval_layer: int = -1,
        eval_size_hw: tuple[int, int] = (640, 640),
    ) -> None:
        super().__init__(
            num_classes, in_channels, in_strides, hidden_dim, num_queries, eval_size_hw
        )
        if len(num_points) != len(in_channels):
            raise ValueError(
                f'num_points is {tuple(num_points)} but there are '
                f'{len(in_channels)} maps; give one number per map'
            )
        if hidden_dim % num_heads:
            raise ValueError(
                f'hidden_dim is {hidden_dim}; it must be a multiple of num_heads, '
                f'{num_heads}'
            )
        if not -num_layers <= eval_layer < num_layers:
            raise ValueError(
                f'eval_layer is {eval_layer}; choose from {-num_layers} to '
                f'{num_layers - 1}'
            )
        self.num_layers, self.num_heads = num_layers, num_heads
        self.num_points = tuple(num_points)
        self.feedforward_channels = feedforward_channels
        self.num_denoising = num_denoising
        self.label_noise_ratio = label_noise_ratio
        self.box_noise_scale = box_noise_scale
        self.eval_layer = eval_layer % num_layers
        if num_denoising > 0:
            self.denoising_class_embed = nn.Embedding(
                num_classes + 1, hidden_dim, padding_idx=num_classes
            )
        self.query_pos_head = self._query_pos_head()
        self.dec_score_head = nn.ModuleList(
            nn.Linear(hidden_dim, num_classes) for _ in range(num_layers)
        )
        for head in self.dec_score_head:
            nn.init.constant_(head.bias, prior_bias(0.01))

    def _query_pos_head(self) -> MLP:
        """Encodes boxes `(N, Q, 4)` as positions `(N, Q, D)`."""
        return MLP(4, 2 * self.hidden_dim, self.hidden_dim, 2, self.activation)

    def _bbox_head(self, out_channels: int) -> MLP:
        """A head that starts at zero."""
        head = MLP(self.hidden_dim, self.hidden_dim, out_channels, 3, self.activation)
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.zeros_(head.layers[-1].bias)
        return head

    def forward(
        self, features: tuple[Tensor, ...], targets: BoxTargets | None = None
    ) -> DecoderOutput:
        """Detect.

        Args:
            features: `(N, in_channels[i], H_i, W_i)`, fine to coarse.
            targets: ground truth; read in training only, for denoising.

        Returns:
            In training all layers, the selected encoder tokens and, where there are
            boxes, the denoising queries; in evaluation `eval_layer` alone.
        """
        maps = [proj(x) for proj, x in zip(self.input_proj, features, strict=True)]
        selected = self.select_queries(maps)
        box_dtype = selected.box_logits.dtype
        values = self._values(maps, box_dtype)
        content, box_logits = selected.content.detach(), selected.box_logits.detach()
        if not self.training:
            return DecoderOutput(self._decode(content, box_logits, values))

        denoising = visible_mask = None
        if self.num_denoising > 0 and targets is not None:
            denoising = make_denoising_queries(
                targets,
                self.denoising_class_embed,
                self.num_denoising,
                self.label_noise_ratio,
                self.box_noise_scale,
                flip_crossed=self.flip_crossed,
            )
        if denoising is not None:
            num_denoising, num_queries = denoising.content.shape[1], content.shape[1]
            content = torch.cat((denoising.content, content), 1)
            box_logits = torch.cat((denoising.box_logits, box_logits), 1)
            visible_mask = denoising_visible_mask(
                num_denoising, denoising.pairs.num_groups, num_queries, content.device
            )
        elif self.num_denoising > 0:
            # Every rank must reach every parameter, also one without boxes.
            content = content + 0 * self.denoising_class_embed.weight.sum()

        predictions = self._decode(content, box_logits, values, visible_mask)
        enc = dict(
            enc_logits=selected.logits.to(box_dtype),
            enc_boxes=selected.box_logits.sigmoid(),
        )
        if denoising is None:
            return DecoderOutput(predictions, **enc)
        dn_predictions, predictions = _split_queries(predictions, num_denoising)
        return DecoderOutput(predictions, dn_predictions, denoising.pairs, **enc)

    def _values(self, maps: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
        """What all layers sample: by default `(N * heads, D / heads, h, w)` views."""
        # Maps as they come are (N, heads * D / heads, h, w): splitting is free.
        return [
            x.reshape(-1, x.shape[1] // self.num_heads, *x.shape[2:]).to(dtype)
            for x in maps
        ]

    def _decode(
        self,
        x: Tensor,
        box_logits: Tensor,
        values: Sequence[Tensor],
        visible_mask: Visibility = None,
    ) -> QueryPredictions:
        """Run the layers.

        Args:
            x: `(N, Q, D)` content of the queries.
            box_logits: `(N, Q, 4)` without gradient.
            values: of `_values`, one for each map.
            visible_mask: as in `SelfAttention`.

        Returns:
            All layers in training, `eval_layer` alone in evaluation.
        """
        raise NotImplementedError


def _split_queries(
    predictions: QueryPredictions, num_first: int
) -> tuple[QueryPredictions, QueryPredictions]:
    """Part the first queries from the rest; Q is the last but one dimension."""

    def part(which: slice) -> QueryPredictions:
        return QueryPredictions(
            **{
                name: None if value is None else value[..., which, :]
                for name, value in vars(predictions).items()
            }
        )

    return part(slice(num_first)), part(slice(num_first, None))
