"""Box kernels of mmcv's `_ext` in plain torch: NMS, soft-NMS and RoIAlign.

Papers: arXiv 1704.04503 (soft-NMS), 1703.06870 (RoIAlign).
Interface: https://github.com/open-mmlab/mmcv (Apache-2.0), `mmcv/ops/nms.py` and
`mmcv/ops/roi_align.py` of 2.1.0.

Departs from the source:
- any floating dtype; half precision is computed in float32;
- equal scores keep the order of the input (the compiled sort leaves it open);
- maximum RoIAlign passes a gradient through points at -1 too, on the very edge of
  the map's margin (the compiled op takes -1 for "no point");
- RoIAlign gives zeros for inverted boxes on every device (the compiled CPU op
  refuses them, the CUDA one does this).

Legend: N images, C channels, H x W map, K regions, P x R bins of a region,
T sampling points of all bins.
"""

import torch
from torch import Tensor

from mmbackbones.ops.mmcv_kernels import kernel, wide

__all__ = ['nms', 'roi_align_backward', 'roi_align_forward', 'softnms']

NMS_BLOCK = 128  # rows of the IoU table held at once; larger ones leave the cache
MAX_POOL_CHUNK = 64  # regions whose sampled values are held at once


# -- non-maximum suppression --------------------------------------------------------


def _iou_table(boxes_a: Tensor, boxes_b: Tensor, offset: int) -> Tensor:
    """IoU of each of `(A, 4)` with each of `(B, 4)` xyxy boxes: `(A, B)`."""
    inter = 1.0
    for low, high in ((0, 2), (1, 3)):  # x, then y; in place, the table is large
        start = torch.maximum(boxes_a[:, None, low], boxes_b[:, low])
        extent = torch.minimum(boxes_a[:, None, high], boxes_b[:, high]).sub_(start)
        inter = extent.add_(offset).clamp_(min=0).mul_(inter)
    area_a, area_b = (
        (b[:, 2] - b[:, 0] + offset) * (b[:, 3] - b[:, 1] + offset)
        for b in (boxes_a, boxes_b)
    )
    return inter / (area_a[:, None] + area_b).sub_(inter)


@kernel
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy suppression.

    Args:
        boxes: `(K, 4)` xyxy; K may be 0.
        scores: `(K,)`.
        iou_threshold: a box that overlaps a kept one by more is dropped.
        offset: 1 where the far edge belongs to the box, else 0.

    Returns:
        int64 indices of the kept boxes, best score first.
    """
    order = scores.argsort(descending=True, stable=True)
    (boxes,) = wide(boxes[order])
    kept = [order[:0]]
    while len(order):
        overlap = _iou_table(boxes[:NMS_BLOCK], boxes, offset) > iou_threshold
        rows = len(overlap)
        within = overlap[:, :rows].triu(1)
        # "kept = not suppressed by a kept one before it" has one solution, which
        # the iteration reaches from the left, at least one box further each time.
        keep = ~torch.zeros_like(within[0])
        while not torch.equal(keep, update := ~(within & keep[:, None]).any(0)):
            keep = update
        kept.append(order[:rows][keep])
        alive = ~overlap[keep, rows:].any(0)
        order, boxes = order[rows:][alive], boxes[rows:][alive]
    return torch.cat(kept)


@kernel
def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Suppression that lowers scores instead of dropping boxes at once.

    Args:
        boxes: `(K, 4)` xyxy.
        scores: `(K,)`.
        dets: `(K, 5)`, filled from the top with box and lowered score.
        iou_threshold: of methods 0 and 1.
        sigma: of method 2.
        min_score: boxes that fall below are dropped.
        method: 0 drops, 1 lowers linearly, 2 lowers by a Gaussian.
        offset: as in `nms`.

    Returns:
        int64 indices of the kept boxes, in the order they were taken.
    """
    index = torch.arange(len(boxes), device=boxes.device)
    rest, scores = wide(boxes, scores)
    kept = []
    while len(index):
        best = scores.argmax()
        dets[len(kept), :4], dets[len(kept), 4] = boxes[index[best]], scores[best]
        kept.append(index[best])
        iou = _iou_table(rest[best][None], rest, offset)[0]
        if method == 2:
            weight = torch.exp(-(iou**2) / sigma)
        else:
            low = 1 - iou if method == 1 else torch.zeros_like(iou)
            weight = torch.where(iou >= iou_threshold, low, 1.0)
        scores = scores * weight
        alive = ~(scores < min_score)
        alive[best] = False
        index, rest, scores = index[alive], rest[alive], scores[alive]
    return torch.stack(kept) if kept else index


