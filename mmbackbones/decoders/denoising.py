"""Contrastive denoising: queries made of noisy ground truth, for training only.

DINO: DETR with Improved DeNoising Anchor Boxes, arXiv 2203.03605.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/denoising.py (Apache-2.0).
Departs from the source:
- sizes come as integers and everything else is arithmetic on tensors, so that the
  host never waits for the device (upstream: two index look-ups and a masked write);
- `box_noise_scale` counts; upstream's decoder passes 1 whatever its configuration
  says;
- of an image with more than 500 boxes that many are drawn: denoising queries attend
  to each other, which takes time with their square.
The random numbers are drawn in upstream's order: one seed gives the same queries.

Legend: N images, T ground-truth boxes of the batch, M the most used of any image, G
groups, R = 2 * M * G denoising queries, Q matched queries, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmbackbones.ops.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from mmbackbones.ops.predictions import BoxTargets, DenoisingPairs

__all__ = ['DenoisingQueries', 'denoising_visible_mask', 'make_denoising_queries']


# Several times the most that an image of COCO has.
_MOST_BOXES = 500


class DenoisingQueries(NamedTuple):
    """Noisy copies of the ground truth, group after group.

    Each group holds M positives and then M negatives; images with fewer boxes are
    filled up with zero content.

    Attributes:
        content: `(N, R, D)` embedded labels.
        box_logits: `(N, R, 4)` cxcywh before the sigmoid.
        pairs: where the positives came from.
    """

    content: Tensor
    box_logits: Tensor
    pairs: DenoisingPairs


def make_denoising_queries(
    targets: BoxTargets,
    class_embed: nn.Embedding,
    num_denoising: int,
    label_noise_ratio: float,
    box_noise_scale: float,
    *,
    flip_crossed: bool = True,
) -> DenoisingQueries | None:
    """Draw denoising queries.

    Each label is replaced by a random one with probability `label_noise_ratio / 2`.
    Each edge moves by up to half the box (positives) or by half to all of it
    (negatives), times `box_noise_scale`, inwards or outwards.

    Args:
        targets: ground truth of the batch.
        class_embed: `num_classes + 1` rows, the last for filling up.
        num_denoising: positives per image aimed at: G = num_denoising // M, at
            least 1.
        label_noise_ratio: in [0, 2].
        box_noise_scale: at least 0.
        flip_crossed: whether a box whose edges have crossed is turned the right way
            round, as D-FINE does; otherwise its size is 0, as in RT-DETR.

    Returns:
        The queries; None for a batch without boxes.
    """
    most = min(max(targets.sizes, default=0), _MOST_BOXES)
    if most == 0:
        return None
    num_classes = class_embed.num_embeddings - 1
    num_groups = max(1, num_denoising // most)
    device = targets.boxes.device
    slots, pairs = _layout(targets.sizes, most, num_groups, device)

    # Slots of missing boxes read the extra last row. (N, M) -> (N, R)
    labels = torch.cat((targets.labels, targets.labels.new_full((1,), num_classes)))
    labels = labels[slots].repeat(1, 2 * num_groups)
    boxes = torch.cat((targets.boxes, targets.boxes.new_zeros(1, 4)))
    boxes = boxes[slots].repeat(1, 2 * num_groups, 1)

    replace = torch.rand(labels.shape, device=device) < label_noise_ratio * 0.5
    random = torch.randint(num_classes, labels.shape, dtype=torch.int32, device=device)
    labels = torch.where(replace & (labels != num_classes), random, labels)

    sign = torch.randint(2, boxes.shape, dtype=boxes.dtype, device=device) * 2 - 1
    reach = torch.rand(boxes.shape, dtype=boxes.dtype, device=device)
    is_negative = torch.arange(boxes.shape[1], device=device) // most % 2
    reach = (reach + is_negative[:, None]) * box_noise_scale  # (N, R, 4)
    edges = cxcywh_to_xyxy(boxes) + sign * reach * boxes[..., 2:].repeat(1, 1, 2) * 0.5
    boxes = xyxy_to_cxcywh(edges.clamp(0, 1))
    if flip_crossed:
        boxes = boxes.abs()
    return DenoisingQueries(class_embed(labels), inverse_sigmoid(boxes), pairs)


def _layout(
    sizes: tuple[int, ...], most: int, num_groups: int, device: torch.device
) -> tuple[Tensor, DenoisingPairs]:
    """Target of every slot, `(N, M)` with T for none, and the positive pairs.

    Pairs are ordered by image, group and box. Index arithmetic on the host and one
    copy, which does not wait where memory can be pinned.
    """
    count = torch.tensor(sizes)
    start = count.cumsum(0) - count
    column = torch.arange(most)
    filled = column < count[:, None]
    box = column.repeat(len(sizes), 1)
    for i, size in enumerate(sizes):
        if size > most:
            box[i] = torch.randperm(size)[:most].sort().values
    slots = torch.where(filled, start[:, None] + box, sum(sizes))

    in_group = filled[:, None].expand(-1, num_groups, -1)
    image, group, place = in_group.nonzero().unbind(1)
    packed = torch.cat(
        (slots.flatten(), image, group * 2 * most + place, slots[image, place])
    )
    if device.type == 'cuda':
        packed = packed.pin_memory()
    packed = packed.to(device, non_blocking=True)
    slots, image, query, target = packed.split((slots.numel(), *[len(image)] * 3))
    pairs = DenoisingPairs(image, query, target, num_groups)
    return slots.view(len(sizes), most), pairs


def denoising_visible_mask(
    num_denoising: int, num_groups: int, num_queries: int, device: torch.device
) -> Tensor | int:
    """Which queries see which: a group itself, and everybody the matched queries.

    Args:
        num_denoising: R, all denoising queries, which come first.
        num_groups: G.
        num_queries: Q.
        device: of the result.

    Returns:
        `(R + Q, R + Q)` bool; row i says what query i sees. Of a single group R alone:
        crowded images have thousands of queries, and need no mask of their square.
    """
    if num_groups == 1:
        return num_denoising
    group = torch.arange(num_denoising + num_queries, device=device)
    group = (group // (num_denoising // num_groups)).clamp(max=num_groups)
    return (group[:, None] == group) | (group == num_groups)
