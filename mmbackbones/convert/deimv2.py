"""DEIMv2 checkpoints of other libraries to the official names, which are ours.

Upstream: https://github.com/Intellindust-AI-Lab/DEIMv2 engine/deim;
https://github.com/huggingface/transformers src/transformers/models/deimv2 (both
Apache-2.0, as are the published weights). The tables are for
`Deimv2ForObjectDetection` with HGNetV2.
Departs from the source: transformers has a projection and a norm before the encoder
heads, which the official network lacks; its conversion fills in a unit matrix, and a
norm that neither scales nor shifts. Only these are read and written.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmbackbones.convert.dfine import attention_inputs, renamed
from mmbackbones.convert.hgnetv2 import hugging_face_rules
from mmbackbones.convert.keymap import KeyMap, Rule, Transform, concatenation
from mmbackbones.convert.source import APACHE, Source

__all__ = ['SOURCES']

_PROJECTION = tuple(
    f'model.enc_output.{i}.{leaf}' for i in range(2) for leaf in ('weight', 'bias')
)


def _neutral(width: int, like: Tensor) -> list[Tensor]:
    """Values of `_PROJECTION` that stand for there being none."""
    zeros = torch.zeros(width).to(like)
    return [torch.eye(width).to(like), zeros, torch.ones(width).to(like), zeros.clone()]


def _drop_projection(tensors: Sequence[Tensor]) -> tuple[Tensor]:
    head, *projection = tensors
    expected = _neutral(head.shape[1], head)
    if not head.is_meta and not all(map(torch.equal, projection, expected)):
        raise ValueError(
            f'{_PROJECTION[0]} is not the unit matrix, or its bias or the norm after '
            'it have an effect: these weights were trained in transformers, with a '
            'projection that DEIMv2 does not have; train from those of the authors'
        )
    return (head,)


_SCORE_HEAD = Rule(
    ('model.enc_score_head.weight', *_PROJECTION),
    'decoder.enc_score_head.weight',
    Transform(_drop_projection, lambda x: [x[0], *_neutral(x[0].shape[1], x[0])]),
)


def _fusion_block(name: str) -> list[Rule]:
    return renamed(
        f'model.encoder.{name}',
        f'encoder.{name}',
        ('conv1.{path}', 'cv1.{path}'),
        ('csp_rep1.conv2.{path}', 'cv2.1.{path}'),
        ('csp_rep1.{path}', 'cv2.0.{path}'),
        ('csp_rep2.conv2.{path}', 'cv3.1.{path}'),
        ('csp_rep2.{path}', 'cv3.0.{path}'),
        ('conv2.{path}', 'cv4.{path}'),
    )


_ENCODER_LAYER = (
    'model.encoder.aifi.{n}.layers.{m}',
    'encoder.encoder.{n}.layers.{m}',
)
_HYBRID_ENCODER = [
    attention_inputs(*_ENCODER_LAYER),
    *renamed(
        *_ENCODER_LAYER,
        ('self_attn.o_proj.{leaf}', 'self_attn.out_proj.{leaf}'),
        ('self_attn_layer_norm.{leaf}', 'norm1.{leaf}'),
        ('mlp.layers.0.{leaf}', 'linear1.{leaf}'),
        ('mlp.layers.1.{leaf}', 'linear2.{leaf}'),
        ('final_layer_norm.{leaf}', 'norm2.{leaf}'),
    ),
    *_fusion_block('{leaf}_blocks.{n}'),
    *renamed(
        'model',
        'encoder',
        ('conv_encoder.encoder_input_proj.{path}', 'input_proj.{path}'),
        ('encoder.lateral_convs.{path}', 'lateral_convs.{path}'),
        (
            'encoder.downsample_convs.{n}.conv{i}.{path}',
            'downsample_convs.{n}.0.cv{i}.{path}',
        ),
    ),
]
_LITE_ENCODER = [
    *_fusion_block('{leaf}_block'),
    *renamed(
        'model.encoder',
        'encoder',
        ('input_proj.{path}', 'input_proj.{path}'),
        ('down_conv{i}.conv.{leaf}', 'down_sample{i}.1.{leaf}'),
        ('down_conv{i}.norm.{leaf}', 'down_sample{i}.2.{leaf}'),
        ('bi_fusion_conv.{path}', 'bi_fusion.cv.{path}'),
    ),
]

_DECODER_LAYER = ('model.decoder.layers.{n}', 'decoder.decoder.layers.{n}')
_DECODER = [
    attention_inputs(*_DECODER_LAYER),
    Rule(
        tuple(f'{_DECODER_LAYER[0]}.mlp.{x}_proj.{{leaf}}' for x in ('gate', 'up')),
        f'{_DECODER_LAYER[1]}.swish_ffn.w12.{{leaf}}',
        concatenation(2),
    ),
    *renamed(
        *_DECODER_LAYER,
        ('self_attn.o_proj.{leaf}', 'self_attn.out_proj.{leaf}'),
        ('self_attn_layer_norm.weight', 'norm1.scale'),
        ('encoder_attn.{path}', 'cross_attn.{path}'),
        ('encoder_attn_layer_norm.weight', 'norm2.scale'),
        ('gateway.gate.{leaf}', 'gateway.gate.{leaf}'),
        ('gateway.norm.weight', 'gateway.norm.scale'),
        ('mlp.down_proj.{leaf}', 'swish_ffn.w3.{leaf}'),
        ('final_layer_norm.weight', 'norm3.scale'),
    ),
    _SCORE_HEAD,
    *renamed(
        'model',
        'decoder',
        ('decoder_input_proj.{path}', 'input_proj.{path}'),
        ('denoising_class_embed.weight', 'denoising_class_embed.weight'),
        ('enc_score_head.bias', 'enc_score_head.bias'),
        ('enc_bbox_head.{path}', 'enc_bbox_head.{path}'),
        ('decoder.query_pos_head.{path}', 'query_pos_head.{path}'),
        ('decoder.pre_bbox_head.{path}', 'pre_bbox_head.{path}'),
        ('decoder.lqe_layers.{path}', 'decoder.lqe_layers.{path}'),
    ),
    # One tensor under two names, there or here.
    Rule(
        ('class_embed.{path}', 'model.decoder.class_embed.{path}'),
        'decoder.dec_score_head.{path}',
    ),
    *(
        Rule(f'model.decoder.{name}', (f'decoder.{name}', f'decoder.decoder.{name}'))
        for name in ('up', 'reg_scale')
    ),
    Rule(
        None,
        ('decoder.anchors', 'decoder.valid_mask'),
        reason='follow from eval_size_hw',
    ),
]
_BOX_HEADS = Rule(
    ('bbox_embed.{path}', 'model.decoder.bbox_embed.{path}'),
    'decoder.dec_bbox_head.{path}',
)

_BACKBONE = hugging_face_rules('model.conv_encoder.model.', 'backbone.')
HYBRID = KeyMap([*_BACKBONE, *_HYBRID_ENCODER, *_DECODER, _BOX_HEADS])


def _lite(state_dict: Mapping[str, Tensor]) -> KeyMap:
    """One box head has the number of every layer; of any one of them in files."""
    numbers = range(sum(n.endswith('.reg_conf.layers.0.bias') for n in state_dict))
    theirs, ours = (
        tuple(f'{place}.{i}.{{path}}' for place in places for i in numbers)
        for places in (
            ('bbox_embed', 'model.decoder.bbox_embed'),
            ('decoder.dec_bbox_head',),
        )
    )
    return KeyMap([*_BACKBONE, *_LITE_ENCODER, *_DECODER, Rule(theirs, ours)])


_NOTE = (
    'transformers computes otherwise: tokens are normalised before the encoder heads, '
    'positions follow the boxes of each layer, and heads have ReLU'
)

SOURCES = (
    Source(
        'DEIMv2',
        ('hf',),
        HYBRID,
        (
            r'model\.conv_encoder\.encoder_input_proj\.0\.conv\.weight',
            r'model\.decoder\.layers\.0\.mlp\.gate_proj\.weight',
        ),
        APACHE,
        note=_NOTE,
    ),
    Source(
        'DEIMv2',
        ('hf',),
        _lite,
        (
            r'model\.encoder\.bi_fusion_conv\.conv\.weight',
            r'model\.decoder\.layers\.0\.mlp\.gate_proj\.weight',
        ),
        APACHE,
        note=_NOTE,
    ),
    Source(
        'DEIMv2',
        ('ours', 'deimv2'),
        KeyMap([Rule('{path}', '{path}')]),
        (
            r'backbone\.stem\.stem1\.conv\.weight',
            r'decoder\.decoder\.layers\.0\.swish_ffn\.w12\.weight',
        ),
        APACHE,
    ),
)
