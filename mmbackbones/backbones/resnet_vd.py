"""ResNet-vd, the backbone of RT-DETR in its sizes 18, 34, 50 and 101.

Bag of Tricks for Image Classification with Convolutional Neural Networks, arXiv
1812.01187 (there ResNet-D); the weights' distillation is SSLD, arXiv 2103.05959.
Upstream: https://github.com/lyuwenyu/RT-DETR
rtdetr_pytorch/src/nn/backbone/presnet.py (Apache-2.0), whose names are kept.
MMDetection's ResNetV1d has no projection on the first shortcut of the 18 and 34
layers deep networks, so their published weights do not fit it.
Departs from the source:
- only variant d, which all published weights are of;
- frozen parts also keep their batch-norm statistics;
- `drop_path_rate` is new.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch.nn.functional as F
from torch import Tensor, nn

from mmbackbones.backbones.base import BaseBackbone
from mmbackbones.layers.drop import DropPath, linear_drop_path_rates
from mmbackbones.layers.norm import FrozenBatchNorm2d
from mmbackbones.layers.reparam import ConvNorm
from mmbackbones.registry import MODELS

__all__ = ['ResNetVD']


@dataclass(frozen=True)
class ArchSpec:
    """Blocks of each stage, and whether they are bottlenecks."""

    depths: tuple[int, int, int, int]
    bottleneck: bool


_ARCHES = {
    'r18': ArchSpec((2, 2, 2, 2), bottleneck=False),
    'r34': ArchSpec((3, 4, 6, 3), bottleneck=False),
    'r50': ArchSpec((3, 4, 6, 3), bottleneck=True),
    'r101': ArchSpec((3, 4, 23, 3), bottleneck=True),
}
_STEM_CHANNELS = (32, 32, 64)
_WIDTHS = (64, 128, 256, 512)
_EXPANSION = 4  # of a bottleneck


def _shortcut(
    in_channels: int, out_channels: int, stride: int, norm: type[nn.Module]
) -> nn.Module:
    """Projection of the input; pixels are averaged, not skipped, where it shrinks."""
    conv = ConvNorm(in_channels, out_channels, 1, norm=norm)
    if stride == 1:
        return conv
    pool = nn.AvgPool2d(2, ceil_mode=True)
    return nn.Sequential(OrderedDict(pool=pool, conv=conv))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1, beside a shortcut; then ReLU.

    Args:
        in_channels: of the input.
        width: of the 3x3 convolutions.
        bottleneck: three convolutions, with four times `width` at the end.
        stride: of the first 3x3 convolution.
        is_first: of its stage, and so with a projection on the shortcut.
        drop_path_rate: of the convolutions.
        norm: class of the normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        bottleneck: bool,
        stride: int,
        is_first: bool,
        drop_path_rate: float,
        norm: type[nn.Module],
    ) -> None:
        super().__init__()
        conv = partial(ConvNorm, norm=norm)
        relu = partial(nn.ReLU, inplace=True)
        out_channels = width * (_EXPANSION if bottleneck else 1)
        if is_first:
            self.short = _shortcut(in_channels, out_channels, stride, norm)
        else:
            self.short = nn.Identity()
        if bottleneck:
            self.branch2a = conv(in_channels, width, 1, activation=relu)
            self.branch2b = conv(width, width, 3, stride, activation=relu)
            self.branch2c = conv(width, out_channels, 1)
        else:
            self.branch2a = conv(in_channels, width, 3, stride, activation=relu)
            self.branch2b = conv(width, width, 3)
            self.branch2c = nn.Identity()
        self.drop_path = DropPath(drop_path_rate)
        self.act = relu()

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_channels, H, W)` to `(N, out, H / stride, W / stride)`."""
        y = self.branch2c(self.branch2b(self.branch2a(x)))
        return self.act(self.short(x) + self.drop_path(y))


