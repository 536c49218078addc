"""Names of ConvNeXt V2 elsewhere, to the official ones, which are ours.

Upstream: https://github.com/facebookresearch/ConvNeXt-V2 (MIT),
https://github.com/huggingface/pytorch-image-models timm/models/convnext.py,
https://github.com/huggingface/transformers src/transformers/models/convnextv2,
https://github.com/open-mmlab/mmpretrain mmpretrain/models/backbones/convnext.py (all
Apache-2.0). The published weights are CC BY-NC 4.0 wherever they are.
"""

from collections.abc import Mapping
from math import isqrt

from torch import Tensor

from mmbackbones.convert.keymap import KeyMap, Rule, Transform
from mmbackbones.convert.source import NON_COMMERCIAL, Source

__all__ = ['SOURCES']

_CLASSIFIER = 'the classifier or its norm, which backbones do not have'

# Global response norms: (1, 1, 1, C) here.
_GRN = Transform(lambda x: [x[0].reshape(1, 1, 1, -1)], lambda x: [x[0].flatten()])
_GRN_ROW = Transform(
    lambda x: [x[0].reshape(1, 1, 1, -1)], lambda x: [x[0].reshape(1, -1)]
)
_ROW = Transform(lambda x: [x[0].flatten()], lambda x: [x[0].unsqueeze(0)])
_CONV_1X1 = Transform(lambda x: [x[0].flatten(1)], lambda x: [x[0][..., None, None]])

_BLOCK = 'stages.{i}.{j}'

OFFICIAL = KeyMap(
    [
        Rule('downsample_layers.{path}', 'downsample_layers.{path}'),
        Rule('stages.{path}', 'stages.{path}'),
        Rule('norm{i}.{leaf}', 'norm{i}.{leaf}'),  # ours with output norms
        Rule('norm.{leaf}', None, reason=_CLASSIFIER),
        Rule('head.{leaf}', None, reason=_CLASSIFIER),
    ]
)

MMPRETRAIN = KeyMap(
    [
        Rule(f'{_BLOCK}.depthwise_conv.{{leaf}}', f'{_BLOCK}.dwconv.{{leaf}}'),
        Rule(
            f'{_BLOCK}.pointwise_conv{{n}}.{{leaf}}', f'{_BLOCK}.pwconv{{n}}.{{leaf}}'
        ),
        Rule(f'{_BLOCK}.grn.{{leaf}}', f'{_BLOCK}.grn.{{leaf}}', _GRN),
        Rule(f'{_BLOCK}.norm.{{leaf}}', f'{_BLOCK}.norm.{{leaf}}'),
        Rule('downsample_layers.{path}', 'downsample_layers.{path}'),
        Rule('norm{i}.{leaf}', 'norm{i}.{leaf}'),
    ]
)

_HF = 'encoder.stages.{i}.layers.{j}'

HUGGING_FACE = KeyMap(
    [
        Rule('embeddings.patch_embeddings.{leaf}', 'downsample_layers.0.0.{leaf}'),
        Rule('embeddings.layernorm.{leaf}', 'downsample_layers.0.1.{leaf}'),
        Rule(
            'encoder.stages.{i}.downsampling_layer.{path}',
            'downsample_layers.{i}.{path}',
        ),
        Rule(f'{_HF}.layernorm.{{leaf}}', f'{_BLOCK}.norm.{{leaf}}'),
        Rule(f'{_HF}.grn.weight', f'{_BLOCK}.grn.gamma'),
        Rule(f'{_HF}.grn.bias', f'{_BLOCK}.grn.beta'),
        Rule(f'{_HF}.{{path}}', f'{_BLOCK}.{{path}}'),
        # stage1 is the first of theirs, norm0 of ours
        *(
            Rule(f'hidden_states_norms.stage{i + 1}.{{leaf}}', f'norm{i}.{{leaf}}')
            for i in range(4)
        ),
        Rule('layernorm.{leaf}', None, reason=_CLASSIFIER),
    ]
)

_TIMM = 'stages.{i}.blocks.{j}'
# timm/models/convnext.py: conv_mlp=True of atto, femto, pico and nano, by their width
_TIMM_CONV_MLP_WIDTHS = (40, 48, 64, 80)


def _timm(conv_mlp: bool) -> KeyMap:
    as_linear = _CONV_1X1 if conv_mlp else None
    return KeyMap(
        [
            Rule('stem.{path}', 'downsample_layers.0.{path}'),
            Rule('stages.{i}.downsample.{path}', 'downsample_layers.{i}.{path}'),
            Rule(f'{_TIMM}.conv_dw.{{leaf}}', f'{_BLOCK}.dwconv.{{leaf}}'),
            Rule(f'{_TIMM}.norm.{{leaf}}', f'{_BLOCK}.norm.{{leaf}}'),
            Rule(
                f'{_TIMM}.mlp.fc{{n}}.weight', f'{_BLOCK}.pwconv{{n}}.weight', as_linear
            ),
            Rule(f'{_TIMM}.mlp.fc{{n}}.bias', f'{_BLOCK}.pwconv{{n}}.bias'),
            Rule(f'{_TIMM}.mlp.grn.weight', f'{_BLOCK}.grn.gamma', _GRN),
            Rule(f'{_TIMM}.mlp.grn.bias', f'{_BLOCK}.grn.beta', _GRN),
            Rule('head.{path}', None, reason=_CLASSIFIER),
        ]
    )


