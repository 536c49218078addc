"""Hiera, a hierarchical vision transformer, for images of any size and for video.

Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles,
arXiv 2306.00989. Position tables in two parts: arXiv 2311.05613.
Upstream: https://github.com/facebookresearch/hiera hiera/hiera.py, whose names are
kept; for the SAM 2 trunk https://github.com/facebookresearch/sam2
sam2/modeling/backbones/hieradet.py (both Apache-2.0). Hiera's weights are
CC BY-NC 4.0, SAM 2's Apache-2.0.
Departs from the source:
- tokens stay on their grid and are cut into windows where attention is windowed,
  instead of being reordered once; the numbers are the same;
- any image size: padded with zeros at the right and at the bottom to whole strides
  of the last stage, position tables resampled, maps cropped back;
- pooled features, their norm and the classifier belong to a head.

Legend: N batch, T frames over their stride (1 for images), H W grid, C width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import accumulate, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbackbones.backbones.base import BaseBackbone, integers
from mmbackbones.layers.drop import linear_drop_path_rates
from mmbackbones.layers.hiera_block import HieraBlock
from mmbackbones.layers.position_table import resample_table, tile_table
from mmbackbones.registry import MODELS

__all__ = ['Hiera']

_NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """A whole network; the defaults are those of the models for 224 pixels.

    Attributes:
        embed_dims: channels of the first stage; every later stage doubles them.
        num_heads: of the first stage; every later stage doubles them.
        depths: number of blocks of each stage.
        window_spec: side of each stage's attention windows in tokens of that stage,
            0 for global attention. The first block of a stage, which pools its
            queries, still has the windows of the stage before.
        global_att_blocks: blocks, counted over all stages, whose attention is global
            whatever `window_spec` says.
        pos_embed: `'absolute'`, one learned table; `'window'`, a background table
            and one of a window of the first stage.
        pos_embed_size: rows and columns of the table, or of the background.
        pos_embed_antialias: kernel of the background, see `resample_table`.
        layer_scale: whether learned factors per channel follow attention and MLP.
        expand_proj: whether the shortcut doubles its channels by a linear layer;
            if not, its maximum and its mean are put side by side.
    """

    embed_dims: int
    num_heads: int
    depths: tuple[int, ...]
    window_spec: tuple[int, ...] = (8, 4, 0, 0)
    global_att_blocks: tuple[int, ...] = ()
    pos_embed: str = 'absolute'
    pos_embed_size: tuple[int, int] = (56, 56)
    pos_embed_antialias: bool = False
    layer_scale: bool = False
    expand_proj: bool = True

    def __post_init__(self) -> None:
        integers('arch.embed_dims', [self.embed_dims])
        integers('arch.num_heads', [self.num_heads])
        integers('arch.depths', self.depths)
        integers('arch.window_spec', self.window_spec, least=0)
        integers('arch.global_att_blocks', self.global_att_blocks, least=0)
        integers('arch.pos_embed_size', self.pos_embed_size, length=2)
        depth, windows = sum(self.depths), self.window_spec
        rules = {
            'depths and window_spec have one entry per stage': (
                len(self.depths) == len(windows) > 0
            ),
            'num_heads divides embed_dims': self.embed_dims % self.num_heads == 0,
            'windows are even before the last stage, since pooling halves them': (
                all(side % 2 == 0 for side in windows[:-1])
            ),
            f'global_att_blocks are in 0..{depth - 1}': (
                all(0 <= i < depth for i in self.global_att_blocks)
            ),
            "pos_embed is 'absolute', or 'window' if the first stage has windows": (
                self.pos_embed == 'absolute'
                or (self.pos_embed == 'window' and any(windows[:1]))
            ),
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f'arch breaks the rule that {rule}: {self}')


_TINY = dict(embed_dims=96, num_heads=1, depths=(1, 2, 7, 2))
_SMALL = dict(embed_dims=96, num_heads=1, depths=(1, 2, 11, 2))
_BASE = dict(embed_dims=96, num_heads=1, depths=(2, 3, 16, 3))
_BASE_PLUS = dict(embed_dims=112, num_heads=2, depths=(2, 3, 16, 3))
_LARGE = dict(embed_dims=144, num_heads=2, depths=(2, 6, 36, 4))
_HUGE = dict(embed_dims=256, num_heads=4, depths=(2, 6, 36, 4))

# timm/models/hiera.py: hiera_small_abswin_256, hiera_base_abswin_256
_ABSWIN = dict(pos_embed='window', pos_embed_antialias=True, layer_scale=True)


def _sam2(size: Mapping, global_att_blocks: tuple, side: int, *windows: int) -> dict:
    """The trunk of SAM 2: windows in all stages, a few blocks global."""
    return dict(
        size,
        window_spec=(8, 4, *windows),
        global_att_blocks=global_att_blocks,
        pos_embed='window',
        pos_embed_size=(side, side),
    )


_ARCHES = {
    'tiny': _TINY,
    'small': _SMALL,
    'base': _BASE,
    'base_plus': _BASE_PLUS,
    'large': _LARGE,
    'huge': _HUGE,
    'small_abswin': dict(_SMALL, **_ABSWIN, pos_embed_size=(16, 16), expand_proj=False),
    'base_abswin': dict(_BASE, **_ABSWIN, pos_embed_size=(14, 14)),
    'sam2_tiny': _sam2(_TINY, (5, 7, 9), 7, 14, 7),
    'sam2_small': _sam2(_SMALL, (7, 10, 13), 7, 14, 7),
    'sam2_base_plus': _sam2(_BASE_PLUS, (12, 16, 20), 14, 14, 7),
    'sam2_large': _sam2(_LARGE, (23, 33, 43), 7, 16, 8),
}


def _parse_spec(arch: str | Mapping) -> ArchSpec:
    """Look a name up, or check an explicit specification.

    Raises:
        ValueError: there is no such arch; fields are missing, unknown, or do not fit
            each other.
    """
    known = fields(ArchSpec)
    if not isinstance(arch, Mapping):
        if str(arch).lower() not in _ARCHES:
            raise ValueError(
                f'arch is {arch!r}; it is one of {list(_ARCHES)} or a mapping with '
                f'the fields {[f.name for f in known]}'
            )
        arch = _ARCHES[str(arch).lower()]
    missing = [f.name for f in known if f.default is MISSING and f.name not in arch]
    unknown = sorted(set(arch) - {f.name for f in known})
    if missing or unknown:
        raise ValueError(
            f'arch lacks the fields {missing} and has the unknown fields {unknown}; '
            f'it takes {[f.name for f in known]}'
        )
    return ArchSpec(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in arch.items()}
    )


class PatchEmbed(nn.Module):
    """Overlapping patches of 7x7 pixels at stride 4, of video 3 frames at stride 2."""

    def __init__(self, in_channels: int, embed_dims: int, is_video: bool) -> None:
        super().__init__()
        self.proj = (
            nn.Conv3d(in_channels, embed_dims, (3, 7, 7), (2, 4, 4), (1, 3, 3))
            if is_video
            else nn.Conv2d(in_channels, embed_dims, 7, 4, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in, H, W)` or `(N, in, T, H, W)` to `(N, T', H / 4, W / 4, C)`."""
        x = self.proj(x)
        if x.ndim == 4:
            x = x.unsqueeze(2)  # (N, C, 1, H, W)
        # Copied once: sums keep the layout of their terms, all along the first stage.
        return x.permute(0, 2, 3, 4, 1).contiguous()


