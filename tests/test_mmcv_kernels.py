"""Attention and focal loss of the `mmcv._ext` stand-in against loops; all of it
against a compiled mmcv, where there is one.
"""

import importlib
import importlib.util
import math
import sys

import pytest
import torch
from mmcv_helpers import (
    CONVOLUTIONS,
    ROIS,
    call_stand_in,
    convolution_inputs,
    rand,
    rand_boxes,
    slow_zero_value,
)
from torch.autograd import gradcheck

from mmbackbones.ops import mmcv_ext

ops = pytest.importorskip('mmcv.ops', reason='mmcv (or mmcv-lite) is not installed')


def mmcv_is_compiled():
    spec = importlib.util.find_spec('mmcv._ext')
    return not isinstance(spec.loader, mmcv_ext._StandIn)


@pytest.fixture
def stand_in(monkeypatch):
    return call_stand_in(monkeypatch)


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
