"""Convolutional blocks that turn into fewer convolutions for inference.

RepVGG: Making VGG-style ConvNets Great Again, arXiv 2101.03697; the ELAN layout is
GELAN's, YOLOv9, arXiv 2402.13616.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/hybrid_encoder.py
(Apache-2.0).
Departs from the source:
- a folded convolution keeps its name; upstream renames it to `conv_bn_fused`;
- for inference the first projection of `RepNCSPELAN` can be split, by its outputs and
  by the two maps that it reads (`split_projection`);
- expansions and alternatives that no configuration uses are gone.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mmbackbones.layers.conv import split_inputs

__all__ = [
    'CSPRepLayer',
    'ConvNorm',
    'RepNCSPELAN',
    'RepVGGBlock',
    'SCDown',
    'UpsampledProjection',
    'conv_norm',
    'switch_to_deploy',
]


def switch_to_deploy(module: nn.Module) -> None:
    """Re-parameterise, in place, every descendant that knows how to.

    A block with a `switch_to_deploy` method decides for all that is inside it.
    """
    for child in module.children():
        if hasattr(child, 'switch_to_deploy'):
            child.switch_to_deploy()
        else:
            switch_to_deploy(child)


def conv_norm(in_channels: int, out_channels: int) -> nn.Sequential:
    """Projection of a map: 1x1 `conv` and `norm`, which stay as they are in deploy."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, 1, bias=False),
            norm=nn.BatchNorm2d(out_channels),
        )
    )


class ConvNorm(nn.Module):
    """Convolution without bias, batch-norm and activation; padded to keep the size.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd.
        stride: 1 or 2.
        groups: of the convolution.
        activation: class of the activation, None for none.
        norm: class of the normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] | None = None,
        norm: type[nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        )
        self.norm = norm(out_channels)
        self.act = nn.Identity() if activation is None else activation()

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in, H, W)` to `(N, out, H / stride, W / stride)`, rounded up."""
        return self.act(self.norm(self.conv(x)))

    def switch_to_deploy(self) -> None:
        """Fold the batch-norm into the convolution, in place."""
        if not isinstance(self.norm, nn.Identity):
            self.conv = fuse_conv_bn_eval(self.conv.eval(), self.norm.eval())
            self.norm = nn.Identity()