# -- RoIAlign -----------------------------------------------------------------------


def _roi_grid(
    rois: Tensor,
    bins_hw: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the bins of `(K, 5)` regions lie: three `(K, 2)` tensors, y before x.

    Returns:
        `start` and `step` in pixels of the map, the first bin's edge and a bin's
        size; `grid`, the number of points in a bin.
    """
    box = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    start, size = box[:, :2].flip(1), (box[:, 2:] - box[:, :2]).flip(1)
    if not aligned:
        size = size.clamp(min=1)
    step = size / rois.new_tensor(bins_hw)
    if sampling_ratio > 0:
        grid = torch.full_like(step, sampling_ratio, dtype=torch.long)
    else:
        grid = step.ceil().long().clamp(min=0)  # after `long`: NaN becomes 0
    return start, step, grid


def _roi_samples(
    start: Tensor, step: Tensor, grid: Tensor, bins_hw: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sampling points of all bins in one flat list.

    Returns:
        `y`, `x` `(T,)` in pixels of the map; `roi` `(T,)`, the region of a point;
        `bins` `(T,)`, its bin, rising in [0, K * P * R).
    """
    points, num_bins = grid.prod(1), bins_hw[0] * bins_hw[1]
    per_roi = points * num_bins
    roi = torch.arange(len(start), device=start.device).repeat_interleave(per_roi)
    rank = torch.arange(len(roi), device=start.device)
    rank = rank - (per_roi.cumsum(0) - per_roi)[roi]
    bin_in_roi, point = rank // points[roi], rank % points[roi]
    bin_yx = torch.stack((bin_in_roi // bins_hw[1], bin_in_roi % bins_hw[1]), 1)
    point_yx = torch.stack((point // grid[roi, 1], point % grid[roi, 1]), 1)
    within = (point_yx.to(step.dtype) + 0.5) / grid[roi]  # of the bin, 0 to 1
    yx = start[roi] + (bin_yx + within) * step[roi]
    return yx[:, 0], yx[:, 1], roi, roi * num_bins + bin_in_roi


def _roi_corners(
    y: Tensor, x: Tensor, map_hw: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Flat indices and weights `(..., 4)` of the pixels around a point.

    Within one pixel outside the map the border value holds; further out the
    weights are 0.
    """
    height, width = map_hw
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y = torch.where(inside, y, 0.0).clamp(0, height - 1)
    x = torch.where(inside, x, 0.0).clamp(0, width - 1)
    top, left = y.long(), x.long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    low_y, low_x = y - top, x - left
    high_y, high_x = 1 - low_y, 1 - low_x
    index = (top * width + left, top * width + right)
    index += (bottom * width + left, bottom * width + right)
    weight = (high_y * high_x, high_y * low_x, low_y * high_x, low_y * low_x)
    return torch.stack(index, -1), torch.stack(weight, -1) * inside[..., None]


def _weighted_rows(
    table: Tensor, to: Tensor, source: Tensor, weight: Tensor, num_rows: int
) -> Tensor:
    """`out[to] += weight * table[source]` as a sparse product: `(num_rows, C)`."""
    matrix = torch.sparse_coo_tensor(
        torch.stack((to.flatten(), source.flatten())),
        weight.flatten(),
        (num_rows, len(table)),
        check_invariants=False,
    )
    return matrix @ table


@kernel
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Pool regions of `input` `(N, C, H, W)` into `output` `(K, C, P, R)`.

    Args:
        input: the feature map.
        rois: `(K, 5)` image index and xyxy box in image pixels; K may be 0.
        output: filled.
        argmax_y: `(K, C, P, R)`, filled in max mode with the winning point's
            row, -2 (outside) where a bin has no point; empty in average mode.
        argmax_x: likewise, the column.
        aligned_height: P.
        aligned_width: R.
        spatial_scale: map pixels per image pixel.
        sampling_ratio: points per bin and axis; 0 takes one per map pixel.
        pool_mode: 0 maximum, 1 average.
        aligned: shift by half a pixel, so that pixel centres are at .5.
    """
    channels, *map_hw = input.shape[1:]
    input, rois = wide(input, rois)
    table = input.permute(0, 2, 3, 1).reshape(-1, channels)
    bins_hw = (aligned_height, aligned_width)
    image = rois[:, 0].long() * (map_hw[0] * map_hw[1])  # its first row in the table
    start, step, grid = _roi_grid(
        rois.to(input.dtype), bins_hw, spatial_scale, sampling_ratio, aligned
    )
    points = grid.prod(1)
    if pool_mode == 1:
        y, x, roi, bins = _roi_samples(start, step, grid, bins_hw)
        pixel, weight = _roi_corners(y, x, map_hw)
        pooled = _weighted_rows(
            table,
            bins[:, None].expand_as(pixel),
            pixel + image[roi, None],
            weight / points[roi, None],
            len(rois) * bins_hw[0] * bins_hw[1],
        )
        output.copy_(pooled.view(-1, *bins_hw, channels).permute(0, 3, 1, 2))
        return
    output.fill_(-10000.0)  # of bins without a point, as mmcv has it
    argmax_y.fill_(-2.0)
    argmax_x.fill_(-2.0)
    for count in points.unique().tolist():
        if count == 0:
            continue
        for rows in (points == count).nonzero()[:, 0].split(MAX_POOL_CHUNK):
            y, x, roi, _ = _roi_samples(start[rows], step[rows], grid[rows], bins_hw)
            pixel, weight = _roi_corners(y, x, map_hw)
            rank = torch.arange(len(y), device=y.device)
            value = _weighted_rows(
                table,
                rank[:, None].expand_as(pixel),
                pixel + image[rows][roi, None],
                weight,
                len(y),
            )
            best, winner = value.view(-1, count, channels).max(1)  # (bins, C)
            winner = winner + rank[::count, None]
            for target, found in (
                (output, best),
                (argmax_y, y[winner]),
                (argmax_x, x[winner]),
            ):
                found = found.view(-1, *bins_hw, channels).permute(0, 3, 1, 2)
                target[rows] = found.to(target.dtype)


@kernel
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the gradient of `roi_align_forward` to `grad_input` `(N, C, H, W)`."""
    num_images, channels, *map_hw = grad_input.shape
    num_pixels = map_hw[0] * map_hw[1]
    grad, rois, argmax_y, argmax_x = wide(grad_output, rois, argmax_y, argmax_x)
    image = rois[:, 0].long()
    if pool_mode == 1:
        bins_hw = (aligned_height, aligned_width)
        start, step, grid = _roi_grid(
            rois.to(grad.dtype), bins_hw, spatial_scale, sampling_ratio, aligned
        )
        y, x, roi, bins = _roi_samples(start, step, grid, bins_hw)
        pixel, weight = _roi_corners(y, x, map_hw)
        rows = _weighted_rows(
            grad.permute(0, 2, 3, 1).reshape(-1, channels),
            pixel + image[roi, None] * num_pixels,
            bins[:, None].expand_as(pixel),
            weight / grid.prod(1)[roi, None],
            num_images * num_pixels,
        )
        rows = rows.view(num_images, *map_hw, channels).permute(0, 3, 1, 2)
        grad_input += rows.to(grad_input.dtype)
        return
    pixel, weight = _roi_corners(argmax_y, argmax_x, map_hw)  # (K, C, P, R, 4)
    plane = torch.arange(channels, device=grad.device) + image[:, None] * channels
    plane = (plane * num_pixels)[:, :, None, None]  # (K, C, 1, 1)
    flat = grad.new_zeros(num_images * channels * num_pixels)
    for corner in range(4):
        flat.index_add_(
            0,
            (plane + pixel[..., corner]).flatten(),
            (grad * weight[..., corner]).flatten(),
        )
    grad_input += flat.view_as(grad_input).to(grad_input.dtype)
