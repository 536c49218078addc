"""The graph of a segmentor whose windows slide: logits, which a reader averages."""

import math

import torch
from torch import Tensor

from mmbackbones.export.graph import SegmentorGraph

__all__ = ['WindowGraph']


class WindowGraph(SegmentorGraph):
    """Logits of one window at the resolution of the head.

    Enlarged they would be many times as many numbers as there are pixels, so the reader
    enlarges them (`mmbackbones.inference.sliding`).

    Args:
        model: `EncoderDecoder` or a relative.
    """

    output_names = ('logits',)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """`(N, 3, H, W)` to `(N, C, h, w)`; the label is the largest of the classes.

        A head with one logit is given a first class, whose logit is its threshold.
        """
        head = self.model.decode_head
        logits = head(self.model.extract_feat(self.normalise(images)))
        if logits.shape[1] == 1:
            limit = math.log(head.threshold / (1 - head.threshold))
            logits = torch.cat((torch.full_like(logits, limit), logits), 1)
        return (logits,)
