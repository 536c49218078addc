"""Attention and focal-loss kernels of mmcv's `_ext` in plain torch.

Papers: arXiv 2010.04159 (multi-scale deformable attention), 1708.02002 (focal loss).
Interface: https://github.com/open-mmlab/mmcv (Apache-2.0), `mmcv/ops/*.py` of 2.1.0.

Departs from the source:
- runs on the CPU too; any floating dtype, half precision computed in float32;
- the focal loss works on log-sigmoids and so does not saturate at 1e-38;
- `im2col_step` is accepted and not needed: the batch is one step;
- backward recomputes the forward and lets autograd differentiate it.

Legend: N images, H x W map, M heads, D channels of a head, Q queries, L levels,
P points. Outputs that mmcv allocates are written in place, as the compiled op
does; gradients are added to what is there (mmcv hands over zeros).
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    'ms_deform_attn_backward',
    'ms_deform_attn_forward',
    'sigmoid_focal_loss_backward',
    'sigmoid_focal_loss_forward',
]


def kernel(function: Callable) -> Callable:
    """Run as a compiled op would: no graph and no autocast inside."""

    @functools.wraps(function)
    def run(first: Tensor, *args, **kwargs):
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return run


def wide(*tensors: Tensor) -> list[Tensor]:
    """The same tensors, with half precision and integers as float32."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def add_gradients(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad_output: Tensor,
    grads: Sequence[Tensor],
) -> None:
    """Differentiate `function(*inputs)` and add the result to `grads` in place."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in wide(*inputs)]
        output = function(*leaves)
    found = torch.autograd.grad(output, leaves, grad_output.to(output.dtype))
    for target, value in zip(grads, found, strict=True):
        target += value.to(target.dtype)


# -- multi-scale deformable attention -----------------------------------------------


def _attend(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: Sequence[Sequence[int]],
    starts: Sequence[int],
) -> Tensor:
    """Weighted sum of sampled values.

    Args:
        value: `(N, sum of H * W, M, D)`, levels after each other.
        locations: `(N, Q, M, L, P, 2)` x and y, 0 to 1 over the map; zero outside.
        weights: `(N, Q, M, L, P)`.
        shapes: `(H, W)` of each level.
        starts: first row of each level in `value`.

    Returns:
        `(N, Q, M * D)`.
    """
    num_images, num_queries, heads, levels, points, _ = locations.shape
    dim = value.shape[-1]
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (N * M, Q, L, P, 2)
    sampled = []
    for level, ((height, width), start) in enumerate(zip(shapes, starts, strict=True)):
        rows = value[:, start : start + height * width]
        planes = rows.permute(0, 2, 3, 1)  # (N, M, D, H * W)
        planes = planes.reshape(num_images * heads, dim, height, width)
        sampled.append(F.grid_sample(planes, grid[:, :, level], align_corners=False))
    weights = weights.transpose(1, 2)  # (N, M, Q, L, P)
    weights = weights.reshape(-1, 1, num_queries, levels * points)
    output = (torch.cat(sampled, -1) * weights).sum(-1)  # (N * M, D, Q)
    return output.view(num_images, heads * dim, num_queries).transpose(1, 2)


@kernel
def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    im2col_step: int,
) -> Tensor:
    """Shapes as in `_attend`, of which this is the tensor-only form."""
    output = _attend(
        *wide(value, sampling_locations, attention_weights),
        value_spatial_shapes.tolist(),
        value_level_start_index.tolist(),
    )
    return output.to(value.dtype).contiguous()


@kernel
def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    *,
    im2col_step: int,
) -> None:
    """Add to the three gradients."""
    add_gradients(
        functools.partial(
            _attend,
            shapes=value_spatial_shapes.tolist(),
            starts=value_level_start_index.tolist(),
        ),
        (value, sampling_locations, attention_weights),
        grad_output,
        (grad_value, grad_sampling_loc, grad_attn_weight),
    )


# -- focal loss ---------------------------------------------------------------------


def _focal_loss(
    logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float
) -> Tensor:
    """Sigmoid focal loss of every class, `(K, C)`.

    `-alpha (1 - p)^gamma log(p)` at the target class and
    `-(1 - alpha) p^gamma log(1 - p)` elsewhere; all times `weight[target]`.

    Args:
        logits: `(K, C)`.
        target: `(K,)` int64; C (or -1) is background.
        weight: `(C,)` per class, or empty.
        gamma: focusing exponent.
        alpha: share of the positive term.
    """
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    positive = target[:, None] == torch.arange(logits.shape[1], device=logits.device)
    # The power as exp(gamma log q): its gradient is finite at q = 0 too.
    loss = torch.where(
        positive,
        -alpha * torch.exp(gamma * log_q) * log_p,
        (alpha - 1) * torch.exp(gamma * log_p) * log_q,
    )
    return loss * weight[target][:, None] if weight.numel() else loss


@kernel
def sigmoid_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    *,
    gamma: float,
    alpha: float,
) -> None:
    """Fill `output` `(K, C)`; arguments as in `_focal_loss`."""
    output.copy_(_focal_loss(*wide(input), target, weight, gamma, alpha))


@kernel
def sigmoid_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    *,
    gamma: float,
    alpha: float,
) -> None:
    """Add the gradient of the summed loss to `grad_input`."""
    add_gradients(
        lambda logits: _focal_loss(logits, target, weight, gamma, alpha),
        (input,),
        torch.ones_like(input),
        (grad_input,),
    )
