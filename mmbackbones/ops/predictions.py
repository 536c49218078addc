"""What passes between the decoder and the losses: named tensors, no behaviour.

Legend: N images, Q queries, C classes, L decoder layers, B = reg_max + 1 bins,
T ground-truth boxes of the whole batch, P pairs of a query and a box.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ['BoxTargets', 'DecoderOutput', 'DenoisingPairs', 'QueryPredictions']


@dataclass(frozen=True)
class BoxTargets:
    """Ground truth of a batch, image after image in one flat list.

    Attributes:
        labels: `(T,)` int64, 0-based classes.
        boxes: `(T, 4)` float32, cxcywh, normalised by the network's input size.
        sizes: number of boxes of each image; their sum is T. Plain integers, so
            that nothing has to be read back from the device.
    """

    labels: Tensor
    boxes: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def from_lists(
        cls, labels: Sequence[Tensor], boxes: Sequence[Tensor]
    ) -> 'BoxTargets':
        """Join per-image `(n_i,)` labels and `(n_i, 4)` boxes; `n_i` may be 0."""
        return cls(
            torch.cat(tuple(labels)),
            torch.cat(tuple(boxes)).float(),
            tuple(len(label) for label in labels),
        )

    def __len__(self) -> int:
        """T, the number of boxes in the batch."""
        return sum(self.sizes)


@dataclass(frozen=True)
class DenoisingPairs:
    """Which denoising query was made from which box (positives only).

    Attributes:
        image: `(P,)` int64, index of the image.
        query: `(P,)` int64, index among that image's denoising queries.
        target: `(P,)` int64, index into the flat `BoxTargets`.
        num_groups: G, copies of the ground truth; P = T * G, less where boxes of
            crowded images are left out.
    """

    image: Tensor
    query: Tensor
    target: Tensor
    num_groups: int


@dataclass(frozen=True)
class QueryPredictions:
    """Outputs of one kind of queries (matched or denoising), layers stacked.

    Attributes:
        logits: `(L, N, Q, C)` class logits, shallow to deep.
        boxes: `(L, N, Q, 4)` cxcywh, normalised.
        corners: `(L, N, Q, 4 * B)` logits of the edge distributions (left, top,
            right, bottom; B bins each), or None for decoders without them.
        ref_boxes: `(N, Q, 4)` detached boxes that `corners` are relative to.
        pre_logits: `(N, Q, C)` of the first layer before refinement, or None.
        pre_boxes: `(N, Q, 4)` likewise.
    """

    logits: Tensor
    boxes: Tensor
    corners: Tensor | None = None
    ref_boxes: Tensor | None = None
    pre_logits: Tensor | None = None
    pre_boxes: Tensor | None = None


@dataclass(frozen=True)
class DecoderOutput:
    """All that a decoder returns.

    In evaluation only `queries` is filled, with the one evaluated layer (L = 1)
    and without `pre_*`.

    Attributes:
        queries: the matched queries.
        denoising: the denoising queries, or None (no boxes, or evaluation).
        dn_pairs: where the denoising queries came from, or None with them.
        enc_logits: `(N, Q, C)` of the selected encoder tokens (training).
        enc_boxes: `(N, Q, 4)` likewise.
    """

    queries: QueryPredictions
    denoising: QueryPredictions | None = None
    dn_pairs: DenoisingPairs | None = None
    enc_logits: Tensor | None = None
    enc_boxes: Tensor | None = None
