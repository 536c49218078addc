"""Suppression and RoIAlign of the `mmcv._ext` stand-in against loops."""

import math

import pytest
import torch
from mmcv_helpers import ROIS, call_stand_in, rand, rand_boxes
from torch.autograd import gradcheck

from mmbackbones.ops import mmcv_box_kernels

ops = pytest.importorskip('mmcv.ops', reason='mmcv (or mmcv-lite) is not installed')


@pytest.fixture
def stand_in(monkeypatch):
    return call_stand_in(monkeypatch)


# -- nms ----------------------------------------------------------------------------


def slow_iou(a, b, offset):
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    areas = [(c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


def slow_nms(boxes, scores, threshold, offset):
    boxes, kept = boxes.tolist(), []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(slow_iou(boxes[j], boxes[i], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize('num', [0, 1, 2, 60, 150])
@pytest.mark.parametrize('block', [7, 128])
@pytest.mark.parametrize(('threshold', 'offset'), [(0.3, 0), (0.6, 1), (0.0, 0)])
def test_nms_equals_loop(stand_in, monkeypatch, num, block, threshold, offset):
    monkeypatch.setattr(mmcv_box_kernels, 'NMS_BLOCK', block)
    boxes, scores = rand_boxes(num), rand(num, seed=3, dtype=torch.float32)
    dets, kept = ops.nms(boxes, scores, threshold, offset)
    assert kept.tolist() == slow_nms(boxes, scores.tolist(), threshold, offset)
    assert kept.dtype == torch.int64
    torch.testing.assert_close(dets, torch.cat((boxes, scores[:, None]), 1)[kept])


def test_nms_takes_ties_half_and_chains(stand_in):
    same = torch.tensor([[0.0, 0, 4, 4]]).repeat(5, 1)
    assert stand_in.nms(same, torch.ones(5), 0.5, 0).tolist() == [0]
    # Each overlaps the next only: every second one stays.
    start = torch.arange(7.0)[:, None] * 2
    chain = torch.cat((start, start * 0, start + 3, start * 0 + 3), 1)
    scores = torch.linspace(1, 0.1, 7)
    assert stand_in.nms(chain.half(), scores.half(), 0.1, 0).tolist() == [0, 2, 4, 6]


def test_batched_nms_keeps_classes_apart(stand_in):
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 5]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0])
    _, kept = ops.batched_nms(
        boxes, scores, labels, {'type': 'nms', 'iou_threshold': 0.5}
    )
    assert kept.tolist() == [0, 1]


def slow_softnms(boxes, scores, threshold, sigma, min_score, method, offset):
    boxes, scores, rest = boxes.tolist(), scores.tolist(), list(range(len(boxes)))
    kept, values = [], []
    while rest:
        best = max(rest, key=lambda i: scores[i])
        rest.remove(best)
        kept.append(best)
        values.append(scores[best])
        for i in rest:
            iou = slow_iou(boxes[best], boxes[i], offset)
            if method == 'gaussian':
                scores[i] *= math.exp(-iou * iou / sigma)
            elif iou >= threshold:
                scores[i] *= 1 - iou if method == 'linear' else 0
        rest = [i for i in rest if scores[i] >= min_score]
    return kept, values


@pytest.mark.parametrize('num', [0, 1, 40])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('offset', [0, 1])
def test_soft_nms_equals_loop(stand_in, num, method, offset):
    boxes, scores = rand_boxes(num), rand(num, seed=3, dtype=torch.float32)
    dets, kept = ops.soft_nms(boxes, scores, 0.3, 0.5, 1e-2, method, offset)
    want, values = slow_softnms(boxes, scores, 0.3, 0.5, 1e-2, method, offset)
    assert kept.tolist() == want
    torch.testing.assert_close(dets[:, 4], torch.tensor(values))
    torch.testing.assert_close(dets[:, :4], boxes[kept])


# -- RoIAlign -----------------------------------------------------------------------


def slow_border_value(plane, y, x):
    """Bilinear value; the border holds for one more pixel, then 0."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    top = plane[y0, x0] * (x0 + 1 - x) + plane[y0, x1] * (x - x0)
    bottom = plane[y1, x0] * (x0 + 1 - x) + plane[y1, x1] * (x - x0)
    return float(top * (y0 + 1 - y) + bottom * (y - y0))


def slow_roi_align(maps, rois, bins, scale, ratio, mode, aligned):
    output = maps.new_zeros(len(rois), maps.shape[1], *bins)
    for k, (image, *box) in enumerate(rois.tolist()):
        x0, y0, x1, y1 = (v * scale - (0.5 if aligned else 0) for v in box)
        size = (y1 - y0, x1 - x0)
        if not aligned:
            size = [max(s, 1.0) for s in size]
        step = [size[i] / bins[i] for i in range(2)]
        grid = [ratio if ratio > 0 else math.ceil(s) for s in step]
        for c, plane in enumerate(maps[int(image)]):
            for p in range(bins[0]):
                for r in range(bins[1]):
                    values = [
                        slow_border_value(
                            plane,
                            y0 + p * step[0] + (i + 0.5) * step[0] / grid[0],
                            x0 + r * step[1] + (j + 0.5) * step[1] / grid[1],
                        )
                        for i in range(grid[0])
                        for j in range(grid[1])
                    ]
                    pool = sum(values) / max(len(values), 1)
                    if mode == 'max':
                        pool = max(values, default=-10000.0)
                    output[k, c, p, r] = pool
    return output


@pytest.mark.parametrize('mode', ['avg', 'max'])
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('chunk', [2, 64])
def test_roi_align_equals_loop(stand_in, monkeypatch, mode, aligned, ratio, chunk):
    monkeypatch.setattr(mmcv_box_kernels, 'MAX_POOL_CHUNK', chunk)
    maps = rand(2, 2, 6, 7, low=-1).requires_grad_()
    args = ((3, 2), 0.3, ratio, mode, aligned)
    output = ops.roi_align(maps, ROIS, *args)
    want = slow_roi_align(maps.detach(), ROIS, *args)
    torch.testing.assert_close(output, want)
    assert gradcheck(lambda maps: ops.roi_align(maps, ROIS, *args), (maps,))


@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_without_regions(stand_in, mode):
    maps = torch.rand(2, 3, 4, 5, requires_grad=True)
    output = ops.RoIAlign(3, pool_mode=mode)(maps, torch.zeros(0, 5))
    assert output.shape == (0, 3, 3, 3)
    output.sum().backward()
    assert maps.grad.abs().sum() == 0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_roi_align_in_half_precision_and_under_autocast(stand_in, dtype):
    maps, rois = rand(2, 3, 9, 11), ROIS[:3]
    want = ops.roi_align(maps, rois, 3, 0.5)
    low = maps.to(dtype).requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got = ops.roi_align(low, rois.to(dtype), 3, 0.5)
    got.sum().backward()
    assert got.dtype == low.grad.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=0.02, rtol=0.02)


def test_roi_align_survives_nan_and_inverted_boxes(stand_in):
    rois = torch.tensor([[0, math.nan, 0, 4, 4], [0, 4.0, 4, 1, 1]])
    output = ops.roi_align(torch.ones(1, 1, 6, 6), rois, 2)
    assert output.abs().sum() == 0
