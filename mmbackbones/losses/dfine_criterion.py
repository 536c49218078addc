"""D-FINE's training loss: the union of all matches, and edge distributions.

D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution
Refinement, arXiv 2410.13842.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/dfine_criterion.py
(Apache-2.0).
Departs from the source: as `DETRCriterion`.

Legend: as in `detr_criterion`; U pairs of the union.
"""

import math
from typing import Any

from torch import Tensor

from mmbackbones.ops.distribution import weighting_function
from mmbackbones.ops.predictions import BoxTargets, DecoderOutput
from mmbackbones.registry import MODELS

from .detr_criterion import DETRCriterion, Matches, PredictionStack, iou, rows
from .localization import ddf_loss, ddf_weights, fgl_loss, fgl_targets
from .matching import Pairs, union_of_matches

__all__ = ['DFINECriterion']


@MODELS.register_module()
class DFINECriterion(DETRCriterion):
    """Adds the terms of section 4 of the paper, and judges boxes by the union.

    Every layer but the last has `loss_ddf`, every denoising layer too (0 for the
    last, its own teacher). `_pre`, `_enc_0` and `_dn_pre` have no `loss_fgl`.

    Args:
        fgl_weight: of fine-grained localization on the union.
        ddf_weight: of the distillation of the last layer into earlier ones.
        reg_max: index of the last bin, as in the decoder.
        reg_scale: curvature of W(n), as in the decoder.
        up: reach of W(n), as in the decoder.
        **kwargs: as `DETRCriterion`.
    """

    def __init__(
        self,
        *,
        fgl_weight: float = 0.15,
        ddf_weight: float = 1.5,
        reg_max: int = 32,
        reg_scale: float = 4.0,
        up: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.weights.update(loss_fgl=fgl_weight, loss_ddf=ddf_weight)
        self.reg_scale = reg_scale
        bins = weighting_function(reg_max, up, reg_scale)
        self.register_buffer('bins', bins, persistent=False)

    def _losses(self, output: DecoderOutput, targets: BoxTargets) -> dict[str, Tensor]:
        losses = super()._losses(output, targets)
        last_dn = f'_dn_{len(output.queries.logits) - 1}'
        if 'loss_bbox' + last_dn in losses:
            losses['loss_ddf' + last_dn] = losses['loss_bbox' + last_dn].new_zeros(())
        return losses

    def _regression_pairs(self, own: Pairs, num_boxes: int) -> tuple[Pairs, int]:
        union = union_of_matches(own)
        return union, len(union.query)

    def _match(
        self, stack: PredictionStack, num_images: int, targets: BoxTargets
    ) -> Matches:
        matches = super()._match(stack, num_images, targets)
        num_matched = matches.regression.query.shape[1]
        matched = math.sqrt(num_matched)
        unmatched = math.sqrt(stack.boxes.shape[1] - num_matched)
        return matches._replace(matched_share=matched / (matched + unmatched))

    def _terms(
        self, stack: PredictionStack, targets: BoxTargets, matches: Matches
    ) -> dict[str, Tensor]:
        terms = super()._terms(stack, targets, matches)
        num_layers = len(stack.corners)
        query, target = matches.regression  # the same in all sets
        target_boxes = targets.boxes[target[0]]  # (U, 4)
        layers = query[:num_layers]
        quality = iou(rows(stack.boxes.detach()[:num_layers], layers), target_boxes)
        corners = rows(stack.corners.flatten(2), layers).unflatten(-1, (4, -1))
        edges = fgl_targets(
            stack.ref_boxes[query[0]], target_boxes, self.bins, self.reg_scale
        )
        distilled = ddf_weights(
            stack.logits[num_layers - 1], query[0], quality[:-1], matches.matched_share
        )
        terms['loss_fgl'] = fgl_loss(corners, *edges, quality) / matches.num_regression
        terms['loss_ddf'] = ddf_loss(stack.corners[:-1], stack.corners[-1], distilled)
        return terms
