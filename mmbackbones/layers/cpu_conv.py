"""Convolutions with their activation as one oneDNN operator, for inference on a CPU.

PyTorch leaves 1x1 and small convolutions of one image on one thread to a matrix product
with a copy before it, and runs each activation as a pass of its own. These are the
operators that `torch.compile` puts in their place when it freezes a model.
"""

import torch
from torch import Tensor, nn

from mmbackbones.layers.conv import ConvBNAct, SummedConv
from mmbackbones.layers.fold import Bound
from mmbackbones.layers.hg_stem import StemPool
from mmbackbones.layers.reparam import ConvNorm, RepVGGBlock

__all__ = ['FusedConv2d', 'FusedPool', 'FusedSum', 'fuse_for_cpu']

_FLOAT_MAX = torch.finfo(torch.float32).max
_POST_OPS = {nn.Identity: 'none', nn.ReLU: 'relu', nn.SiLU: 'swish'}


def _has_fused_convolution() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, '_convolution_pointwise_'
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

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """`(N, in_channels, H, W)` to `(N, out_channels, H', W')`.

        What is `added` before the activation has the latter shape and is overwritten.
        """
        if (
            torch.is_grad_enabled()
            or x.device.type != 'cpu'
            or not x.dtype == self.weight.dtype == torch.float32
            or torch.is_autocast_enabled('cpu')
        ):
            y = super().forward(x)
            return self.act(y if added is None else y + added)
        # Maps in another order are several times slower here.
        x = x.contiguous(memory_format=torch.channels_last)
        options = (
            self.weight,
            self.bias,
            list(self.padding),
            list(self.stride),
            list(self.dilation),
            self.groups,
        )
        if added is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, *options, self._attr, self._scalars, ''
            )
        # Behind a sum torch fuses no activation but ReLU.
        added = torch.ops.mkldnn._convolution_pointwise_.binary(
            added.contiguous(memory_format=torch.channels_last),
            x,
            *options,
            *('add', 1.0, None, [], None),
        )
        return self.act(added)


class FusedSum(nn.Module):
    """`SummedConv` as one operator, which overwrites what it adds to.

    Args:
        summed: whose parameters it takes over, under their names.
    """

    def __init__(self, summed: SummedConv) -> None:
        super().__init__()
        self.conv = FusedConv2d(summed.conv, summed.act)

    def forward(self, x: Tensor, added: Tensor) -> Tensor:
        """`(N, in, H, W)` and what is added, `(N, out, H', W')`, to the latter."""
        return self.conv(x, added)


class FusedPool(StemPool):
    """`StemPool` by comparing neighbours, which is vectorised, in the given memory.

    Memory that is new costs more here than the comparisons.
    """

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        """Both maps are overwritten. Returns `(N, C, H, W)`."""
        if torch.is_grad_enabled():
            return super().forward(x, padded)
        rows = padded[..., :-1, :-1]
        torch.maximum(x[..., :-1, :], x[..., 1:, :], out=rows[..., :-1, :])
        torch.clamp(x[..., -1:, :], min=self.edge, out=rows[..., -1:, :])
        torch.maximum(rows[..., :-1], rows[..., 1:], out=x[..., :-1])
        torch.clamp(rows[..., -1:], min=self.edge, out=x[..., -1:])
        return x


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
            if type(child) is SummedConv and _can_fuse(child):
                setattr(module, name, FusedSum(child))
            if type(child) is StemPool:
                setattr(module, name, FusedPool(child.edge))
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
    return isinstance(between, nn.Identity) and _can_fuse(module)


def _can_fuse(module: nn.Module) -> bool:
    """Whether oneDNN has what `module.conv` and `module.act` are."""
    return (
        type(module.conv) is nn.Conv2d
        and _is_numeric(module.conv)
        and _post_op(module.act) is not None
    )


def _is_numeric(conv: nn.Conv2d) -> bool:
    """Whether its padding is a number of zeros."""
    return conv.padding_mode == 'zeros' and not isinstance(conv.padding, str)
