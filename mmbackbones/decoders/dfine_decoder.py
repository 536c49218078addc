"""D-FINE's decoder: layers that refine a distribution over each edge of a box.

D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution
Refinement, arXiv 2410.13842.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/dfine_decoder.py
(Apache-2.0).
Departs from the source:
- distributions, their quality and box arithmetic are in float32 under autocast;
- the score head of the first layer runs once, not twice;
- `reg_scale` is a float parameter (int64 in the released files, which load);
- in a batch without boxes the denoising embedding has a zero gradient, not none.

Legend: N images, Q queries, D width, C classes, B = reg_max + 1 bins.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mmbackbones.decoders.denoising import (
    denoising_visible_mask,
    make_denoising_queries,
)
from mmbackbones.decoders.query_selection import QuerySelection, prior_bias
from mmbackbones.layers.attention import GatedDecoderLayer
from mmbackbones.layers.mlp import MLP
from mmbackbones.ops.boxes import inverse_sigmoid
from mmbackbones.ops.distribution import (
    distance_to_box,
    edge_probabilities,
    integral,
    weighting_function,
)
from mmbackbones.ops.predictions import BoxTargets, DecoderOutput, QueryPredictions
from mmbackbones.registry import MODELS

__all__ = ['DFINEDecoder', 'LocationQuality']


class LocationQuality(nn.Module):
    """Correction of class logits by how peaked the edge distributions are.

    The four highest probabilities of each edge and their mean pass through a small
    MLP that starts at zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reg_conf = MLP(4 * (4 + 1), 64, 1, 2)
        nn.init.zeros_(self.reg_conf.layers[-1].weight)
        nn.init.zeros_(self.reg_conf.layers[-1].bias)

    def forward(self, corners: Tensor) -> Tensor:
        """`(N, Q, 4 * B)` logits of the distributions to `(N, Q, 1)`."""
        top = edge_probabilities(corners).topk(4, -1).values
        stats = torch.cat((top, top.mean(-1, keepdim=True)), -1).flatten(-2)
        # Parameters are in half precision only where the whole model is.
        return self.reg_conf(stats.to(self.reg_conf.layers[0].weight.dtype))


