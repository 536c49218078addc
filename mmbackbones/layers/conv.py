"""Convolution, batch normalisation and ReLU under the names of HGNetV2.

Upstream: https://github.com/PaddlePaddle/PaddleClas
ppcls/arch/backbone/legendary_models/pp_hgnet_v2.py (Apache-2.0).
Departs from the source:
- batch normalisation can be folded into the convolution (`fuse_conv_bn`). The
  learnable affine stays a layer of its own: after a ReLU it folds only into a
  convolution without zero padding.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

__all__ = ['ConvBNAct', 'LearnableAffine', 'SummedConv', 'fuse_conv_bn', 'split_inputs']


class LearnableAffine(nn.Module):
    """`scale * x + bias` with one scalar each for a whole map ("LAB")."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor to one of the same shape and dtype."""
        # The scalars stay in fp32 under autocast: their gradient sums a whole map.
        return (x * self.scale).add_(self.bias).to(x.dtype)


class ConvBNAct(nn.Module):
    """Convolution without bias, batch normalisation, ReLU, learnable affine.

    Padding is `(kernel_size - 1) // 2`, so an even kernel at stride 1 loses a row
    and a column; the caller pads.

    Args:
        in_channels: of the input map.
        out_channels: of the output map.
        kernel_size: side of the square kernel.
        stride: of the convolution.
        groups: of the convolution.
        use_act: whether a ReLU follows.
        use_lab: whether a `LearnableAffine` follows the ReLU; without a ReLU there
            is none.
        norm: class of the normalisation, called with `out_channels`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        use_act: bool = True,
        use_lab: bool = False,
        norm: type[nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=(kernel_size - 1) // 2,
            groups=groups,
            bias=False,
        )
        self.bn = norm(out_channels)
        self.act = nn.ReLU(inplace=True) if use_act else nn.Identity()
        self.lab = LearnableAffine() if use_act and use_lab else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, H', W')`."""
        return self.lab(self.act(self.bn(self.conv(x))))


def fuse_conv_bn(model: nn.Module) -> nn.Module:
    """Fold the batch normalisation of every `ConvBNAct` into its convolution.

    In place and for evaluation only: running statistics become constants. Fusing a
    fused model changes nothing.

    Returns:
        `model` itself.
    """
    for module in model.modules():
        if isinstance(module, ConvBNAct) and not isinstance(module.bn, nn.Identity):
            conv, bn = module.conv, module.bn
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight,
                conv.bias,
                bn.running_mean,
                bn.running_var,
                bn.eps,
                bn.weight,
                bn.bias,
            )
            module.bn = nn.Identity()
    return model


class SummedConv(nn.Module):
    """A convolution, the sum with another map, and an activation.

    Args:
        conv: the convolution.
        act: the activation.
    """

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.act = conv, act

    def forward(self, x: Tensor, added: Tensor) -> Tensor:
        """`(N, in, H, W)` and what is added, `(N, out, H', W')`, to the latter."""
        return self.act(self.conv(x) + added)


@torch.no_grad()
def split_inputs(
    conv: nn.Conv2d, act: nn.Module, num_first: int
) -> tuple[nn.Conv2d, SummedConv]:
    """A convolution of two concatenated maps as the sum of one of each.

    Args:
        conv: not grouped, with a bias, padded by zeros.
        act: what follows.
        num_first: channels of the first map.

    Returns:
        A convolution of the first map, without a bias, and one of the second that
        adds the first's result.
    """
    parts = []
    for weight in conv.weight.split((num_first, conv.in_channels - num_first), 1):
        part = nn.Conv2d(
            weight.shape[1],
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            bias=False,
        )
        part.weight = nn.Parameter(weight.clone())
        parts.append(part)
    first, second = parts
    second.bias = conv.bias
    return first, SummedConv(second, act)