class RepVGGBlock(nn.Module):
    """Sum of a 3x3 and a 1x1 conv-norm, then SiLU; deployed, one 3x3 `conv`.

    Args:
        channels: of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3)
        self.conv2 = ConvNorm(channels, channels, 1)
        self.act = nn.SiLU()
        self.conv = None

    def forward(self, x: Tensor) -> Tensor:
        """`(N, channels, H, W)` to the same shape."""
        if self.conv is None:
            return self.act(self.conv1(x) + self.conv2(x))
        return self.act(self.conv(x))

    def switch_to_deploy(self) -> None:
        """Fold both branches and their batch-norms into one kernel, in place."""
        if self.conv is None:
            self.conv1.switch_to_deploy()
            self.conv2.switch_to_deploy()
            self.conv, pointwise = self.conv1.conv, self.conv2.conv
            with torch.no_grad():
                self.conv.weight += F.pad(pointwise.weight, (1, 1, 1, 1))
                self.conv.bias += pointwise.bias
            self.conv1 = self.conv2 = None


class CSPRepLayer(nn.Module):
    """Two 1x1 projections, RepVGG blocks on the first, and their sum.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        num_blocks: RepVGG blocks.
        mid_channels: of both projections; where they are not those of the output,
            the sum is projected, too. None: `out_channels`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        mid_channels: int | None = None,
    ) -> None:
        super().__init__()
        width = out_channels if mid_channels is None else mid_channels
        self.conv1 = ConvNorm(in_channels, width, 1, activation=nn.SiLU)
        self.conv2 = ConvNorm(in_channels, width, 1, activation=nn.SiLU)
        self.bottlenecks = nn.Sequential(
            *(RepVGGBlock(width) for _ in range(num_blocks))
        )
        self.conv3 = (
            nn.Identity()
            if width == out_channels
            else ConvNorm(width, out_channels, 1, activation=nn.SiLU)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_channels, H, W)` to `(N, out_channels, H, W)`."""
        return self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x))


class UpsampledProjection(nn.Module):
    """1x1 projection of a coarse map, enlarged, beside a fine one; before enlarging.

    A 1x1 convolution and nearest upsampling commute, so that the coarse half of the
    work is done on a quarter of the positions, and nothing is concatenated.

    Args:
        conv: 1x1, of the concatenation, coarse channels first.
        act: what follows.
        coarse_channels: of the coarse map.
    """

    def __init__(self, conv: nn.Conv2d, act: nn.Module, coarse_channels: int) -> None:
        super().__init__()
        self.coarse, self.fine = split_inputs(conv, act, coarse_channels)

    def forward(self, maps: tuple[Tensor, Tensor]) -> Tensor:
        """Coarse `(N, C, h, w)` and fine `(N, C', H, W)` to `(N, out, H, W)`."""
        coarse, fine = maps
        upsampled = F.interpolate(self.coarse(coarse), fine.shape[-2:])  # nearest
        return self.fine(fine, upsampled)


class RepNCSPELAN(nn.Module):
    """ELAN block: both halves and two successive CSP branches, concatenated.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        mid_channels: after the first projection; each half has half of them.
        branch_channels: of each branch.
        num_blocks: RepVGG blocks in each branch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        branch_channels: int,
        num_blocks: int,
    ) -> None:
        super().__init__()
        half = mid_channels // 2
        self.cv1 = ConvNorm(in_channels, mid_channels, 1, activation=nn.SiLU)
        self.cv2 = self._branch(half, branch_channels, num_blocks)
        self.cv3 = self._branch(branch_channels, branch_channels, num_blocks)
        self.cv4 = ConvNorm(
            mid_channels + 2 * branch_channels, out_channels, 1, activation=nn.SiLU
        )

    @staticmethod
    def _branch(in_channels: int, out_channels: int, num_blocks: int) -> nn.Sequential:
        return nn.Sequential(
            CSPRepLayer(in_channels, out_channels, num_blocks),
            ConvNorm(out_channels, out_channels, 3, activation=nn.SiLU),
        )

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """`(N, in_channels, H, W)` to `(N, out_channels, H, W)`.

        After `split_projection` for a coarse map, `x` is that and a fine one.
        """
        if isinstance(self.cv1, nn.ModuleList):
            first, second = (half(x) for half in self.cv1)
        else:
            first, second = self.cv1(x).chunk(2, 1)
        branch1 = self.cv2(second)
        branch2 = self.cv3(branch1)
        return self.cv4(torch.cat((first, second, branch1, branch2), 1))

    def split_projection(self, coarse_channels: int = 0) -> None:
        """Split the first projection, in place; the same numbers, training is over.

        Each half of its outputs comes from a convolution of its own: runtimes that
        keep channels in blocks do not have to cut them.

        Args:
            coarse_channels: 0, or how many of the channels that come in are of a map
                that was enlarged. The block then takes it as it was before, and the
                other map, as a pair.
        """
        if isinstance(self.cv1, nn.ModuleList):
            return
        conv, act = self.cv1.conv, self.cv1.act
        halves = []
        for weight, bias in zip(
            conv.weight.detach().chunk(2), conv.bias.detach().chunk(2), strict=True
        ):
            half = nn.Conv2d(conv.in_channels, len(weight), 1)
            half.weight = nn.Parameter(weight.clone())
            half.bias = nn.Parameter(bias.clone())
            halves.append(
                UpsampledProjection(half, act, coarse_channels)
                if coarse_channels
                else nn.Sequential(OrderedDict(conv=half, act=act))
            )
        self.cv1 = nn.ModuleList(halves)


class SCDown(nn.Module):
    """Halve a map: 1x1 conv-norm, then depthwise 3x3 conv-norm of stride 2.

    Args:
        channels: of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = ConvNorm(channels, channels, 1)
        self.cv2 = ConvNorm(channels, channels, 3, stride=2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to `(N, C, H / 2, W / 2)`, rounded up."""
        return self.cv2(self.cv1(x))
