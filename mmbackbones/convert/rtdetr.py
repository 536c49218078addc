"""RT-DETR checkpoints, v1 and v2, of others to our names.

Ours are those of the PyTorch code of v2, as far as they do not concern HGNetV2.
Upstream: https://github.com/lyuwenyu/RT-DETR rtdetr_pytorch and rtdetrv2_pytorch;
https://github.com/huggingface/transformers src/transformers/models/rt_detr and
rt_detr_v2, with ResNet-vd; all Apache-2.0, as are the published weights.
"""

from mmbackbones.convert.hgnetv2 import rtdetr_rules
from mmbackbones.convert.keymap import CONCAT_QKV, KeyMap, Rule
from mmbackbones.convert.resnet_vd import hugging_face_rules
from mmbackbones.convert.source import APACHE, Source

__all__ = ['SOURCES', 'TRANSFORMERS_5']

_ANCHORS = Rule(
    None,
    ('decoder.anchors', 'decoder.valid_mask'),
    reason='follow from eval_size_hw',
)
_SAME = Rule('{path}', '{path}')


def _renamed(prefix: str, *pairs: tuple[str, str]) -> list[Rule]:
    return [Rule(f'{prefix}.{a}.{{path}}', f'{prefix}.{b}.{{path}}') for a, b in pairs]


# Some projections are numbered there, and anchors are not saved.
V1 = KeyMap(
    [
        *_renamed('encoder.input_proj.{n}', ('0', 'conv'), ('1', 'norm')),
        *_renamed('decoder.enc_output', ('0', 'proj'), ('1', 'norm')),
        _ANCHORS,
        _SAME,
    ]
)

V2_HGNETV2 = KeyMap([*rtdetr_rules('backbone.'), _SAME])


def _attention(source: str, target: str) -> list[Rule]:
    """Of a layer: three projections there are the rows of one matrix here."""
    return [
        Rule(
            tuple(f'{source}.self_attn.{part}_proj.{{leaf}}' for part in 'qkv'),
            f'{target}.self_attn.in_proj_{{leaf}}',
            CONCAT_QKV,
        ),
        *(
            Rule(f'{source}.{theirs}.{{leaf}}', f'{target}.{ours}.{{leaf}}')
            for theirs, ours in (
                ('self_attn.out_proj', 'self_attn.out_proj'),
                ('self_attn_layer_norm', 'norm1'),
                ('fc1', 'linear1'),
                ('fc2', 'linear2'),
            )
        ),
    ]


# transformers 5 in memory, and transformers 4 and the files of both: first of all
# detectors, then of RT-DETR, then of D-FINE.
TRANSFORMERS_5 = (
    ('model.encoder.aifi.', 'model.encoder.encoder.'),
    ('.self_attn.o_proj.', '.self_attn.out_proj.'),
    ('.mlp.fc', '.fc'),
    ('.mlp.layers.0.', '.fc1.'),
    ('.mlp.layers.1.', '.fc2.'),
)

_ENCODER_LAYER = 'encoder.encoder.{n}.layers.{m}'
_DECODER_LAYER = 'decoder.layers.{n}'

HUGGING_FACE_RULES = [
    *hugging_face_rules('model.backbone.model.', 'backbone.'),
    # encoder
    *_attention(f'model.{_ENCODER_LAYER}', _ENCODER_LAYER),
    *(
        Rule(f'model.{theirs}.{{path}}', f'{ours}.{{path}}')
        for theirs, ours in (
            ('encoder_input_proj.{n}.0', 'encoder.input_proj.{n}.conv'),
            ('encoder_input_proj.{n}.1', 'encoder.input_proj.{n}.norm'),
            (f'{_ENCODER_LAYER}.final_layer_norm', f'{_ENCODER_LAYER}.norm2'),
            ('encoder.lateral_convs', 'encoder.lateral_convs'),
            ('encoder.fpn_blocks', 'encoder.fpn_blocks'),
            ('encoder.downsample_convs', 'encoder.downsample_convs'),
            ('encoder.pan_blocks', 'encoder.pan_blocks'),
        )
    ),
    # decoder
    *_attention(f'model.{_DECODER_LAYER}', f'decoder.{_DECODER_LAYER}'),
    *(
        Rule(f'model.{theirs}.{{path}}', f'decoder.{ours}.{{path}}')
        for theirs, ours in (
            ('decoder_input_proj.{n}.0', 'input_proj.{n}.conv'),
            ('decoder_input_proj.{n}.1', 'input_proj.{n}.norm'),
            ('denoising_class_embed', 'denoising_class_embed'),
            ('enc_output.0', 'enc_output.proj'),
            ('enc_output.1', 'enc_output.norm'),
            ('enc_score_head', 'enc_score_head'),
            ('enc_bbox_head', 'enc_bbox_head'),
            ('decoder.query_pos_head', 'query_pos_head'),
            (f'{_DECODER_LAYER}.encoder_attn_layer_norm', f'{_DECODER_LAYER}.norm2'),
            (f'{_DECODER_LAYER}.final_layer_norm', f'{_DECODER_LAYER}.norm3'),
            *(
                (
                    f'{_DECODER_LAYER}.encoder_attn.{linear}',
                    f'{_DECODER_LAYER}.cross_attn.{linear}',
                )
                for linear in (
                    'sampling_offsets',
                    'attention_weights',
                    'value_proj',
                    'output_proj',
                )
            ),
        )
    ),
    # One tensor under two names there.
    *(
        Rule(
            (f'{theirs}.{{path}}', f'model.decoder.{theirs}.{{path}}'),
            f'decoder.{ours}.{{path}}',
        )
        for theirs, ours in (
            ('class_embed', 'dec_score_head'),
            ('bbox_embed', 'dec_bbox_head'),
        )
    ),
    _ANCHORS,
]
_POINTS_SCALE = Rule(
    'model.decoder.layers.{n}.encoder_attn.n_points_scale',
    'decoder.decoder.layers.{n}.cross_attn.num_points_scale',
)

_THEIR_VALUES = r'model\.decoder\.layers\.0\.encoder_attn\.value_proj\.weight'
_OUR_VALUES = r'decoder\.decoder\.layers\.0\.cross_attn\.value_proj\.weight'

SOURCES = (
    Source(
        'RTDETR',
        ('hf',),
        KeyMap([*HUGGING_FACE_RULES, _POINTS_SCALE], TRANSFORMERS_5),
        (_THEIR_VALUES, r'model\.decoder\.layers\.0\.encoder_attn\.n_points_scale'),
        APACHE,
    ),
    Source(
        'RTDETR',
        ('hf',),
        KeyMap(HUGGING_FACE_RULES, TRANSFORMERS_5),
        (_THEIR_VALUES,),
        APACHE,
    ),
    Source(
        'RTDETR',
        ('rtdetrv2',),
        V2_HGNETV2,
        (
            _OUR_VALUES,
            r'backbone\.stages\.0\.blocks\.0\.aggregation_squeeze_conv\.conv\.weight',
        ),
        APACHE,
    ),
    Source(
        'RTDETR',
        ('rtdetr',),
        V1,
        (_OUR_VALUES, r'encoder\.input_proj\.0\.0\.weight'),
        APACHE,
    ),
    Source(
        'RTDETR',
        ('ours', 'rtdetrv2'),
        KeyMap([_SAME]),
        (_OUR_VALUES, r'encoder\.input_proj\.0\.conv\.weight'),
        APACHE,
    ),
)
