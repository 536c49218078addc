"""RT-DETR's decoders: layers that each correct the box of the one before.

RT-DETR: DETRs Beat YOLOs on Real-time Object Detection, arXiv 2304.08069; RT-DETRv2:
Improved Baseline with Bag-of-Freebies, arXiv 2407.17140.
Upstream: https://github.com/lyuwenyu/RT-DETR
rtdetr_pytorch/src/zoo/rtdetr/rtdetr_decoder.py and
rtdetrv2_pytorch/src/zoo/rtdetr/rtdetrv2_decoder.py (both Apache-2.0).
Departs from the source:
- boxes of encoder tokens are predicted for the selected ones alone;
- the box head of a layer runs once, not twice;
- v1 has v2's names, anchors among them (see `mmbackbones.convert.rtdetr`);
- discrete sampling is right on maps that are not square.

Legend: N images, Q queries, L tokens, D width, C classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmbackbones.decoders.detr_decoder import DETRDecoder
from mmbackbones.decoders.query_selection import prior_bias
from mmbackbones.layers.attention import Visibility
from mmbackbones.layers.mlp import MLP
from mmbackbones.layers.reparam import conv_norm
from mmbackbones.layers.rtdetr_layer import RTDETRDecoderLayer
from mmbackbones.ops.boxes import inverse_sigmoid
from mmbackbones.ops.predictions import QueryPredictions
from mmbackbones.registry import MODELS

__all__ = ['RTDETRDecoder', 'RTDETRv2Decoder']


@MODELS.register_module()
class RTDETRDecoder(DETRDecoder):
    """Selects queries and refines their boxes layer by layer.

    The reference box of a layer, where it samples, carries no gradient. In training
    the box that it gives out is counted from the one before with its gradient, so
    that a layer learns from the loss of the next, too ("look forward twice").

    Args:
        *args: as `DETRDecoder`.
        **kwargs: as `DETRDecoder`.
    """

    flip_crossed = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layers = nn.ModuleList(self._layer() for _ in range(self.num_layers))
        self.decoder = nn.ModuleDict(dict(layers=layers))
        self.dec_bbox_head = nn.ModuleList(
            self._bbox_head(4) for _ in range(self.num_layers)
        )

    def _input_proj(self, in_channels: int) -> nn.Module:
        return conv_norm(in_channels, self.hidden_dim)  # also where widths agree

    def _init_selection(self) -> None:
        super()._init_selection()
        for proj in self.input_proj:
            proj.conv.reset_parameters()

    def _query_pos_head(self) -> MLP:
        head = super()._query_pos_head()
        for linear in head.layers:
            nn.init.xavier_uniform_(linear.weight)
        return head

    def _layer(self) -> RTDETRDecoderLayer:
        layer = RTDETRDecoderLayer(
            self.hidden_dim,
            self.num_heads,
            self.num_points,
            self.feedforward_channels,
            self.activation,
        )
        scale = layer.cross_attn.num_points_scale  # which v1's checkpoints lack
        layer.cross_attn.register_buffer('num_points_scale', scale, persistent=False)
        return layer

    def _values(self, maps: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
        return maps  # every layer has a projection of its own

    def _decode(
        self,
        x: Tensor,
        box_logits: Tensor,
        values: Sequence[Tensor],
        visible_mask: Visibility = None,
    ) -> QueryPredictions:
        boxes = box_logits.sigmoid()
        outputs = []
        for i, layer in enumerate(self.decoder.layers):
            before, boxes = boxes, boxes.detach()
            x = layer(x, self.query_pos_head(boxes), boxes, values, visible_mask)
            change = self.dec_bbox_head[i](x)
            if self.training or i == self.eval_layer:
                logits = self.dec_score_head[i](x).to(boxes.dtype)
                outputs.append((logits, (change + inverse_sigmoid(before)).sigmoid()))
            if not self.training and i == self.eval_layer:
                break
            boxes = (change + inverse_sigmoid(boxes)).sigmoid()
        logits, boxes = map(torch.stack, zip(*outputs, strict=True))
        return QueryPredictions(logits, boxes)

    def switch_to_deploy(self) -> None:
        """Evaluation mode; as published, nothing is dropped."""
        self.eval()


@MODELS.register_module()
class RTDETRv2Decoder(RTDETRDecoder):
    """The second version: other initial values, and two choices.

    Args:
        *args: as `DETRDecoder`.
        cross_attn_method: `'default'`, or `'discrete'` to read whole pixels at
            sampling offsets that no longer learn; for fine-tuning.
        query_select_method: `'default'` takes the tokens whose best class is best,
            `'one2many'` the best pairs of a token and a class, so that a token may
            become several queries, `'agnostic'` scores tokens by one number for all
            classes; its loss is `RTDETRCriterion`'s.
        **kwargs: as `DETRDecoder`.

    Raises:
        ValueError: the arguments contradict each other, or a method is none of these.
    """

    def __init__(
        self,
        *args: Any,
        cross_attn_method: str = 'default',
        query_select_method: str = 'default',
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        for name, method, choices in (
            ('cross_attn_method', cross_attn_method, ('default', 'discrete')),
            (
                'query_select_method',
                query_select_method,
                ('default', 'one2many', 'agnostic'),
            ),
        ):
            if method not in choices:
                raise ValueError(f'{name} is {method!r}; choose from {list(choices)}')
        self.query_select_method = query_select_method
        if query_select_method == 'agnostic':
            self.enc_score_head = nn.Linear(self.hidden_dim, 1)
            nn.init.constant_(self.enc_score_head.bias, prior_bias(0.01))
        for proj in self.input_proj:
            nn.init.xavier_uniform_(proj.conv.weight)
        if cross_attn_method == 'discrete':
            for layer in self.decoder.layers:
                layer.cross_attn.freeze_to_pixels()

    def _layer(self) -> RTDETRDecoderLayer:
        layer = super()._layer()
        scale = layer.cross_attn.num_points_scale
        layer.cross_attn.register_buffer('num_points_scale', scale)  # saved again
        nn.init.xavier_uniform_(layer.linear1.weight)
        nn.init.xavier_uniform_(layer.linear2.weight)
        return layer

    def _best_tokens(self, logits: Tensor, num_queries: int) -> Tensor:
        if self.query_select_method == 'one2many':
            best = logits.flatten(1).topk(num_queries).indices
            return best // logits.shape[-1]
        return super()._best_tokens(logits, num_queries)
