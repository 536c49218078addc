"""Each kernel of the `mmcv._ext` stand-in against loops, through mmcv's wrappers."""

import importlib
import importlib.util
import math
import sys

import pytest
import torch
from torch.autograd import gradcheck

from mmbackbones.ops import mmcv_box_kernels, mmcv_ext

ops = pytest.importorskip('mmcv.ops', reason='mmcv (or mmcv-lite) is not installed')


def rand(*shape, seed=0, low=0.0, high=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=dtype) * (high - low) + low


def rand_boxes(num, seed=0, size=20.0, dtype=torch.float32):
    centre = rand(num, 2, seed=seed, high=size, dtype=dtype)
    half = rand(num, 2, seed=seed + 1, low=0.5, high=size / 4, dtype=dtype)
    return torch.cat((centre - half, centre + half), 1)


def mmcv_is_compiled():
    spec = importlib.util.find_spec('mmcv._ext')
    return not isinstance(spec.loader, mmcv_ext._StandIn)


@pytest.fixture
def stand_in(monkeypatch):
    """Every `mmcv.ops` wrapper calls our kernels, also beside a compiled mmcv."""
    spec = mmcv_ext._StandIn().find_spec('mmcv._ext')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in (
        'deform_conv',
        'focal_loss',
        'modulated_deform_conv',
        'multi_scale_deform_attn',
        'nms',
        'roi_align',
    ):
        # `mmcv.ops.nms` is also a function, so not by attribute.
        monkeypatch.setattr(sys.modules[f'mmcv.ops.{name}'], 'ext_module', module)
    return module


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


ROIS = torch.tensor(
    [
        [0.0, 2.1, 3.3, 13.7, 18.2],
        [1.0, -9.0, -7.0, 6.0, 5.0],  # over the top left corner
        [1.0, 10.0, 12.0, 40.0, 36.0],  # over the other one
        [0.0, 5.0, 5.0, 5.0, 5.0],  # a point
        [0.0, 60.0, 60.0, 70.0, 70.0],  # outside
    ],
    dtype=torch.float64,
)


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


# -- deformable convolution ---------------------------------------------------------


def slow_zero_value(plane, y, x):
    """Bilinear value with zeros outside."""
    y0, x0 = math.floor(y), math.floor(x)
    value = 0.0
    for i in (y0, y0 + 1):
        for j in (x0, x0 + 1):
            if 0 <= i < plane.shape[0] and 0 <= j < plane.shape[1]:
                value += float(plane[i, j]) * (1 - abs(y - i)) * (1 - abs(x - j))
    return value


