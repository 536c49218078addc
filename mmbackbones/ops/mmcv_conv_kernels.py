"""Deformable-convolution kernels of mmcv's `_ext` in plain torch.

Papers: arXiv 1703.06211 and 1811.11168.
Interface: https://github.com/open-mmlab/mmcv (Apache-2.0), `mmcv/ops/deform_conv.py`
and `mmcv/ops/modulated_deform_conv.py` of 2.1.0.

Departs from the source:
- any floating dtype; half precision is computed in float32;
- `im2col_step` is accepted and not needed: the batch is one step;
- backward recomputes the forward and lets autograd differentiate it.

Legend: N images, C channels, H x W map, G deformable groups, E kernel elements,
Y x X output positions. The scratch buffers `columns` and `ones` are not used.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbackbones.ops.mmcv_kernels import add_gradients, kernel, wide

__all__ = [
    'deform_conv_backward_input',
    'deform_conv_backward_parameters',
    'deform_conv_forward',
    'modulated_deform_conv_backward',
    'modulated_deform_conv_forward',
]


def _convolve(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    *,
    stride_hw: tuple[int, int],
    padding_hw: tuple[int, int],
    dilation_hw: tuple[int, int],
    groups: int,
    deform_groups: int,
) -> Tensor:
    """Sample where the offsets point, then convolve.

    Args:
        input: `(N, C, H, W)`; zero outside.
        offset: `(N, G * E * 2, Y, X)` in pixels, y before x.
        weight: `(C_out, C / groups, kh, kw)`, kh * kw = E.
        mask: `(N, G * E, Y, X)` factors, or None.
        stride_hw: pixels between outputs.
        padding_hw: zeros on each side.
        dilation_hw: pixels between kernel elements.
        groups: of the convolution.
        deform_groups: G, channel groups that share offsets.

    Returns:
        `(N, C_out, Y, X)`.
    """
    num_images, map_hw, kernel_hw = len(input), input.shape[2:], weight.shape[2:]
    out_hw, elements = offset.shape[2:], kernel_hw[0] * kernel_hw[1]
    base = []  # undeformed sampling positions, broadcastable to (E, Y, X)
    for axis in range(2):
        out = torch.arange(out_hw[axis], device=input.device) * stride_hw[axis]
        tap = torch.arange(kernel_hw[axis], device=input.device) * dilation_hw[axis]
        base.append((tap[:, None] + out - padding_hw[axis]).to(input.dtype))
    base_y = base[0].repeat_interleave(kernel_hw[1], 0)[:, :, None]
    base_x = base[1].repeat(kernel_hw[0], 1)[:, None, :]
    offset = offset.reshape(num_images * deform_groups, elements, 2, *out_hw)
    y, x = offset[:, :, 0] + base_y, offset[:, :, 1] + base_x
    # Pixel centres of `grid_sample` without aligned corners are at (2 i + 1) / n - 1.
    grid = torch.stack(((2 * x + 1) / map_hw[1] - 1, (2 * y + 1) / map_hw[0] - 1), -1)
    columns = F.grid_sample(
        input.reshape(num_images * deform_groups, -1, *map_hw),
        grid.flatten(1, 2),  # (N * G, E * Y, X, 2)
        align_corners=False,
    )
    columns = columns.view(num_images, deform_groups, -1, elements, *out_hw)
    if mask is not None:
        columns = columns * mask.view(num_images, deform_groups, 1, elements, *out_hw)
    columns = columns.reshape(num_images, groups, -1, out_hw[0] * out_hw[1])
    rows = weight.reshape(groups, weight.shape[0] // groups, -1)
    return (rows @ columns).view(num_images, -1, *out_hw)


def _deform_conv(
    *,
    kH: int,
    kW: int,
    dH: int,
    dW: int,
    padH: int,
    padW: int,
    dilationH: int,
    dilationW: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> Callable[..., Tensor]:
    """`_convolve` with the geometry in mmcv's names for the plain form."""
    return functools.partial(
        _convolve,
        stride_hw=(dH, dW),
        padding_hw=(padH, padW),
        dilation_hw=(dilationH, dilationW),
        groups=group,
        deform_groups=deformable_group,
    )


@kernel
def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    **geometry: int,
) -> None:
    """Fill `output`; shapes as in `_convolve`, geometry as in `_deform_conv`."""
    output.copy_(_deform_conv(**geometry)(*wide(input, offset, weight)))


@kernel
def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Add to `grad_input` and `grad_offset`."""
    convolve, (weight,) = _deform_conv(**geometry), wide(weight)
    add_gradients(
        lambda image, shift: convolve(image, shift, weight),
        (input, offset),
        grad_output,
        (grad_input, grad_offset),
    )


@kernel
def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    *,
    scale: float,
    **geometry: int,
) -> None:
    """Add `scale` times the gradient to `grad_weight`."""
    convolve, (input, offset) = _deform_conv(**geometry), wide(input, offset)
    add_gradients(
        lambda weight: convolve(input, offset, weight),
        (torch.zeros_like(grad_weight),),  # the op is linear in its weight
        grad_output * scale,
        (grad_weight,),
    )


def _modulated_deform_conv(
    *,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> Callable[..., Tensor]:
    """`_convolve` with the geometry in mmcv's names for the modulated form."""
    return functools.partial(
        _convolve,
        stride_hw=(stride_h, stride_w),
        padding_hw=(pad_h, pad_w),
        dilation_hw=(dilation_h, dilation_w),
        groups=group,
        deform_groups=deformable_group,
    )


@kernel
def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Fill `output`; `bias` is `(C_out,)`, or empty without bias."""
    result = _modulated_deform_conv(**geometry)(*wide(input, offset, weight, mask))
    if geometry['with_bias']:
        result = result + bias[:, None, None]
    output.copy_(result)


@kernel
def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    **geometry: int,
) -> None:
    """Add to the five gradients (four without bias)."""
    add_gradients(
        _modulated_deform_conv(**geometry),
        (input, offset, weight, mask),
        grad_output,
        (grad_input, grad_offset, grad_weight, grad_mask),
    )
    if geometry['with_bias']:
        grad_bias += grad_output.sum((0, 2, 3))
