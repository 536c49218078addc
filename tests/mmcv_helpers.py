"""The `mmcv._ext` stand-in behind mmcv's wrappers, and inputs of its kernels."""

import importlib.util
import math
import sys

import torch

from mmbackbones.ops import mmcv_ext


def rand(*shape, seed=0, low=0.0, high=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=dtype) * (high - low) + low


def rand_boxes(num, seed=0, size=20.0, dtype=torch.float32):
    centre = rand(num, 2, seed=seed, high=size, dtype=dtype)
    half = rand(num, 2, seed=seed + 1, low=0.5, high=size / 4, dtype=dtype)
    return torch.cat((centre - half, centre + half), 1)


def call_stand_in(monkeypatch):
    """Gives the stand-in; all wrappers call it, also beside a compiled mmcv."""
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


def slow_zero_value(plane, y, x):
    """Bilinear value with zeros outside."""
    y0, x0 = math.floor(y), math.floor(x)
    value = 0.0
    for i in (y0, y0 + 1):
        for j in (x0, x0 + 1):
            if 0 <= i < plane.shape[0] and 0 <= j < plane.shape[1]:
                value += float(plane[i, j]) * (1 - abs(y - i)) * (1 - abs(x - j))
    return value


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
