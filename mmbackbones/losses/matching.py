"""Which query answers for which box: costs, assignment, union over layers.

End-to-End Object Detection with Transformers, arXiv 2005.12872 (matching);
D-FINE, arXiv 2410.13842 section 4.2 (union of the matches of all layers).
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/matcher.py and
dfine_criterion.py; https://github.com/Intellindust-AI-Lab/DEIMv2
engine/deim/matcher.py (all Apache-2.0).
Departs from the source:
- costs exist only for a box and the queries of its own image;
- the costs of all prediction sets are read back from the device together;
- pairs of equal count in the union are ordered by box index (the source sorts
  unstably, so its order among them is undefined);
- boxes of NaN or infinite coordinates get a cost instead of an assertion.

Legend: S prediction sets (layers and auxiliary heads), N images, Q queries,
C classes, T boxes of the whole batch, P pairs per set, U pairs of the union.
Queries are counted through the batch: query q of image n is n * Q + q.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mmbackbones.ops.boxes import (
    cxcywh_to_ordered_xyxy,
    elementwise_giou,
    elementwise_iou,
)
from mmbackbones.ops.predictions import BoxTargets
from mmbackbones.registry import MODELS

__all__ = [
    'HungarianMatcher',
    'Pairs',
    'ScoreIoUMatcher',
    'assign',
    'indices_to_device',
    'union_of_matches',
]


class Pairs(NamedTuple):
    """Matched queries and boxes.

    Attributes:
        query: `(P,)` or, different in each set, `(S, P)` int64 into N * Q.
        target: same shape, int64 into the flat boxes of the batch.
    """

    query: Tensor | np.ndarray
    target: Tensor | np.ndarray


def assign(costs: np.ndarray, sizes: Sequence[int]) -> Pairs:
    """Cheapest one-to-one pairing of every set and image.

    Args:
        costs: `(S, T, Q)` finite costs of each box against its image's queries.
        sizes: number of boxes of each image, N entries that sum to T.

    Returns:
        `(S, P)` pairs, image after image. An image of `n` boxes has min(n, Q) of
        them, so P is the same in all sets.
    """
    num_sets, _, num_queries = costs.shape
    num_pairs = sum(min(size, num_queries) for size in sizes)
    query = np.empty((num_sets, num_pairs), np.int64)
    target = np.empty_like(query)
    box = pair = 0
    for image, size in enumerate(sizes):
        if size == 0:
            continue
        pairs = slice(pair, pair + min(size, num_queries))
        for row in range(num_sets):
            matched = linear_sum_assignment(costs[row, box : box + size])
            target[row, pairs] = matched[0] + box
            query[row, pairs] = matched[1] + image * num_queries
        box, pair = box + size, pairs.stop
    return Pairs(query, target)


def union_of_matches(matches: Pairs) -> Pairs:
    """One box for each query that any set matched (D-FINE's GO-LSD union).

    A query keeps the box that most sets gave it, the one of the smaller index
    among equals. A box may so own several queries.

    Args:
        matches: `(S, P)` pairs on the host.

    Returns:
        `(U,)` pairs by rising query, P <= U <= S * P.
    """
    span = int(matches.target.max(initial=-1)) + 1
    code, count = np.unique(
        (matches.query * span + matches.target).ravel(), return_counts=True
    )
    code = code[np.argsort(-count, kind='stable')]  # rising code among equal counts
    query, first = np.unique(code // max(span, 1), return_index=True)
    return Pairs(query, code[first] % max(span, 1))


def indices_to_device(
    arrays: Sequence[np.ndarray], device: torch.device
) -> tuple[Tensor, ...]:
    """Copy int64 arrays to a device as one block; the host does not wait."""
    block = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == 'cuda':
        block = block.pin_memory()  # a pageable copy would wait for the stream
    parts = block.to(device, non_blocking=True).split([a.size for a in arrays])
    return tuple(
        part.view(array.shape) for part, array in zip(parts, arrays, strict=True)
    )


def _both_formats(boxes: Tensor) -> Tensor:
    """Cxcywh and xyxy `(..., 8)` of `(..., 4)` cxcywh."""
    return torch.cat((boxes, cxcywh_to_ordered_xyxy(boxes)), dim=-1)


@MODELS.register_module()
class HungarianMatcher:
    """Bipartite matching of all prediction sets of a batch at once.

    The cost of a box against a query of its image is

        class_cost * (f(p) - g(p)) + bbox_cost * |b - b'|_1 - giou_cost * GIoU

    with p the query's score for the box's class and the two sides of the focal
    loss, f(p) = -alpha (1 - p)^gamma log(p), g(p) = -(1 - alpha) p^gamma log(1 - p).

    Args:
        class_cost: weight of the class term.
        bbox_cost: weight of the L1 distance of normalised cxcywh.
        giou_cost: weight of the GIoU term.
        alpha: of the focal terms.
        gamma: of the focal terms.
        max_entries: costs evaluated at once. They take about 16 floats each, 100 MiB
            at the default, however many boxes a batch has.
    """

    def __init__(
        self,
        *,
        class_cost: float = 2.0,
        bbox_cost: float = 5.0,
        giou_cost: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        max_entries: int = 3 * 2**19,
    ) -> None:
        self.class_cost = class_cost
        self.bbox_cost = bbox_cost
        self.giou_cost = giou_cost
        self.alpha = alpha
        self.gamma = gamma
        self.max_entries = max_entries

    def __call__(self, logits: Tensor, boxes: Tensor, targets: BoxTargets) -> Pairs:
        """Match; reads from the device once.

        Args:
            logits: `(S, N, Q, C)`.
            boxes: `(S, N, Q, 4)` cxcywh, normalised.
            targets: of the N images.

        Returns:
            `(S, P)` pairs on the host, see `assign`.
        """
        costs = self.costs(logits, boxes, targets)
        return assign(costs.cpu().numpy(), targets.sizes)

    @torch.no_grad()
    def costs(self, logits: Tensor, boxes: Tensor, targets: BoxTargets) -> Tensor:
        """Costs `(S, T, Q)`, all finite: NaN counts as 1, infinity as its largest."""
        images = np.repeat(np.arange(len(targets.sizes)), targets.sizes)
        (images,) = indices_to_device([images], logits.device)
        # coordinate-major, so that every operation runs along the queries
        coordinates = _both_formats(boxes).movedim(-1, 0).contiguous()  # (8, S, N, Q)
        num_rows = max(1, self.max_entries // max(1, boxes[:, 0, :, 0].numel()))
        chunks = zip(
            images.split(num_rows),
            targets.labels.split(num_rows),
            _both_formats(targets.boxes).split(num_rows),
            strict=True,
        )
        return torch.cat(
            [self._costs(logits, coordinates, *chunk) for chunk in chunks], dim=1
        )

    def _costs(
        self,
        logits: Tensor,
        coordinates: Tensor,
        images: Tensor,
        labels: Tensor,
        target_boxes: Tensor,
    ) -> Tensor:
        scores = logits[:, images, :, labels].sigmoid().transpose(0, 1)  # (S, t, Q)
        positive = (1 - scores).pow(self.gamma) * (scores + 1e-8).log()
        negative = scores.pow(self.gamma) * (1 - scores + 1e-8).log()
        cost = (1 - self.alpha) * negative - self.alpha * positive

        boxes = coordinates.index_select(2, images).movedim(0, -1)  # (S, t, Q, 8)
        boxes, boxes_xyxy = boxes.split(4, dim=-1)
        target_boxes, target_xyxy = target_boxes[:, None].split(4, dim=-1)  # (t, 1, 4)
        l1 = (boxes - target_boxes).abs().sum(-1)
        giou = elementwise_giou(boxes_xyxy, target_xyxy)
        cost = cost.mul_(self.class_cost).add_(l1, alpha=self.bbox_cost)
        return cost.sub_(giou, alpha=self.giou_cost).nan_to_num_(nan=1.0)


@MODELS.register_module()
class ScoreIoUMatcher(HungarianMatcher):
    """Matching by what counts at the end: a high score on a well-placed box.

    DEIMv2 matches so in its last epochs; see `MatcherSwitchHook`. The cost is

        -p * IoU^iou_power

    Args:
        iou_power: how much more the place counts than the score.
        max_entries: as of `HungarianMatcher`.
    """

    def __init__(self, *, iou_power: float = 4.0, max_entries: int = 3 * 2**19) -> None:
        super().__init__(max_entries=max_entries)
        self.iou_power = iou_power

    def _costs(
        self,
        logits: Tensor,
        coordinates: Tensor,
        images: Tensor,
        labels: Tensor,
        target_boxes: Tensor,
    ) -> Tensor:
        scores = logits[:, images, :, labels].sigmoid().transpose(0, 1)  # (S, t, Q)
        boxes_xyxy = coordinates[4:].index_select(2, images).movedim(0, -1)
        iou = elementwise_iou(boxes_xyxy, target_boxes[:, None, 4:])
        return (-scores * iou.pow(self.iou_power)).nan_to_num_(nan=1.0)
