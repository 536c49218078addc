"""Convolutions with their activation as one oneDNN operator, for inference on a CPU.

PyTorch leaves 1x1 and small convolutions of one image on one thread to a matrix product
with a copy before it, and runs each activation as a pass of its own. These are the
operators that `torch.compile` puts in their place when it freezes a model.
"""

import torch
from torch import Tensor, nn

from mmbackbones.layers.conv import ConvBNAct
from mmbackbones.layers.fold import Bound
from mmbackbones.layers.reparam import ConvNorm, RepVGGBlock

__all__ = ['FusedConv2d', 'PairwiseMaxPool2x2', 'fuse_for_cpu']

_FLOAT_MAX = torch.finfo(torch.float32).max
_POST_OPS = {nn.Identity: 'none', nn.ReLU: 'relu', nn.SiLU: 'swish'}


def _has_fused_convolution() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, '_convolution_pointwise'
    )


def _post_op(act: nn.Module) -> tuple[str, list[float]] | None:
    """Name in oneDNN and scalars of an activation, None where it has none."""
    if isinstance(act, Bound):
        low, high = -_FLOAT_MAX, _FLOAT_MAX
        return 'hardtanh', [low, act.value] if act.is_upper else [act.value, high]
    name = _POST_OPS.get(type(act))
    return None if name is None else (name, [])


class FusedConv2d(nn.Conv2d):
    """A convolution with its activation; keeps the parameters' names.

    In evaluation of single-precision maps on a CPU it is one operator. Elsewhere, and
    where gradients are wanted, it is the convolution and then the activation.

    Args:
        conv: whose parameters it takes over; padded by zeros.
        act: ReLU, SiLU, `Bound` or Identity.
    """

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        with torch.device('meta'):
            super().__init__(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
                bias=conv.bias is not None,
            )
        self.weight, self.bias = conv.weight, conv.bias
        self.act = act
        self._attr, self._scalars = _post_op(act)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_channels, H, W)` to `(N, out_channels, H', W')`."""
        if (
            torch.is_grad_enabled()
            or x.device.type != 'cpu'
            or not x.dtype == self.weight.dtype == torch.float32
            or torch.is_autocast_enabled('cpu')
        ):
            return self.act(super().forward(x))
        return torch.ops.mkldnn._convolution_pointwise(
            # Maps in another order are several times slower here.
            x.contiguous(memory_format=torch.channels_last),
            self.weight,
            self.bias,
            list(self.padding),
            list(self.stride),
            list(self.dilation),
            self.groups,
            self._attr,
            self._scalars,
            '',
        )


class PairwiseMaxPool2x2(nn.Module):
    """2x2 pooling of stride 1 by comparing neighbours, which is vectorised."""

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to `(N, C, H - 1, W - 1)`."""
        rows = torch.maximum(x[..., :-1, :], x[..., 1:, :])
        return torch.maximum(rows[..., :-1], rows[..., 1:])


def fuse_for_cpu(model: nn.Module) -> nn.Module:
    """Replace convolutions and what follows them, in place, by fused ones.

    The same numbers within rounding; names of parameters stay. Fusing twice changes
    nothing, and neither does it where torch was built without oneDNN.

    Args:
        model: after `fold_for_inference`, channels last.

    Returns:
        `model`.
    """
    if not _has_fused_convolution():
        return model
    for module in list(model.modules()):
        if isinstance(module, FusedConv2d):
            continue
        if _acts_on_convolution(module):
            module.conv = FusedConv2d(module.conv, module.act)
            module.act = nn.Identity()
        for name, child in module.named_children():
            if type(child) is nn.Conv2d and _is_numeric(child):
                setattr(module, name, FusedConv2d(child, nn.Identity()))
            if type(child) is nn.MaxPool2d and _is_pairwise(child):
                setattr(module, name, PairwiseMaxPool2x2())
    return model


def _acts_on_convolution(module: nn.Module) -> bool:
    """Whether `module.act` is applied to what `module.conv` gives."""
    if isinstance(module, ConvBNAct):
        between = module.bn
    elif isinstance(module, ConvNorm):
        between = module.norm
    elif isinstance(module, RepVGGBlock):
        between = nn.Identity()
    elif isinstance(module, nn.Sequential) and list(module._modules) == ['conv', 'act']:
        between = nn.Identity()
    else:
        return False
    return (
        isinstance(between, nn.Identity)
        and type(module.conv) is nn.Conv2d
        and _is_numeric(module.conv)
        and _post_op(module.act) is not None
    )


def _is_numeric(conv: nn.Conv2d) -> bool:
    """Whether its padding is a number of zeros."""
    return conv.padding_mode == 'zeros' and not isinstance(conv.padding, str)


def _is_pairwise(pool: nn.MaxPool2d) -> bool:
    options = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    return options == (2, 1, 0, 1) and not (pool.ceil_mode or pool.return_indices)