_TIMM_LINEAR, _TIMM_CONV = _timm(False), _timm(True)


def timm_table(state_dict: Mapping[str, Tensor]) -> KeyMap:
    """The table of a network: the small ones have convolutions for linear layers.

    Args:
        state_dict: with timm's names or ours.
    """
    theirs = state_dict.get('stages.0.blocks.0.mlp.fc1.weight')
    if theirs is not None:
        return _TIMM_CONV if theirs.ndim == 4 else _TIMM_LINEAR
    width = len(state_dict['downsample_layers.0.0.weight'])
    return _TIMM_CONV if width in _TIMM_CONV_MLP_WIDTHS else _TIMM_LINEAR


# The sparse convolutions of pre-training number their kernel's cells column by column.
def _from_depthwise_kernel(x: list[Tensor]) -> list[Tensor]:
    side = isqrt(len(x[0]))
    kernel = x[0].unflatten(0, (side, side))  # (column, row, C)
    return [kernel.permute(2, 1, 0).unsqueeze(1).contiguous()]


def _to_depthwise_kernel(x: list[Tensor]) -> list[Tensor]:
    return [x[0].squeeze(1).permute(2, 1, 0).flatten(0, 1).contiguous()]


def _from_kernel(x: list[Tensor]) -> list[Tensor]:
    side = isqrt(len(x[0]))
    kernel = x[0].unflatten(0, (side, side))  # (column, row, in, out)
    return [kernel.permute(3, 2, 1, 0).contiguous()]


def _to_kernel(x: list[Tensor]) -> list[Tensor]:
    return [x[0].permute(3, 2, 1, 0).flatten(0, 1).contiguous()]


_DEPTHWISE = Transform(_from_depthwise_kernel, _to_depthwise_kernel)
_DENSE = Transform(_from_kernel, _to_kernel)
# What main_pretrain.py saves below `encoder.`; the released *_fcmae.pt may be this
# or official.
FCMAE = KeyMap(
    [
        Rule('downsample_layers.0.{path}', 'downsample_layers.0.{path}'),
        Rule('downsample_layers.{i}.0.ln.{leaf}', 'downsample_layers.{i}.0.{leaf}'),
        Rule(
            'downsample_layers.{i}.1.kernel', 'downsample_layers.{i}.1.weight', _DENSE
        ),
        Rule('downsample_layers.{i}.1.bias', 'downsample_layers.{i}.1.bias', _ROW),
        Rule(f'{_BLOCK}.dwconv.kernel', f'{_BLOCK}.dwconv.weight', _DEPTHWISE),
        Rule(f'{_BLOCK}.dwconv.bias', f'{_BLOCK}.dwconv.bias', _ROW),
        Rule(f'{_BLOCK}.norm.ln.{{leaf}}', f'{_BLOCK}.norm.{{leaf}}'),
        Rule(f'{_BLOCK}.pwconv{{n}}.linear.{{leaf}}', f'{_BLOCK}.pwconv{{n}}.{{leaf}}'),
        Rule(f'{_BLOCK}.grn.{{leaf}}', f'{_BLOCK}.grn.{{leaf}}', _GRN_ROW),
    ]
)

SOURCES = tuple(
    Source('ConvNeXtV2', makers, table, marks, NON_COMMERCIAL, prefixes)
    for makers, table, marks, prefixes in (
        (
            ('ours', 'official'),
            OFFICIAL,
            (r'stages\.0\.0\.grn\.gamma', r'stages\.0\.0\.dwconv\.weight'),
            ('',),
        ),
        (
            ('fcmae',),
            FCMAE,
            (r'stages\.0\.0\.dwconv\.kernel',),
            ('encoder.',),
        ),
        (
            ('timm',),
            timm_table,
            (r'stages\.0\.blocks\.0\.mlp\.grn\.weight',),
            ('',),
        ),
        (
            ('hf',),
            HUGGING_FACE,
            (r'encoder\.stages\.0\.layers\.0\.grn\.weight',),
            ('', 'convnextv2.'),
        ),
        (
            ('mmpretrain',),
            MMPRETRAIN,
            (r'stages\.0\.0\.grn\.gamma', r'stages\.0\.0\.depthwise_conv\.weight'),
            ('',),
        ),
    )
)
