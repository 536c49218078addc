"""D-FINE checkpoints of other libraries to the official names, which are ours.

Hugging Face: https://github.com/huggingface/transformers
src/transformers/models/d_fine (Apache-2.0). The table is for
`DFineForObjectDetection`, its HGNetV2 included.
"""

from mmbackbones.convert.hgnetv2 import hugging_face_rules
from mmbackbones.convert.keymap import CONCAT_QKV, KeyMap, Rule
from mmbackbones.convert.rtdetr import TRANSFORMERS_5

__all__ = ['HUGGING_FACE', 'attention_inputs', 'renamed']

_ATTENTION = (
    ('self_attn.out_proj.{leaf}', 'self_attn.out_proj.{leaf}'),
    ('self_attn_layer_norm.{leaf}', 'norm1.{leaf}'),
    ('fc{i}.{leaf}', 'linear{i}.{leaf}'),
)


def renamed(source: str, target: str, *pairs: tuple[str, str]) -> list[Rule]:
    """Rules for names below `source` and `target`."""
    return [Rule(f'{source}.{theirs}', f'{target}.{ours}') for theirs, ours in pairs]


def attention_inputs(source: str, target: str) -> Rule:
    """Three projections there, the rows of one matrix here."""
    return Rule(
        tuple(f'{source}.self_attn.{part}_proj.{{leaf}}' for part in 'qkv'),
        f'{target}.self_attn.in_proj_{{leaf}}',
        CONCAT_QKV,
    )


_ENCODER_LAYER = (
    'model.encoder.encoder.{n}.layers.{m}',
    'encoder.encoder.{n}.layers.{m}',
)
_DECODER_LAYER = ('model.decoder.layers.{n}', 'decoder.decoder.layers.{n}')

HUGGING_FACE = KeyMap(
    [
        *hugging_face_rules('model.backbone.model.', 'backbone.'),
        # encoder
        attention_inputs(*_ENCODER_LAYER),
        *renamed(
            *_ENCODER_LAYER, *_ATTENTION, ('final_layer_norm.{leaf}', 'norm2.{leaf}')
        ),
        *renamed(
            'model.encoder.{leaf}_blocks.{n}',
            'encoder.{leaf}_blocks.{n}',
            ('conv1.{path}', 'cv1.{path}'),
            ('csp_rep1.{path}', 'cv2.0.{path}'),
            ('conv2.{path}', 'cv2.1.{path}'),
            ('csp_rep2.{path}', 'cv3.0.{path}'),
            ('conv3.{path}', 'cv3.1.{path}'),
            ('conv4.{path}', 'cv4.{path}'),
        ),
        *renamed(
            'model',
            'encoder',
            ('encoder_input_proj.{n}.0.{leaf}', 'input_proj.{n}.conv.{leaf}'),
            ('encoder_input_proj.{n}.1.{leaf}', 'input_proj.{n}.norm.{leaf}'),
            ('encoder.lateral_convs.{path}', 'lateral_convs.{path}'),
            (
                'encoder.downsample_convs.{n}.conv{i}.{path}',
                'downsample_convs.{n}.0.cv{i}.{path}',
            ),
        ),
        # decoder
        attention_inputs(*_DECODER_LAYER),
        *renamed(
            *_DECODER_LAYER,
            *_ATTENTION,
            ('encoder_attn.{path}', 'cross_attn.{path}'),
            ('gateway.{path}', 'gateway.{path}'),
            ('final_layer_norm.{leaf}', 'norm3.{leaf}'),
        ),
        *renamed(
            'model',
            'decoder',
            ('decoder_input_proj.{n}.0.{leaf}', 'input_proj.{n}.conv.{leaf}'),
            ('decoder_input_proj.{n}.1.{leaf}', 'input_proj.{n}.norm.{leaf}'),
            ('denoising_class_embed.weight', 'denoising_class_embed.weight'),
            ('enc_output.0.{leaf}', 'enc_output.proj.{leaf}'),
            ('enc_output.1.{leaf}', 'enc_output.norm.{leaf}'),
            ('enc_score_head.{leaf}', 'enc_score_head.{leaf}'),
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
        Rule(
            ('bbox_embed.{path}', 'model.decoder.bbox_embed.{path}'),
            'decoder.dec_bbox_head.{path}',
        ),
        Rule('model.decoder.up', ('decoder.up', 'decoder.decoder.up')),
        Rule(
            'model.decoder.reg_scale',
            ('decoder.reg_scale', 'decoder.decoder.reg_scale'),
        ),
        Rule(
            None,
            ('decoder.anchors', 'decoder.valid_mask'),
            reason='follow from eval_size_hw',
        ),
    ],
    TRANSFORMERS_5,
)