class RefinementLayers(nn.Module):
    """Holds what released checkpoints keep under `decoder.decoder`."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        up: nn.Parameter,
        reg_scale: nn.Parameter,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.lqe_layers = nn.ModuleList(LocationQuality() for _ in layers)
        self.up, self.reg_scale = up, reg_scale


@MODELS.register_module()
class DFINEDecoder(QuerySelection):
    """Selects queries and refines their boxes layer by layer.

    The first layer proposes a box for each query. It stays the reference of all
    layers, which add up logits of the distance of each edge from it.

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
        reg_max: B - 1, even.
        reg_scale: curvature of `weighting_function`; 8 for the largest model.
        eval_layer: 0-based layer that predicts in evaluation, -1 the last.
        eval_size_hw: image size in pixels whose anchors are kept in a buffer. Other
            sizes work as well.

    Raises:
        ValueError: the arguments contradict each other.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: tuple[int, ...],
        in_strides: tuple[int, ...],
        hidden_dim: int = 256,
        num_queries: int = 300,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: tuple[int, ...] = (3, 6, 3),
        feedforward_channels: int = 1024,
        num_denoising: int = 100,
        label_noise_ratio: float = 0.5,
        box_noise_scale: float = 1.0,
        reg_max: int = 32,
        reg_scale: float = 4.0,
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
        if reg_max < 4 or reg_max % 2:
            raise ValueError(f'reg_max is {reg_max}; choose an even number from 4 on')
        self.num_heads, self.reg_max = num_heads, reg_max
        self.num_denoising = num_denoising
        self.label_noise_ratio = label_noise_ratio
        self.box_noise_scale = box_noise_scale
        self.eval_layer = eval_layer % num_layers

        self.up = nn.Parameter(torch.tensor([0.5]), requires_grad=False)
        self.reg_scale = nn.Parameter(
            torch.tensor([float(reg_scale)]), requires_grad=False
        )
        layers = [
            GatedDecoderLayer(hidden_dim, num_heads, num_points, feedforward_channels)
            for _ in range(num_layers)
        ]
        self.decoder = RefinementLayers(layers, self.up, self.reg_scale)
        if num_denoising > 0:
            self.denoising_class_embed = nn.Embedding(
                num_classes + 1, hidden_dim, padding_idx=num_classes
            )
        self.query_pos_head = MLP(4, 2 * hidden_dim, hidden_dim, 2)
        self.dec_score_head = nn.ModuleList(
            nn.Linear(hidden_dim, num_classes) for _ in layers
        )
        self.pre_bbox_head = MLP(hidden_dim, hidden_dim, 4, 3)
        self.dec_bbox_head = nn.ModuleList(
            MLP(hidden_dim, hidden_dim, 4 * (reg_max + 1), 3) for _ in layers
        )
        self._init_heads()

    def _init_heads(self) -> None:
        """Scores start at 0.01, boxes where they are, all bins alike."""
        for linear in self.query_pos_head.layers:
            nn.init.xavier_uniform_(linear.weight)
        for head in self.dec_score_head:
            nn.init.constant_(head.bias, prior_bias(0.01))
        for head in (self.pre_bbox_head, *self.dec_bbox_head):
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)

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
        # Maps as they come are (N, heads * D / heads, h, w): splitting is free.
        box_dtype = selected.box_logits.dtype
        values = [
            x.reshape(-1, x.shape[1] // self.num_heads, *x.shape[2:]).to(box_dtype)
            for x in maps
        ]
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

    def _decode(
        self,
        x: Tensor,
        box_logits: Tensor,
        values: Sequence[Tensor],
        visible_mask: Tensor | None = None,
    ) -> QueryPredictions:
        """Run the layers.

        Args:
            x: `(N, Q, D)` content of the queries.
            box_logits: `(N, Q, 4)` without gradient.
            values: `(N * heads, D / heads, h, w)` for each map.
            visible_mask: `(Q, Q)` bool.
        """
        bins = weighting_function(self.reg_max, self.up, self.reg_scale)
        boxes = box_logits.sigmoid()
        dtype = boxes.dtype  # float32 under autocast
        outputs, pre = [], {}
        for i, layer in enumerate(self.decoder.layers):
            boxes = boxes.detach()
            pos = self.query_pos_head(boxes).clamp(-10, 10)
            x_before, x = x.detach(), layer(x, pos, boxes, values, visible_mask)
            if i == 0:
                pre_boxes = (self.pre_bbox_head(x) + inverse_sigmoid(boxes)).sigmoid()
                ref_boxes = pre_boxes.detach()
                corners = self.dec_bbox_head[0](x).to(dtype)
            else:
                corners = corners + self.dec_bbox_head[i](x + x_before)
            boxes = distance_to_box(ref_boxes, integral(corners, bins), self.reg_scale)
            if self.training or i == self.eval_layer:
                logits = self.dec_score_head[i](x).to(dtype)
                if self.training and i == 0:
                    pre = dict(pre_logits=logits, pre_boxes=pre_boxes)
                with _full_precision(corners.device.type):
                    logits = logits + self.decoder.lqe_layers[i](corners)
                outputs.append((logits, boxes, corners))
            if not self.training and i == self.eval_layer:
                break
        logits, boxes, corners = map(torch.stack, zip(*outputs, strict=True))
        return QueryPredictions(logits, boxes, corners, ref_boxes, **pre)

    def switch_to_deploy(self) -> None:
        """Drop, in place, what evaluation does not use; training is over."""
        self.eval()
        last = self.eval_layer
        self.decoder.layers = self.decoder.layers[: last + 1]
        self.dec_bbox_head = self.dec_bbox_head[: last + 1]
        # The last keeps its number, so that names stay those of the checkpoint.
        earlier = [nn.Identity() for _ in range(last)]
        self.dec_score_head = nn.ModuleList([*earlier, self.dec_score_head[last]])
        self.decoder.lqe_layers = nn.ModuleList(
            [*earlier, self.decoder.lqe_layers[last]]
        )


def _full_precision(device_type: str) -> AbstractContextManager:
    """Autocast off, on devices that have it."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _split_queries(
    predictions: QueryPredictions, num_first: int
) -> tuple[QueryPredictions, QueryPredictions]:
    """Part the first queries from the rest; Q is the last but one dimension."""
    fields = vars(predictions).items()
    return (
        QueryPredictions(**{name: value[..., :num_first, :] for name, value in fields}),
        QueryPredictions(**{name: value[..., num_first:, :] for name, value in fields}),
    )