class ResidualStage(nn.Module):
    """Blocks in series; the first of them may shrink the map."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        bottleneck: bool,
        stride: int,
        drop_path_rates: Sequence[float],
        norm: type[nn.Module],
    ) -> None:
        super().__init__()
        out_channels = width * (_EXPANSION if bottleneck else 1)
        self.blocks = nn.ModuleList(
            ResidualBlock(
                out_channels if j else in_channels,
                width,
                bottleneck=bottleneck,
                stride=1 if j else stride,
                is_first=j == 0,
                drop_path_rate=rate,
                norm=norm,
            )
            for j, rate in enumerate(drop_path_rates)
        )


@MODELS.register_module()
class ResNetVD(BaseBackbone):
    """ResNet-vd backbone: any image size, maps of stride 4, 8, 16 and 32.

    Args:
        arch: `'r18'`, `'r34'`, `'r50'` or `'r101'`, in either case.
        in_channels: channels of the image.
        out_indices: stages whose maps come out, see `BaseBackbone`.
        frozen_stages: -1 none, 0 the stem, k the stem and the first k stages.
        frozen_norm: build every batch norm of the whole network as a constant
            (`FrozenBatchNorm2d`), as RT-DETR does from R50 on.
        norm_eval: keep batch norms on their running statistics; their affine part
            still learns.
        drop_path_rate: of the last block; grows linearly from 0 over all blocks.
        with_cp: recompute blocks in the backward pass to save memory.
        init_cfg: mmengine's; None draws convolutions from Kaiming's normal
            distribution (fan out) when `init_weights` is called.

    Raises:
        ValueError: an argument is none of the above, with the choices.
    """

    arch_settings = _ARCHES

    def __init__(
        self,
        arch: str = 'r50',
        *,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = (1, 2, 3),
        frozen_stages: int = -1,
        frozen_norm: bool = False,
        norm_eval: bool = False,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if str(arch).lower() not in self.arch_settings:
            raise ValueError(
                f'arch is {arch!r}; it is one of {list(self.arch_settings)}'
            )
        spec = self.arch_settings[str(arch).lower()]
        expansion = _EXPANSION if spec.bottleneck else 1
        stage_channels = [width * expansion for width in _WIDTHS]
        super().__init__(
            in_channels=in_channels,
            stage_channels=stage_channels,
            stage_strides=(4, 8, 16, 32),
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=with_cp,
            init_cfg=dict(type='Kaiming', layer='Conv2d', mode='fan_out')
            if init_cfg is None
            else init_cfg,
        )
        norm = FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d
        self.conv1 = self._stem(in_channels, norm)
        self.res_layers = nn.ModuleList(
            ResidualStage(
                (_STEM_CHANNELS[-1], *stage_channels)[i],
                width,
                bottleneck=spec.bottleneck,
                stride=2 if i else 1,
                drop_path_rates=rates,
                norm=norm,
            )
            for i, (width, rates) in enumerate(
                zip(
                    _WIDTHS,
                    linear_drop_path_rates(drop_path_rate, spec.depths),
                    strict=True,
                )
            )
        )
        self._freeze()

    @staticmethod
    def _stem(in_channels: int, norm: type[nn.Module]) -> nn.Sequential:
        """Three 3x3 convolutions, the first of stride 2; a pooling follows."""
        convs = OrderedDict()
        for i, width in enumerate(_STEM_CHANNELS):
            convs[f'conv1_{i + 1}'] = ConvNorm(
                (in_channels, *_STEM_CHANNELS)[i],
                width,
                3,
                stride=1 if i else 2,
                activation=partial(nn.ReLU, inplace=True),
                norm=norm,
            )
        return nn.Sequential(convs)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps `(N, C_i, ceil(H / s_i), ceil(W / s_i))`, fine to coarse.

        Args:
            x: `(N, in_channels, H, W)`, any H and W.
        """
        self._check_input(x)
        x = F.max_pool2d(self.conv1(x), 3, stride=2, padding=1)
        outputs = []
        for i, stage in enumerate(islice(self.res_layers, self.out_indices[-1] + 1)):
            for block in stage.blocks:
                x = self._run(block, x)
            if i in self.out_indices:
                outputs.append(x)
        return tuple(outputs)

    def _parts(self) -> list[list[nn.Module | nn.Parameter]]:
        return [[self.conv1], *([stage] for stage in self.res_layers)]

    @property
    def num_layers(self) -> int:
        """The stem, every block, and the rest."""
        return sum(len(stage.blocks) for stage in self.res_layers) + 2

    def _layer_id(self, param_name: str) -> int | None:
        part, *path = param_name.split('.')
        if part == 'conv1':
            return 0
        if part != 'res_layers':
            return None
        before = sum(len(s.blocks) for s in self.res_layers[: int(path[0])])
        return 1 + before + int(path[2])