@MODELS.register_module()
class Hiera(BaseBackbone):
    """Hiera backbone: any image size, maps of stride 4, 8, 16 and 32.

    Sides that are no multiple of 32 are padded with zeros at the right and at the
    bottom; the maps lose what belongs to the padding alone.

    Args:
        arch: in either case, `'tiny'`, `'small'`, `'base'`, `'base_plus'`, `'large'`,
            `'huge'`, which fit the published weights for 224 pixels;
            `'small_abswin'`, `'base_abswin'`, timm's with a position table in two
            parts; `'sam2_tiny'`, `'sam2_small'`, `'sam2_base_plus'`, `'sam2_large'`,
            the trunks of SAM 2; or a mapping with the fields of `ArchSpec`, any
            number of stages.
        in_channels: channels of the image.
        out_indices: stages whose maps come out, see `BaseBackbone`.
        frozen_stages: -1 none, 0 patches and position tables, k these and the first
            k stages.
        norm_eval: without effect, there are no batch norms.
        drop_path_rate: of the last block; grows linearly from 0 over all blocks.
        with_cp: recompute blocks in the backward pass to save memory.
        with_out_norm: put a layer norm of its own, `norm<stage>`, on each map that
            comes out. Published weights have none.
        num_frames: frames of the clips that the position tables are made for, 16 in
            the published weights; other clips resample them. None takes images.
        init_cfg: mmengine's; None draws weights from a truncated normal distribution
            when `init_weights` is called.

    Raises:
        ValueError: an argument is none of the above, with the choices.
    """

    arch_settings = _ARCHES

    def __init__(
        self,
        arch: str | Mapping = 'base',
        *,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = (1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        with_out_norm: bool = False,
        num_frames: int | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        spec = _parse_spec(arch)
        if num_frames is not None and (
            not isinstance(num_frames, int)
            or num_frames < 1
            or spec.pos_embed == 'window'
        ):
            raise ValueError(
                f'num_frames is {num_frames!r} and arch.pos_embed {spec.pos_embed!r}; '
                f"frames are 1 or more, and need an arch with 'absolute' tables"
            )
        stages = range(len(spec.depths))
        widths = [spec.embed_dims * 2**i for i in stages]
        self.stage_strides = tuple(4 * 2**i for i in stages)
        super().__init__(
            in_channels=in_channels,
            stage_channels=widths,
            stage_strides=self.stage_strides,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=with_cp,
            # hiera/hiera.py: _init_weights, biases of 0.02 included
            init_cfg=[
                dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.02),
                dict(type='TruncNormal', layer=['Conv2d', 'Conv3d'], std=0.02),
                dict(type='Constant', layer='LayerNorm', val=1, bias=0.02),
            ]
            if init_cfg is None
            else init_cfg,
        )
        self.spec = spec
        self.num_frames = num_frames
        self.patch_embed = PatchEmbed(
            in_channels, spec.embed_dims, num_frames is not None
        )
        self._make_position_tables()
        self.blocks = nn.ModuleList()
        rates = linear_drop_path_rates(drop_path_rate, spec.depths)
        for i in stages:
            for j, rate in enumerate(rates[i]):
                before = i - 1 if i and j == 0 else i  # stage whose grid comes in
                is_global = len(self.blocks) in spec.global_att_blocks
                self.blocks.append(
                    HieraBlock(
                        widths[before],
                        widths[i],
                        spec.num_heads * 2**i,
                        window=0 if is_global else spec.window_spec[before],
                        drop_path_rate=rate,
                        layer_scale=spec.layer_scale,
                        expand_proj=spec.expand_proj,
                    )
                )
        self.with_out_norm = with_out_norm
        if with_out_norm:
            for i in self.out_indices:
                self.add_module(f'norm{i}', nn.LayerNorm(widths[i], eps=_NORM_EPS))
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps `(N, C_i, ceil(H / s_i), ceil(W / s_i))`, fine to coarse.

        Args:
            x: `(N, in_channels, H, W)`, any H and W. With `num_frames`
                `(N, in_channels, T, H, W)`, and maps `(N, C_i, ceil(T / 2), ...)`.
        """
        self._check_input(x)
        image_hw = x.shape[-2:]
        bottom, right = (-side % self.stage_strides[-1] for side in image_hw)
        x = self.patch_embed(F.pad(x, (0, right, 0, bottom)))
        x = x + self._position_table(x.shape[1:4])
        outputs = []
        for i, stage in enumerate(islice(self._stages(), self.out_indices[-1] + 1)):
            for block in stage:
                x = self._run(block, x)
            if i in self.out_indices:
                outputs.append(self._to_map(x, i, image_hw))
        return tuple(outputs)

    def _to_map(self, x: Tensor, stage: int, image_hw: Sequence[int]) -> Tensor:
        """Tokens without those of the padding, channels first, without idle axes."""
        h, w = (-(-side // self.stage_strides[stage]) for side in image_hw)
        x = x[:, :, :h, :w]
        if self.with_out_norm:
            x = getattr(self, f'norm{stage}')(x)
        x = x.permute(0, 4, 1, 2, 3)
        return x[:, :, 0] if self.num_frames is None else x

    def _make_position_tables(self) -> None:
        width, size = self.spec.embed_dims, self.spec.pos_embed_size
        if self.spec.pos_embed == 'window':
            side = self.spec.window_spec[0]
            shapes = {
                'pos_embed': (1, width, *size),
                'pos_embed_window': (1, width, side, side),
            }
        elif self.num_frames is None:
            shapes = {'pos_embed': (1, size[0] * size[1], width)}
        else:
            shapes = {
                'pos_embed_spatial': (1, size[0] * size[1], width),
                'pos_embed_temporal': (1, -(-self.num_frames // 2), width),
            }
        for name, shape in shapes.items():
            table = nn.init.trunc_normal_(torch.empty(shape), std=0.02)
            setattr(self, name, nn.Parameter(table))
        self._table_names = tuple(shapes)

    def _position_table(self, grid: Sequence[int]) -> Tensor:
        """The table of a grid of T, H, W tokens: `(1, T or 1, H, W, C)`."""
        frames, *grid_hw = grid
        if self.spec.pos_embed == 'window':
            antialias = self.spec.pos_embed_antialias
            table = resample_table(self.pos_embed, grid_hw, antialias=antialias)
            table = table + tile_table(self.pos_embed_window, grid_hw)
        else:
            table = (
                self.pos_embed if self.num_frames is None else self.pos_embed_spatial
            )
            table = table.mT.unflatten(-1, self.spec.pos_embed_size)  # (1, C, H, W)
            table = resample_table(table, grid_hw)
        table = table.permute(0, 2, 3, 1).unsqueeze(1)
        if self.num_frames is None:
            return table
        times = resample_table(self.pos_embed_temporal.mT, (frames,)).mT  # (1, T, C)
        return table + times[:, :, None, None]

    def _check_input(self, x: Tensor) -> None:
        if self.num_frames is None:
            super()._check_input(x)
        elif x.ndim != 5 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ValueError(
                f'Hiera takes video (N, {self.in_channels}, T, H, W) since num_frames '
                f'is {self.num_frames} and in_channels {self.in_channels}; the input '
                f'has shape {tuple(x.shape)}'
            )

    def _stages(self) -> list[list[HieraBlock]]:
        blocks, ends = list(self.blocks), list(accumulate(self.spec.depths))
        return [blocks[i:j] for i, j in zip([0, *ends], ends, strict=False)]

    def _parts(self) -> list[list[nn.Module | nn.Parameter]]:
        tables = [getattr(self, name) for name in self._table_names]
        return [[self.patch_embed, *tables], *self._stages()]

    @property
    def num_layers(self) -> int:
        """Patches with position tables, every block, and the rest."""
        return len(self.blocks) + 2

    def _layer_id(self, param_name: str) -> int | None:
        part, *path = param_name.split('.')
        if part == 'patch_embed' or part in self._table_names:
            return 0
        return int(path[0]) + 1 if part == 'blocks' else None
