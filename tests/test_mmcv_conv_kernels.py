"""Deformable convolutions of the `mmcv._ext` stand-in against loops."""

import pytest
import torch
from mmcv_helpers import (
    CONVOLUTIONS,
    call_stand_in,
    convolution_inputs,
    slow_zero_value,
)
from torch.autograd import gradcheck

ops = pytest.importorskip('mmcv.ops', reason='mmcv (or mmcv-lite) is not installed')


@pytest.fixture
def stand_in(monkeypatch):
    return call_stand_in(monkeypatch)


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
