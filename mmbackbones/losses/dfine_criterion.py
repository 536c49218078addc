"""D-FINE's training loss over all layers, auxiliary heads and denoising queries.

D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution
Refinement, arXiv 2410.13842.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/dfine_criterion.py
(Apache-2.0).
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

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmbackbones.ops.boxes import cxcywh_to_ordered_xyxy, elementwise_iou
from mmbackbones.ops.distribution import weighting_function
from mmbackbones.ops.predictions import (
    BoxTargets,
    DecoderOutput,
    DenoisingPairs,
    QueryPredictions,
)
from mmbackbones.registry import MODELS

from .classification import varifocal_loss
from .localization import (
    ddf_loss,
    ddf_weights,
    fgl_loss,
    fgl_targets,
    giou_loss,
    l1_loss,
)
from .matching import HungarianMatcher, Pairs, indices_to_device, union_of_matches

__all__ = ['DFINECriterion']


@dataclass(frozen=True)
class _Stack:
    """All sets of one kind of queries in float32, the batch flattened.

    Attributes:
        names: S suffixes of the loss terms; the L layers come first.
        logits: `(S, M, C)`.
        boxes: `(S, M, 4)` cxcywh.
        corners: `(L, M, 4, B)`.
        ref_boxes: `(M, 4)`.
    """

    names: tuple[str, ...]
    logits: Tensor
    boxes: Tensor
    corners: Tensor
    ref_boxes: Tensor

    @classmethod
    def of(
        cls,
        layer_names: tuple[str, ...],
        queries: QueryPredictions,
        *heads: tuple[str, Tensor | None, Tensor | None],
    ) -> '_Stack':
        """Join the layers with those `(name, logits, boxes)` heads that exist."""
        heads = [head for head in heads if head[1] is not None]
        logits = torch.cat((queries.logits, *(head[1][None] for head in heads)))
        boxes = torch.cat((queries.boxes, *(head[2][None] for head in heads)))
        corners = queries.corners.float().flatten(1, 2)  # (L, M, 4 * B)
        return cls(
            (*layer_names, *(head[0] for head in heads)),
            logits.float().flatten(1, 2),
            boxes.float().flatten(1, 2),
            corners.unflatten(-1, (4, -1)),
            queries.ref_boxes.float().flatten(0, 1),
        )


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows `(S, P, D)` of `(S, M, D)` at `(S, P)`."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def _iou(boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """IoU `(...)` of cxcywh boxes, without gradient."""
    return elementwise_iou(
        cxcywh_to_ordered_xyxy(boxes.detach()), cxcywh_to_ordered_xyxy(target_boxes)
    )


def _no_denoising(queries: QueryPredictions) -> tuple[QueryPredictions, DenoisingPairs]:
    """Denoising queries of a batch without boxes: as the others, but none."""
    none = torch.empty(0, dtype=torch.int64, device=queries.logits.device)
    pre = (queries.pre_logits, queries.pre_boxes)
    pre_logits, pre_boxes = (None if p is None else p[:, :0] for p in pre)
    empty = QueryPredictions(
        queries.logits[:, :, :0],
        queries.boxes[:, :, :0],
        queries.corners[:, :, :0],
        queries.ref_boxes[:, :0],
        pre_logits,
        pre_boxes,
    )
    return empty, DenoisingPairs(none, none, none, 1)


@MODELS.register_module()
class DFINECriterion(nn.Module):
    """Matches queries with boxes and adds up the terms of section 4 of the paper.

    Args:
        vfl_weight: of the varifocal loss on each set's own matches.
        bbox_weight: of L1 on the union of all sets' matches.
        giou_weight: of 1 - GIoU on the union.
        fgl_weight: of fine-grained localization on the union.
        ddf_weight: of the distillation of the last layer into earlier ones.
        class_cost: of the matching, see `HungarianMatcher`.
        bbox_cost: likewise.
        giou_cost: likewise.
        alpha: of the varifocal loss.
        gamma: of the varifocal loss.
        reg_max: index of the last bin, as in the decoder.
        reg_scale: curvature of W(n), as in the decoder.
        up: reach of W(n), as in the decoder.
    """

    def __init__(
        self,
        *,
        vfl_weight: float = 1.0,
        bbox_weight: float = 5.0,
        giou_weight: float = 2.0,
        fgl_weight: float = 0.15,
        ddf_weight: float = 1.5,
        class_cost: float = 2.0,
        bbox_cost: float = 5.0,
        giou_cost: float = 2.0,
        alpha: float = 0.75,
        gamma: float = 2.0,
        reg_max: int = 32,
        reg_scale: float = 4.0,
        up: float = 0.5,
    ) -> None:
        super().__init__()
        self.weights = {
            'loss_vfl': vfl_weight,
            'loss_bbox': bbox_weight,
            'loss_giou': giou_weight,
            'loss_fgl': fgl_weight,
            'loss_ddf': ddf_weight,
        }
        self.matcher = HungarianMatcher(
            class_cost=class_cost, bbox_cost=bbox_cost, giou_cost=giou_cost
        )
        self.alpha = alpha
        self.gamma = gamma
        self.reg_scale = reg_scale
        bins = weighting_function(reg_max, up, reg_scale)
        self.register_buffer('bins', bins, persistent=False)

    def forward(self, output: DecoderOutput, targets: BoxTargets) -> dict[str, Tensor]:
        """Weighted loss terms, scalars on the device.

        `loss_{vfl,bbox,giou,fgl}` belong to the last layer. `_aux_{i}` (with
        `loss_ddf`) are the earlier layers, `_pre` the first layer before
        refinement, `_enc_0` the selected encoder tokens; `_dn_{i}` (with
        `loss_ddf`, which is 0 for the last) and `_dn_pre` are the denoising
        queries. `_pre`, `_enc_0` and `_dn_pre` have no `loss_fgl`. In training
        mode the terms are the same for a batch without boxes; where nothing
        applies they are 0.

        Args:
            output: of the decoder; heads that are None have no terms.
            targets: any image may be without boxes, and have more than queries.
        """
        with torch.autocast(output.queries.logits.device.type, enabled=False):
            return self._losses(output, targets)

    def _losses(self, output: DecoderOutput, targets: BoxTargets) -> dict[str, Tensor]:
        queries = output.queries
        num_layers, num_images, num_queries = queries.logits.shape[:3]
        stack = _Stack.of(
            (*(f'_aux_{i}' for i in range(num_layers - 1)), ''),
            queries,
            ('_pre', queries.pre_logits, queries.pre_boxes),
            ('_enc_0', output.enc_logits, output.enc_boxes),
        )
        own, union, num_own, num_union = self._match(stack, num_images, targets)
        num_matched = union.query.shape[1]
        matched = math.sqrt(num_matched)
        unmatched = math.sqrt(num_images * num_queries - num_matched)
        share = matched / (matched + unmatched)
        losses = self._terms(stack, targets, own, union, num_own, num_union, share)

        denoising, pairs = output.denoising, output.dn_pairs
        if denoising is None and self.training:
            denoising, pairs = _no_denoising(queries)
        if denoising is not None:
            stack = _Stack.of(
                tuple(f'_dn_{i}' for i in range(num_layers)),
                denoising,
                ('_dn_pre', denoising.pre_logits, denoising.pre_boxes),
            )
            num_sets = len(stack.names)
            query = pairs.image * denoising.logits.shape[2] + pairs.query
            made = Pairs(query.expand(num_sets, -1), pairs.target.expand(num_sets, -1))
            num_made = num_own * pairs.num_groups
            # the source mixes with the share of the matching queries here too
            losses |= self._terms(stack, targets, made, made, num_made, num_made, share)
            # the last layer is its own teacher
            losses[f'loss_ddf_dn_{num_layers - 1}'] = stack.corners[-1, :0].sum()
        return losses

    def _match(
        self, stack: _Stack, num_images: int, targets: BoxTargets
    ) -> tuple[Pairs, Pairs, Tensor, Tensor]:
        """Pairs of each set and of their union, and how many a rank has on average."""
        own = self.matcher(
            stack.logits.detach().unflatten(1, (num_images, -1)),
            stack.boxes.detach().unflatten(1, (num_images, -1)),
            targets,
        )
        union = union_of_matches(own)
        counts = np.array([len(targets), len(union.query)])
        *indices, counts = indices_to_device(
            [*own, *union, counts], stack.logits.device
        )
        counts = counts.float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            counts = counts / dist.get_world_size()
        num_own, num_union = counts.clamp(min=1).unbind()
        union = Pairs(*(index.expand(len(stack.names), -1) for index in indices[2:]))
        return Pairs(*indices[:2]), union, num_own, num_union

    def _terms(
        self,
        stack: _Stack,
        targets: BoxTargets,
        own: Pairs,
        union: Pairs,
        num_own: Tensor,
        num_union: Tensor,
        matched_share: float,
    ) -> dict[str, Tensor]:
        """Weighted terms of one stack.

        Args:
            stack: of S sets, L of them layers with distributions.
            targets: of the batch.
            own: `(S, P)` pairs for the classification.
            union: `(S, U)` pairs, the same in all sets, for boxes and distributions.
            num_own: normaliser of the former.
            num_union: normaliser of the latter.
            matched_share: see `ddf_loss`.
        """
        num_layers = len(stack.corners)
        target_boxes = targets.boxes[union.target[0]]  # (U, 4)
        boxes = _rows(stack.boxes, union.query)
        quality = _iou(boxes[:num_layers], target_boxes)
        own_quality = _iou(
            _rows(stack.boxes.detach(), own.query), targets.boxes[own.target]
        )
        matched_corners = _rows(stack.corners.flatten(2), union.query[:num_layers])
        edges = fgl_targets(
            stack.ref_boxes[union.query[0]], target_boxes, self.bins, self.reg_scale
        )
        distilled = ddf_weights(
            stack.logits[num_layers - 1],
            union.query[0],
            quality[:-1],
            matched_share,
        )
        sums = {
            'loss_vfl': varifocal_loss(
                stack.logits,
                own.query,
                targets.labels[own.target],
                own_quality,
                alpha=self.alpha,
                gamma=self.gamma,
            )
            / num_own,
            'loss_bbox': l1_loss(boxes, target_boxes) / num_union,
            'loss_giou': giou_loss(boxes, target_boxes) / num_union,
            'loss_fgl': fgl_loss(
                matched_corners.unflatten(-1, (4, -1)), *edges, quality
            )
            / num_union,
            'loss_ddf': ddf_loss(stack.corners[:-1], stack.corners[-1], distilled),
        }
        return {
            key + name: value
            for key, values in sums.items()
            # corners exist for the first sets only, students for all but the last
            for name, value in zip(
                stack.names, (self.weights[key] * values).unbind(), strict=False
            )
        }
