"""RT-DETRv2's training loss, where its encoder may score tokens without classes.

RT-DETRv2: Improved Baseline with Bag-of-Freebies, arXiv 2407.17140.
Upstream: https://github.com/lyuwenyu/RT-DETR
rtdetrv2_pytorch/src/zoo/rtdetr/rtdetrv2_criterion.py (Apache-2.0).
Departs from the source:
- as `DETRCriterion`;
- the matching of tokens without classes sees one class, too (upstream looks up the
  targets' classes there, and fails on any but the first).
"""

from dataclasses import replace

import torch
from torch import Tensor

from mmbackbones.ops.predictions import BoxTargets, DecoderOutput
from mmbackbones.registry import MODELS

from .detr_criterion import DETRCriterion, PredictionStack

__all__ = ['RTDETRCriterion']


@MODELS.register_module()
class RTDETRCriterion(DETRCriterion):
    """`DETRCriterion` that knows of `query_select_method='agnostic'`.

    Tokens with one score for all classes are matched and judged as if there were one
    class only. Everything else is as there, arguments too.
    """

    def _losses(self, output: DecoderOutput, targets: BoxTargets) -> dict[str, Tensor]:
        logits, boxes = output.enc_logits, output.enc_boxes
        if logits is None or logits.shape[-1] == output.queries.logits.shape[-1]:
            return super()._losses(output, targets)
        output = replace(output, enc_logits=None, enc_boxes=None)
        losses = super()._losses(output, targets)
        tokens = PredictionStack(
            ('_enc_0',),
            logits.float().flatten(0, 1)[None],
            boxes.float().flatten(0, 1)[None],
            None,
            None,
        )
        one_class = replace(targets, labels=torch.zeros_like(targets.labels))
        matches = self._match(tokens, len(logits), one_class)
        return losses | self._named(tokens, self._terms(tokens, one_class, matches))
