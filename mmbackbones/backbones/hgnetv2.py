"""HGNetV2, the convolutional backbone of D-FINE and RT-DETR, B0 to B6.

There is no paper; the weights' distillation is SSLD, arXiv 2103.05959.
Upstream: https://github.com/PaddlePaddle/PaddleClas
ppcls/arch/backbone/legendary_models/pp_hgnet_v2.py, and in the form whose names are
kept here https://github.com/Peterande/D-FINE src/nn/backbone/hgnetv2.py (both
Apache-2.0, weights too).
Departs from the source:
- `drop_path_rate` is stochastic depth; D-FINE has a dropout under that name;
- frozen parts also keep their batch-norm statistics;
- the edge of the stem's pooling is an option, since the two ecosystems differ.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice

import torch
from torch import Tensor, nn

from mmbackbones.backbones.base import BaseBackbone, integers
from mmbackbones.layers.conv import ConvBNAct
from mmbackbones.layers.drop import DropPath, linear_drop_path_rates
from mmbackbones.layers.hg_stem import HGStem
from mmbackbones.layers.norm import FrozenBatchNorm2d
from mmbackbones.registry import MODELS

__all__ = ['HGNetV2']

ConvFactory = Callable[..., ConvBNAct]  # with the network's options filled in


@dataclass(frozen=True)
class StageSpec:
    """One stage: a downsampling, then blocks of several layers each."""

    in_channels: int
    mid_channels: int
    out_channels: int
    num_blocks: int
    num_layers: int
    downsample: bool = True
    light: bool = False
    kernel_size: int = 3


@dataclass(frozen=True)
class ArchSpec:
    """A whole network; `use_lab` is how its published weights were trained."""

    stem_channels: tuple[int, int]  # inside, out
    stages: tuple[StageSpec, ...]
    use_lab: bool


def _arch(
    stem: tuple[int, int],
    mid: Sequence[int],
    out: Sequence[int],
    blocks: Sequence[int],
    num_layers: int,
    use_lab: bool,
) -> ArchSpec:
    """The pattern of B0 to B6: stages 3 and 4 are light, with 5x5 kernels."""
    stages = tuple(
        StageSpec(
            in_channels=(stem[1], *out)[i],
            mid_channels=mid[i],
            out_channels=out[i],
            num_blocks=blocks[i],
            num_layers=num_layers,
            downsample=i > 0,
            light=i > 1,
            kernel_size=5 if i > 1 else 3,
        )
        for i in range(4)
    )
    return ArchSpec(stem, stages, use_lab)


# Stem, inside, out, blocks, layers per block, learnable affine.
_ARCHES = {
    'b0': _arch(
        (16, 16), (16, 32, 64, 128), (64, 256, 512, 1024), (1, 1, 2, 1), 3, True
    ),
    'b1': _arch(
        (24, 32), (32, 48, 96, 192), (64, 256, 512, 1024), (1, 1, 2, 1), 3, True
    ),
    'b2': _arch(
        (24, 32), (32, 64, 128, 256), (96, 384, 768, 1536), (1, 1, 3, 1), 4, True
    ),
    'b3': _arch(
        (24, 32), (32, 64, 128, 256), (128, 512, 1024, 2048), (1, 1, 3, 1), 5, True
    ),
    'b4': _arch(
        (32, 48), (48, 96, 192, 384), (128, 512, 1024, 2048), (1, 1, 3, 1), 6, False
    ),
    'b5': _arch(
        (32, 64), (64, 128, 256, 512), (128, 512, 1024, 2048), (1, 2, 5, 2), 6, False
    ),
    'b6': _arch(
        (48, 96), (96, 192, 384, 768), (192, 512, 1024, 2048), (2, 3, 6, 3), 6, False
    ),
}

# Fields of Hugging Face's HGNetV2Config that make the layers -> ours.
_SPEC_FIELDS = {
    'stage_in_channels': 'in_channels',
    'stage_mid_channels': 'mid_channels',
    'stage_out_channels': 'out_channels',
    'stage_num_blocks': 'num_blocks',
    'stage_downsample': 'downsample',
    'stage_light_block': 'light',
    'stage_kernel_size': 'kernel_size',
    'stage_numb_of_layers': 'num_layers',
}
_FLAGS = ('downsample', 'light')


def _parse_spec(spec: Mapping, in_channels: int) -> ArchSpec:
    """Check an explicit specification and turn it into ours.

    Raises:
        ValueError: fields are missing, unknown, of unequal length, or do not fit
            each other.
    """
    required = {'stem_channels', *_SPEC_FIELDS}
    missing = sorted(required - set(spec))
    unknown = sorted(set(spec) - required - {'use_learnable_affine_block'})
    if missing or unknown:
        raise ValueError(
            f'arch lacks the fields {missing} and has the unknown fields {unknown}; '
            f'it takes {sorted(required)} and use_learnable_affine_block'
        )
    columns = {
        ours: integers(f'arch.{name}', spec[name], least=int(ours not in _FLAGS))
        for name, ours in _SPEC_FIELDS.items()
    }
    lengths = {name: len(spec[name]) for name in _SPEC_FIELDS}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f'arch needs one entry per stage in each field, got {lengths}')
    if any(size % 2 == 0 for size in columns['kernel_size']):
        raise ValueError(
            f'arch.stage_kernel_size is {columns["kernel_size"]}; kernels are odd'
        )
    stem = integers('arch.stem_channels', spec['stem_channels'], length=3)
    if stem[0] != in_channels:
        raise ValueError(
            f'arch.stem_channels is {stem}; it takes (in_channels, inside, out), and '
            f'in_channels is {in_channels}'
        )
    stages = tuple(
        StageSpec(**dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    )
    offered = (stem[2], *(s.out_channels for s in stages[:-1]))
    taken = tuple(s.in_channels for s in stages)
    if offered != taken:
        raise ValueError(
            f'arch.stage_in_channels is {taken} but the stem and the stages before '
            f'give {offered}'
        )
    return ArchSpec(stem[1:], stages, spec.get('use_learnable_affine_block', False))


class LightConvBNAct(nn.Module):
    """A bare 1x1 convolution, then a depthwise one with ReLU; both normalised."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, conv: ConvFactory
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 1, use_act=False)
        self.conv2 = conv(out_channels, out_channels, kernel_size, groups=out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, H, W)`."""
        return self.conv2(self.conv1(x))


class HGBlock(nn.Module):
    """Layers in series; all their outputs and the input are squeezed into one map."""

    def __init__(
        self,
        in_channels: int,
        spec: StageSpec,
        conv: ConvFactory,
        *,
        residual: bool,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        mid, out = spec.mid_channels, spec.out_channels
        layer = partial(LightConvBNAct, conv=conv) if spec.light else conv
        self.layers = nn.ModuleList(
            layer(mid if k else in_channels, mid, spec.kernel_size)
            for k in range(spec.num_layers)
        )
        self.aggregation = nn.Sequential(
            conv(in_channels + spec.num_layers * mid, out // 2, 1),
            conv(out // 2, out, 1),
        )
        self.drop_path = DropPath(drop_path_rate) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, H, W)`."""
        maps = [x]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        y = self.aggregation(torch.cat(maps, dim=1))
        return y if self.drop_path is None else x + self.drop_path(y)


class HGStage(nn.Module):
    """A depthwise downsampling, or none, and blocks; all but the first residual."""

    def __init__(
        self, spec: StageSpec, conv: ConvFactory, drop_path_rates: Sequence[float]
    ) -> None:
        super().__init__()
        width = spec.in_channels
        self.downsample = (
            conv(width, width, 3, stride=2, groups=width, use_act=False)
            if spec.downsample
            else nn.Identity()
        )
        self.blocks = nn.ModuleList(
            HGBlock(
                spec.out_channels if j else width,
                spec,
                conv,
                residual=j > 0,
                drop_path_rate=rate,
            )
            for j, rate in enumerate(drop_path_rates)
        )


@MODELS.register_module()
class HGNetV2(BaseBackbone):
    """HGNetV2 backbone: any image size, maps of stride 4, 8, 16 and 32.

    Args:
        arch: `'b0'` to `'b6'` in either case, or a mapping with the fields of Hugging
            Face's `HGNetV2Config` that make the layers: `stem_channels`,
            `stage_in_channels`, `stage_mid_channels`, `stage_out_channels`,
            `stage_num_blocks`, `stage_downsample`, `stage_light_block`,
            `stage_kernel_size`, `stage_numb_of_layers` (sic), and optionally
            `use_learnable_affine_block`. Any number of stages.
        in_channels: channels of the image.
        out_indices: stages whose maps come out, see `BaseBackbone`.
        frozen_stages: -1 none, 0 the stem, k the stem and the first k stages.
        frozen_norm: build every batch norm of the whole network as a constant
            (`FrozenBatchNorm2d`), as D-FINE-L and -X do.
        norm_eval: keep batch norms on their running statistics; their affine part
            still learns.
        drop_path_rate: of the last block; grows linearly from 0 over all blocks, and
            acts where a block is residual, that is, not the first of its stage.
        with_cp: recompute blocks in the backward pass to save memory.
        use_lab: whether activations are followed by a learnable affine. None takes
            what the published weights of the arch have: B0 to B3 yes, B4 to B6 no.
        stem_pool_pad: `'zero'` pads the stem's pooling with zeros, as D-FINE, timm
            and Hugging Face do; `'inf'` with minus infinity, that is, ignores the
            edge, as PaddlePaddle does. They differ only with a learnable affine, and
            weights want the one they were trained with.
        init_cfg: mmengine's; None draws convolutions from Kaiming's normal
            distribution (fan out) when `init_weights` is called.

    Raises:
        ValueError: an argument is none of the above, with the choices.
    """

    arch_settings = _ARCHES

    def __init__(
        self,
        arch: str | Mapping = 'b4',
        *,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = (1, 2, 3),
        frozen_stages: int = -1,
        frozen_norm: bool = False,
        norm_eval: bool = False,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        use_lab: bool | None = None,
        stem_pool_pad: str = 'zero',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if isinstance(arch, Mapping):
            spec = _parse_spec(arch, in_channels)
        elif str(arch).lower() in self.arch_settings:
            spec = self.arch_settings[str(arch).lower()]
        else:
            raise ValueError(
                f'arch is {arch!r}; it is one of {list(self.arch_settings)} or a '
                f'mapping with the fields of HGNetV2Config'
            )
        pool_edges = {'zero': 0.0, 'inf': float('-inf')}
        if stem_pool_pad not in pool_edges:
            raise ValueError(
                f'stem_pool_pad is {stem_pool_pad!r}; it is one of {list(pool_edges)}'
            )
        super().__init__(
            in_channels=in_channels,
            stage_channels=[s.out_channels for s in spec.stages],
            stage_strides=[
                4 * 2**n for n in accumulate(s.downsample for s in spec.stages)
            ],
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=with_cp,
            init_cfg=dict(type='Kaiming', layer='Conv2d', mode='fan_out')
            if init_cfg is None
            else init_cfg,
        )
        conv = partial(
            ConvBNAct,
            use_lab=spec.use_lab if use_lab is None else use_lab,
            norm=FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d,
        )
        pool_edge = pool_edges[stem_pool_pad]
        self.stem = HGStem(in_channels, *spec.stem_channels, conv, pool_edge=pool_edge)
        depths = [s.num_blocks for s in spec.stages]
        rates = linear_drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList(
            HGStage(stage, conv, stage_rates)
            for stage, stage_rates in zip(spec.stages, rates, strict=True)
        )
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps `(N, C_i, ceil(H / s_i), ceil(W / s_i))`, fine to coarse.

        Args:
            x: `(N, in_channels, H, W)`, any H and W.
        """
        self._check_input(x)
        x = self.stem(x)
        outputs = []
        for i, stage in enumerate(islice(self.stages, self.out_indices[-1] + 1)):
            x = stage.downsample(x)
            for block in stage.blocks:
                x = self._run(block, x)
            if i in self.out_indices:
                outputs.append(x)
        return tuple(outputs)

    def _parts(self) -> list[list[nn.Module | nn.Parameter]]:
        return [[self.stem], *([stage] for stage in self.stages)]

    @property
    def num_layers(self) -> int:
        """The stem, every block (with the downsampling before it), and the rest."""
        return sum(len(stage.blocks) for stage in self.stages) + 2

    def _layer_id(self, param_name: str) -> int | None:
        part, *path = param_name.split('.')
        if part == 'stem':
            return 0
        if part != 'stages':
            return None
        before = sum(len(s.blocks) for s in self.stages[: int(path[0])])
        block = int(path[2]) if path[1] == 'blocks' else 0
        return 1 + before + block