def slow_deform_conv(
    image, offset, mask, weight, stride, padding, dilation, groups, deform_groups
):
    mask = mask if mask is None else mask.detach()
    image, offset, weight = image.detach(), offset.detach(), weight.detach()
    outputs, (kh, kw) = weight.shape[0], weight.shape[2:]
    result = image.new_zeros(len(image), outputs, *offset.shape[2:])
    in_group, out_group = image.shape[1] // groups, outputs // groups
    for n, o, y, x in torch.cartesian_prod(*map(torch.arange, result.shape)).tolist():
        total = 0.0
        for c in range(in_group):
            channel = o // out_group * in_group + c
            deform = channel // (image.shape[1] // deform_groups)
            for e in range(kh * kw):
                tap = deform * kh * kw + e
                py = y * stride[0] - padding[0] + e // kw * dilation[0]
                px = x * stride[1] - padding[1] + e % kw * dilation[1]
                value = slow_zero_value(
                    image[n, channel],
                    py + float(offset[n, 2 * tap, y, x]),
                    px + float(offset[n, 2 * tap + 1, y, x]),
                )
                factor = 1.0 if mask is None else float(mask[n, tap, y, x])
                total += value * factor * float(weight[o, c, e // kw, e % kw])
        result[n, o, y, x] = total
    return result


# channels, outputs, kernel, stride, padding, dilation, groups, deform_groups
CONVOLUTIONS = [
    (2, 2, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
    (4, 2, (3, 2), (2, 1), (0, 1), (1, 2), 2, 2),
    (4, 4, (1, 1), (1, 2), (0, 0), (1, 1), 4, 2),
]


def convolution_inputs(channels, outputs, kernel, stride, padding, dilation, *groups):
    size = (5, 6)
    out = [
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    taps = groups[1] * kernel[0] * kernel[1]
    tensors = (
        rand(2, channels, *size, seed=1, low=-1),
        rand(2, 2 * taps, *out, seed=2, low=-2, high=2),
        rand(2, taps, *out, seed=3),
        rand(outputs, channels // groups[0], *kernel, seed=4, low=-1),
        rand(outputs, seed=5),
    )
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize('case', CONVOLUTIONS)
def test_deform_conv_equals_loop(stand_in, case):
    image, offset, _, weight, _ = convolution_inputs(*case)
    output = ops.deform_conv2d(image, offset, weight, *case[3:])
    want = slow_deform_conv(image, offset, None, weight, *case[3:])
    torch.testing.assert_close(output, want)
    assert gradcheck(
        lambda *args: ops.deform_conv2d(*args, *case[3:]), (image, offset, weight)
    )


@pytest.mark.parametrize('case', CONVOLUTIONS)
@pytest.mark.parametrize('with_bias', [True, False])
def test_modulated_deform_conv_equals_loop(stand_in, case, with_bias):
    image, offset, mask, weight, bias = convolution_inputs(*case)
    if not with_bias:
        bias = None
    output = ops.modulated_deform_conv2d(image, offset, mask, weight, bias, *case[3:])
    want = slow_deform_conv(image, offset, mask, weight, *case[3:])
    if with_bias:
        want = want + bias[:, None, None]
    torch.testing.assert_close(output, want)
    assert gradcheck(
        lambda *args: ops.modulated_deform_conv2d(*args, *case[3:]),
        (image, offset, mask, weight, bias),
    )


def test_deform_conv_layers_start_as_plain_convolution(stand_in):
    image = torch.rand(2, 4, 6, 7)
    for layer in (
        ops.DeformConv2dPack(4, 3, 3, padding=1),
        ops.ModulatedDeformConv2dPack(4, 3, 3, padding=1),
    ):
        output = layer(image)
        plain = torch.nn.functional.conv2d(image, layer.weight, padding=1)
        scale = 0.5 if 'Modulated' in type(layer).__name__ else 1.0  # sigmoid(0)
        torch.testing.assert_close(output, plain * scale, atol=1e-5, rtol=1e-5)
        output.sum().backward()
        assert all(p.grad is not None for p in layer.parameters())


# -- multi-scale deformable attention -----------------------------------------------


def slow_attention(value, shapes, locations, weights):
    images, _, heads, dim = value.shape
    queries, levels, points = (locations.shape[i] for i in (1, 3, 4))
    output = value.new_zeros(images, queries, heads, dim)
    for n, q, m, level, p in torch.cartesian_prod(
        *map(torch.arange, (images, queries, heads, levels, points))
    ).tolist():
        start = sum(h * w for h, w in shapes[:level])
        height, width = shapes[level]
        x, y = locations[n, q, m, level, p].tolist()
        for d in range(dim):
            plane = value[n, start : start + height * width, m, d]
            sample = slow_zero_value(
                plane.view(height, width), y * height - 0.5, x * width - 0.5
            )
            output[n, q, m, d] += sample * weights[n, q, m, level, p]
    return output.flatten(2)


@pytest.mark.parametrize('images', [0, 1, 2])
@pytest.mark.parametrize(('queries', 'shapes'), [(3, [(4, 3)]), (2, [(3, 5), (1, 2)])])
def test_ms_deform_attn_equals_loop(stand_in, images, queries, shapes):
    heads, dim, points = 2, 3, 2
    value = rand(images, sum(h * w for h, w in shapes), heads, dim, low=-1)
    locations = rand(images, queries, heads, len(shapes), points, 2, low=-0.2, high=1.2)
    weights = rand(images, queries, heads, len(shapes), points, seed=7)
    starts = [sum(h * w for h, w in shapes[:i]) for i in range(len(shapes))]
    tables = torch.tensor(shapes), torch.tensor(starts)

    def attend(value, locations, weights):
        return ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply(
            value, *tables, locations, weights, 64
        )

    inputs = [t.requires_grad_() for t in (value, locations, weights)]
    output = attend(*inputs)
    torch.testing.assert_close(
        output.detach(), slow_attention(value.detach(), shapes, locations, weights)
    )
    if images:
        assert gradcheck(attend, inputs)


# -- focal loss ---------------------------------------------------------------------


def slow_focal_loss(logits, target, weight, gamma, alpha):
    loss = torch.zeros_like(logits)
    for i, row in enumerate(logits.tolist()):
        for c, logit in enumerate(row):
            p = 1 / (1 + math.exp(-logit))
            if target[i] == c:
                loss[i, c] = -alpha * (1 - p) ** gamma * math.log(p)
            else:
                loss[i, c] = -(1 - alpha) * p**gamma * math.log(1 - p)
            if weight is not None:
                loss[i, c] *= weight[target[i]]
    return loss


@pytest.mark.parametrize('num', [0, 5])
@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (0.5, 0.6), (0.0, 0.5)])
@pytest.mark.parametrize('weighted', [False, True])
def test_focal_loss_equals_loop(stand_in, num, gamma, alpha, weighted):
    logits = rand(num, 4, low=-4, high=4).requires_grad_()
    target = torch.arange(num) % (4 if weighted else 5)  # 4 is background
    weight = rand(4, seed=2) if weighted else None
    args = (target, gamma, alpha, weight, 'none')
    want = slow_focal_loss(logits.detach(), target, weight, gamma, alpha)
    torch.testing.assert_close(ops.sigmoid_focal_loss(logits, *args).detach(), want)
    for reduction in ('sum', 'mean') if num else ('sum',):
        args = (target, gamma, alpha, weight, reduction)
        assert gradcheck(lambda x, args=args: ops.sigmoid_focal_loss(x, *args), logits)


def test_focal_loss_of_extreme_logits_is_finite(stand_in):
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    for label in (0, 1):
        loss = ops.SigmoidFocalLoss(0.5, 0.25)(logits, torch.tensor([label]))
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()


# -- a compiled mmcv, where there is one --------------------------------------------


@pytest.mark.skipif(not mmcv_is_compiled(), reason='mmcv is not compiled here')
def test_kernels_equal_the_compiled_ones(stand_in, request):
    compiled = importlib.import_module('mmcv._ext')
    boxes, scores = rand_boxes(300), rand(300, seed=3, dtype=torch.float32)
    maps = rand(2, 3, 9, 11, low=-1, dtype=torch.float32)
    rois = ROIS[:3].float()
    image, offset, mask, weight, bias = (
        t.detach().float() for t in convolution_inputs(*CONVOLUTIONS[1])
    )

    def results():
        yield ops.nms(boxes, scores, 0.4)[1]
        for method in ('naive', 'linear', 'gaussian'):
            yield from ops.soft_nms(boxes, scores, 0.3, 0.5, 1e-2, method)
        for mode in ('avg', 'max'):
            for ratio in (0, 2):
                leaf = maps.clone().requires_grad_()
                pooled = ops.roi_align(leaf, rois, (3, 2), 0.5, ratio, mode)
                (pooled * pooled).sum().backward()
                yield from (pooled.detach(), leaf.grad)
        for function, inputs in (
            (ops.deform_conv2d, (image, offset, weight)),
            (ops.modulated_deform_conv2d, (image, offset, mask, weight, bias)),
        ):
            leaves = [t.clone().requires_grad_() for t in inputs]
            output = function(*leaves, *CONVOLUTIONS[1][3:])
            (output * output).sum().backward()
            yield from (output.detach(), *(leaf.grad for leaf in leaves))

    ours = list(results())
    for name in ('deform_conv', 'modulated_deform_conv', 'nms', 'roi_align'):
        sys.modules[f'mmcv.ops.{name}'].ext_module = compiled
    torch.testing.assert_close(ours, list(results()), atol=1e-4, rtol=1e-4)
