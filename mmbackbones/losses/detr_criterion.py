"""The training loss that all dialects share: scores by quality, L1 and GIoU.

RT-DETR: DETRs Beat YOLOs on Real-time Object Detection, arXiv 2304.08069.
Upstream: https://github.com/lyuwenyu/RT-DETR
rtdetrv2_pytorch/src/zoo/rtdetr/rtdetrv2_criterion.py (Apache-2.0).
Departs from the source:
- layers are stacked, pairs are compared element by element, and the device is
  read once per step, so the work does not depend on how the boxes are spread;
- everything is evaluated in float32, under autocast too;
- a NaN loss stays NaN instead of turning into 0, so that a guard can see it; a
  box without area has an IoU of 0 instead of NaN;
- a batch without boxes has the same terms as any other.

Legend: S prediction sets, L layers, N images, Q queries, M = N * Q, C classes,
B = reg_max + 1 bins, P pairs of a query and a box.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmbackbones.ops.boxes import cxcywh_to_ordered_xyxy, elementwise_iou
from mmbackbones.ops.predictions import (
    BoxTargets,
    DecoderOutput,
    DenoisingPairs,
    QueryPredictions,
)
from mmbackbones.registry import MODELS

from .classification import VarifocalTerm
from .localization import giou_loss, l1_loss
from .matching import HungarianMatcher, Pairs, indices_to_device

__all__ = ['DETRCriterion', 'Matches', 'PredictionStack']


@dataclass(frozen=True)
class PredictionStack:
    """All sets of one kind of queries in float32, the batch flattened.

    Attributes:
        names: S suffixes of the loss terms; the L layers come first.
        logits: `(S, M, C)`.
        boxes: `(S, M, 4)` cxcywh.
        corners: `(L, M, 4, B)`, or None for decoders without distributions.
        ref_boxes: `(M, 4)`, or None with them.
    """

    names: tuple[str, ...]
    logits: Tensor
    boxes: Tensor
    corners: Tensor | None
    ref_boxes: Tensor | None

    @classmethod
    def of(
        cls,
        layer_names: tuple[str, ...],
        queries: QueryPredictions,
        *heads: tuple[str, Tensor | None, Tensor | None],
    ) -> 'PredictionStack':
        """Join the layers with those `(name, logits, boxes)` heads that exist."""
        heads = [head for head in heads if head[1] is not None]
        logits = torch.cat((queries.logits, *(head[1][None] for head in heads)))
        boxes = torch.cat((queries.boxes, *(head[2][None] for head in heads)))
        corners, ref_boxes = queries.corners, queries.ref_boxes
        if corners is not None:
            corners = corners.float().flatten(1, 2).unflatten(-1, (4, -1))
            ref_boxes = ref_boxes.float().flatten(0, 1)
        return cls(
            (*layer_names, *(head[0] for head in heads)),
            logits.float().flatten(1, 2),
            boxes.float().flatten(1, 2),
            corners,
            ref_boxes,
        )


class Matches(NamedTuple):
    """Pairs of every set, and what their sums are divided by.

    Attributes:
        own: `(S, P)` pairs for the classification.
        num_own: boxes that a rank has on average, at least 1.
        regression: `(S, U)` pairs for boxes.
        num_regression: pairs that a rank has on average, at least 1.
        matched_share: of D-FINE's distillation; denoising queries mix with that of
            the matching queries, as in the source.
    """

    own: Pairs
    num_own: Tensor
    regression: Pairs
    num_regression: Tensor
    matched_share: float = 0.0


def rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows `(S, P, D)` of `(S, M, D)` at `(S, P)`."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def iou(boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """IoU `(...)` of cxcywh boxes, without gradient."""
    return elementwise_iou(
        cxcywh_to_ordered_xyxy(boxes.detach()), cxcywh_to_ordered_xyxy(target_boxes)
    )


def _no_denoising(queries: QueryPredictions) -> tuple[QueryPredictions, DenoisingPairs]:
    """Denoising queries of a batch without boxes: as the others, but none."""
    none = torch.empty(0, dtype=torch.int64, device=queries.logits.device)
    empty = {
        name: None if value is None else value[..., :0, :]
        for name, value in vars(queries).items()
    }
    return QueryPredictions(**empty), DenoisingPairs(none, none, none, 1)


@MODELS.register_module()
class DETRCriterion(nn.Module):
    """Matches the queries of every set with boxes and adds up three terms.

    Args:
        classification: config of the classification term, `VarifocalTerm` by
            default; its `name` becomes that of the loss.
        class_weight: of the classification term.
        bbox_weight: of L1.
        giou_weight: of 1 - GIoU.
        matcher: options of `HungarianMatcher`, and `type` for a relative of it.
    """

    def __init__(
        self,
        *,
        classification: dict | None = None,
        class_weight: float = 1.0,
        bbox_weight: float = 5.0,
        giou_weight: float = 2.0,
        matcher: dict | None = None,
    ) -> None:
        super().__init__()
        self.classification = MODELS.build(classification or dict(type=VarifocalTerm))
        self.weights = {
            self.classification.name: class_weight,
            'loss_bbox': bbox_weight,
            'loss_giou': giou_weight,
        }
        self.matcher = MODELS.build({'type': HungarianMatcher, **(matcher or {})})

    def forward(self, output: DecoderOutput, targets: BoxTargets) -> dict[str, Tensor]:
        """Weighted loss terms, scalars on the device.

        The plain names belong to the last layer. `_aux_{i}` are the earlier layers,
        `_pre` the first layer before refinement, `_enc_0` the selected encoder
        tokens; `_dn_{i}` and `_dn_pre` are the denoising queries. In training mode
        the terms are the same for a batch without boxes; where nothing applies they
        are 0.

        Args:
            output: of the decoder; heads that are None have no terms.
            targets: any image may be without boxes, and have more than queries.
        """
        with torch.autocast(output.queries.logits.device.type, enabled=False):
            return self._losses(output, targets)

    def _losses(self, output: DecoderOutput, targets: BoxTargets) -> dict[str, Tensor]:
        queries = output.queries
        num_layers, num_images = queries.logits.shape[:2]
        stack = PredictionStack.of(
            (*(f'_aux_{i}' for i in range(num_layers - 1)), ''),
            queries,
            ('_pre', queries.pre_logits, queries.pre_boxes),
            ('_enc_0', output.enc_logits, output.enc_boxes),
        )
        matches = self._match(stack, num_images, targets)
        losses = self._named(stack, self._terms(stack, targets, matches))

        denoising, pairs = output.denoising, output.dn_pairs
        if denoising is None and self.training:
            denoising, pairs = _no_denoising(queries)
        if denoising is not None:
            stack = PredictionStack.of(
                tuple(f'_dn_{i}' for i in range(num_layers)),
                denoising,
                ('_dn_pre', denoising.pre_logits, denoising.pre_boxes),
            )
            query = pairs.image * denoising.logits.shape[2] + pairs.query
            made = Pairs(
                *(i.expand(len(stack.names), -1) for i in (query, pairs.target))
            )
            num_made = matches.num_own * pairs.num_groups
            matches = Matches(made, num_made, made, num_made, matches.matched_share)
            losses |= self._named(stack, self._terms(stack, targets, matches))
        return losses

    def _named(
        self, stack: PredictionStack, terms: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Weighted scalars; a term of fewer than S values is that of the first sets."""
        return {
            key + name: value
            for key, values in terms.items()
            for name, value in zip(
                stack.names, (self.weights[key] * values).unbind(), strict=False
            )
        }

    def _regression_pairs(self, own: Pairs, num_boxes: int) -> tuple[Pairs, int]:
        """Pairs on the host that boxes are compared by, and their normaliser."""
        return own, num_boxes

    def _match(
        self, stack: PredictionStack, num_images: int, targets: BoxTargets
    ) -> Matches:
        own = self.matcher(
            stack.logits.detach().unflatten(1, (num_images, -1)),
            stack.boxes.detach().unflatten(1, (num_images, -1)),
            targets,
        )
        regression, count = self._regression_pairs(own, len(targets))
        *indices, counts = indices_to_device(
            [*own, *regression, np.array([len(targets), count])], stack.logits.device
        )
        counts = counts.float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            counts = counts / dist.get_world_size()
        num_own, num_regression = counts.clamp(min=1).unbind()
        num_sets = len(stack.names)
        own_query, own_target, query, target = (
            index.expand(num_sets, -1) for index in indices
        )
        return Matches(
            Pairs(own_query, own_target), num_own, Pairs(query, target), num_regression
        )

    def _terms(
        self, stack: PredictionStack, targets: BoxTargets, matches: Matches
    ) -> dict[str, Tensor]:
        """Terms `(S,)` of one stack before they are weighted."""
        own, regression = matches.own, matches.regression
        quality = iou(rows(stack.boxes.detach(), own.query), targets.boxes[own.target])
        boxes = rows(stack.boxes, regression.query)
        target_boxes = targets.boxes[regression.target]
        scored = self.classification(
            stack.logits, own.query, targets.labels[own.target], quality
        )
        return {
            self.classification.name: scored / matches.num_own,
            'loss_bbox': l1_loss(boxes, target_boxes) / matches.num_regression,
            'loss_giou': giou_loss(boxes, target_boxes) / matches.num_regression,
        }
