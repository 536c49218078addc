"""D-FINE's decoder: layers that refine a distribution over each edge of a box.

D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution
Refinement, arXiv 2410.13842.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/dfine_decoder.py
(Apache-2.0).
Departs from the source:
- distributions, their quality and box arithmetic are in float32 under autocast;
- the score head of the first layer runs once, not twice;
- `reg_scale` is a float parameter (int64 in the released files, which load).

Legend: N images, Q queries, D width, C classes, B = reg_max + 1 bins.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mmbackbones.decoders.detr_decoder import DETRDecoder
from mmbackbones.layers.attention import Visibility
from mmbackbones.layers.decoder_layer import GatedDecoderLayer
from mmbackbones.layers.mlp import MLP
from mmbackbones.ops.boxes import inverse_sigmoid
from mmbackbones.ops.distribution import (
    distance_to_box,
    edge_probabilities,
    integral,
    weighting_function,
)
from mmbackbones.ops.predictions import QueryPredictions
from mmbackbones.registry import MODELS

__all__ = ['DFINEDecoder', 'LocationQuality']


class LocationQuality(nn.Module):
    """Correction of class logits by how peaked the edge distributions are.

    The four highest probabilities of each edge and their mean pass through a small
    MLP that starts at zero.

    Args:
        activation: of the MLP.
    """

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.reg_conf = MLP(4 * (4 + 1), 64, 1, 2, activation)
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
        lqe_layers: Sequence[LocationQuality],
        up: nn.Parameter,
        reg_scale: nn.Parameter,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.lqe_layers = nn.ModuleList(lqe_layers)
        self.up, self.reg_scale = up, reg_scale


@MODELS.register_module()
class DFINEDecoder(DETRDecoder):
    """Selects queries and refines their boxes layer by layer.

    The first layer proposes a box for each query. It stays the reference of all
    layers, which add up logits of the distance of each edge from it.

    Args:
        *args: as `DETRDecoder`.
        num_points: likewise.
        reg_max: B - 1, even.
        reg_scale: curvature of `weighting_function`; 8 for the largest model.
        **kwargs: as `DETRDecoder`.

    Raises:
        ValueError: the arguments contradict each other.

    Attributes:
        positions_follow_boxes: whether each layer encodes the boxes of the one before,
            or all use the encoding of the selected boxes.
    """

    positions_follow_boxes = True

    def __init__(
        self,
        *args: Any,
        num_points: tuple[int, ...] = (3, 6, 3),
        reg_max: int = 32,
        reg_scale: float = 4.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, num_points=num_points, **kwargs)
        if reg_max < 4 or reg_max % 2:
            raise ValueError(f'reg_max is {reg_max}; choose an even number from 4 on')
        self.reg_max = reg_max
        self.up = nn.Parameter(torch.tensor([0.5]), requires_grad=False)
        self.reg_scale = nn.Parameter(
            torch.tensor([float(reg_scale)]), requires_grad=False
        )
        self.decoder = RefinementLayers(
            [self._layer() for _ in range(self.num_layers)],
            [LocationQuality(self.activation) for _ in range(self.num_layers)],
            self.up,
            self.reg_scale,
        )
        self.pre_bbox_head = self._bbox_head(4)
        self.dec_bbox_head = nn.ModuleList(self._bbox_heads(4 * (reg_max + 1)))

    def _bbox_heads(self, out_channels: int) -> list[MLP]:
        """Heads of the distributions, one for each layer."""
        return [self._bbox_head(out_channels) for _ in range(self.num_layers)]

    def _query_pos_head(self) -> MLP:
        head = super()._query_pos_head()
        for linear in head.layers:
            nn.init.xavier_uniform_(linear.weight)
        return head

    def _layer(self) -> nn.Module:
        return GatedDecoderLayer(
            self.hidden_dim,
            self.num_heads,
            self.num_points,
            self.feedforward_channels,
            self.activation,
        )

    def _decode(
        self,
        x: Tensor,
        box_logits: Tensor,
        values: Sequence[Tensor],
        visible_mask: Visibility = None,
    ) -> QueryPredictions:
        bins = weighting_function(self.reg_max, self.up, self.reg_scale)
        boxes = box_logits.sigmoid()
        dtype = boxes.dtype  # float32 under autocast
        outputs, pre = [], {}
        for i, layer in enumerate(self.decoder.layers):
            boxes = boxes.detach()
            if i == 0 or self.positions_follow_boxes:
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
