"""Box losses: L1 and GIoU, and D-FINE's losses on edge distributions.

D-FINE, arXiv 2410.13842: FGL is in section 4.1, DDF in section 4.2.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/dfine_criterion.py
and dfine_utils.py (Apache-2.0).
Departs from the source:
- the mix of matched and unmatched queries in DDF has no factor for the batch
  size: it stands above and below the fraction line.

Legend: S prediction sets, K student layers, M queries of the batch, P pairs of a
query and a box, B = reg_max + 1 bins. Edges are left, top, right, bottom.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbackbones.ops.boxes import cxcywh_to_ordered_xyxy, elementwise_giou

__all__ = [
    'ddf_loss',
    'ddf_weights',
    'fgl_loss',
    'fgl_targets',
    'giou_loss',
    'l1_loss',
]


def l1_loss(boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """Sum of absolute differences of normalised cxcywh.

    Args:
        boxes: `(S, P, 4)`.
        target_boxes: `(P, 4)` or `(S, P, 4)`.

    Returns:
        `(S,)`, to be divided by the number of pairs.
    """
    return (boxes - target_boxes).abs().sum((1, 2))


def giou_loss(boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """Sum of 1 - GIoU (arXiv 1902.09630); arguments as in `l1_loss`.

    A negative width or height counts as 0.
    """
    giou = elementwise_giou(
        cxcywh_to_ordered_xyxy(boxes), cxcywh_to_ordered_xyxy(target_boxes)
    )
    return (1 - giou).sum(1)


@torch.no_grad()
def fgl_targets(
    ref_boxes: Tensor, target_boxes: Tensor, bins: Tensor, reg_scale: float
) -> tuple[Tensor, Tensor]:
    """Edges of the targets as weights of two neighbouring bins.

    `distance_to_box` solved for the distance d of an edge gives, at the left,

        d = (cx - x1) / (w / reg_scale) - reg_scale / 2

    and with l the last bin of W(l) <= d

        right weight = (d - W(l)) / (W(l + 1) - W(l))

    so that the two bins' W, weighted, give d again. Distances beyond the outermost
    bins count as those.

    Args:
        ref_boxes: `(P, 4)` cxcywh, that the distances are relative to.
        target_boxes: `(P, 4)` cxcywh in the same frame.
        bins: `(B,)`, W of `weighting_function`.
        reg_scale: c of W.

    Returns:
        Left bins `(P, 4)`, int64 in [0, reg_max - 1], and right weights `(P, 4)`
        in [0, 1].
    """
    boxes_xyxy = cxcywh_to_ordered_xyxy(target_boxes)
    centre, size = ref_boxes[:, :2], ref_boxes[:, 2:]
    reach = torch.cat((centre - boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - centre), dim=1)
    unit = size.repeat(1, 2) / reg_scale + 1e-16  # a reference may have no size
    distances = reach / unit - 0.5 * reg_scale  # (P, 4)
    left_bin = torch.searchsorted(bins, distances, right=True) - 1
    left_bin = left_bin.clamp(0, len(bins) - 2)
    low, high = bins[left_bin], bins[left_bin + 1]
    return left_bin, ((distances - low) / (high - low)).clamp(0, 1)


def fgl_loss(
    corners: Tensor, left_bin: Tensor, right_weight: Tensor, quality: Tensor
) -> Tensor:
    """Fine-grained localization loss, summed over pairs and edges.

    With l the left bin of an edge and w its right weight,

        quality * ((1 - w) * CE(corners, l) + w * CE(corners, l + 1))

    Args:
        corners: `(K, P, 4, B)` logits of the matched queries' distributions.
        left_bin: `(P, 4)`, see `fgl_targets`; the same for all layers.
        right_weight: `(P, 4)`.
        quality: `(K, P)` IoU of predicted and target box; carries no gradient.

    Returns:
        `(K,)`, to be divided by the number of pairs.
    """
    left = left_bin[None, ..., None].expand(*corners.shape[:-1], 1)
    log_probs = corners.log_softmax(-1)
    at_left = log_probs.gather(-1, left)[..., 0]  # (K, P, 4)
    at_right = log_probs.gather(-1, left + 1)[..., 0]
    edges = torch.lerp(at_left, at_right, right_weight)
    return -(edges.sum(-1) * quality.detach()).sum(1)


def ddf_weights(
    teacher_logits: Tensor, query: Tensor, quality: Tensor, matched_share: float
) -> Tensor:
    """Weight of each query in the distillation.

    A matched query counts by the student's IoU, another by the teacher's highest
    score; both kinds are averaged, and the averages mixed:

        share * mean over matched + (1 - share) * mean over unmatched

    An empty side adds nothing.

    Args:
        teacher_logits: `(M, C)`.
        query: `(P,)` int64, the matched ones of the M queries.
        quality: `(K, P)` IoU of the student's boxes.
        matched_share: in [0, 1], see `ddf_loss`.

    Returns:
        `(K, M)` without gradient.
    """
    num_matched, num_queries = len(query), len(teacher_logits)
    weights = teacher_logits.detach().amax(-1).sigmoid()
    weights = weights * ((1 - matched_share) / max(1, num_queries - num_matched))
    weights = weights.repeat(len(quality), 1)
    matched = quality.detach() * (matched_share / max(1, num_matched))
    return weights.scatter_(1, query.expand(len(quality), -1), matched)


def ddf_loss(
    corners: Tensor, teacher: Tensor, weights: Tensor, temperature: float = 5.0
) -> Tensor:
    """Decoupled distillation focal loss of the last layer into earlier ones.

        T^2 * sum over queries of weight * mean over edges of
            KL(softmax(teacher / T) || softmax(student / T))

    where `ddf_weights` mixes matched and unmatched queries by the share
    sqrt(matched) / (sqrt(matched) + sqrt(unmatched)). A student equal to its
    teacher has a loss of exactly 0.

    Args:
        corners: `(K, M, 4, B)` logits of the students.
        teacher: `(M, 4, B)` logits of the teacher; carry no gradient.
        weights: `(K, M)`.
        temperature: T.

    Returns:
        `(K,)`, already normalised.
    """
    divergence = F.kl_div(
        (corners / temperature).log_softmax(-1),
        (teacher.detach() / temperature).log_softmax(-1),
        reduction='none',
        log_target=True,
    )
    return temperature**2 * (divergence.sum(-1).mean(-1) * weights).sum(1)
