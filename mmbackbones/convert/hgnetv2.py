"""Names of HGNetV2 elsewhere, to the official ones of D-FINE, which are ours.

Upstream: https://github.com/PaddlePaddle/PaddleClas
ppcls/arch/backbone/legendary_models/pp_hgnet_v2.py,
https://github.com/lyuwenyu/RT-DETR rtdetrv2_pytorch/src/nn/backbone/hgnetv2.py,
https://github.com/huggingface/pytorch-image-models timm/models/hgnet.py,
https://github.com/huggingface/transformers src/transformers/models/hgnet_v2, all
Apache-2.0, as are the published weights.
"""

from mmbackbones.convert.keymap import KeyMap, Rule
from mmbackbones.convert.source import APACHE, Source

__all__ = ['SOURCES', 'hugging_face_rules', 'rtdetr_rules']

_CLASSIFIER = 'the classifier, which backbones do not have'

# D-FINE's PPHGNetV2_B*_stage1.pth, timm, and ours
OFFICIAL = KeyMap(
    [
        Rule('stem.{path}', 'stem.{path}'),
        Rule('stages.{path}', 'stages.{path}'),
        Rule('head.{path}', None, reason=_CLASSIFIER),
    ]
)

_BLOCK = 'stages.{i}.blocks.{j}'
_SQUEEZE = f'{_BLOCK}.aggregation_squeeze_conv'
_EXCITE = f'{_BLOCK}.aggregation_excitation_conv'


def rtdetr_rules(prefix: str = '') -> list[Rule]:
    """Of RT-DETRv2: Paddle's blocks, a padding beside even kernels, torch's norms."""
    pairs = (
        (f'{_SQUEEZE}.{{path}}', f'{_BLOCK}.aggregation.0.{{path}}'),
        (f'{_EXCITE}.{{path}}', f'{_BLOCK}.aggregation.1.{{path}}'),
        ('stem.stem2a.conv.1.{leaf}', 'stem.stem2a.conv.{leaf}'),
        ('stem.stem2b.conv.1.{leaf}', 'stem.stem2b.conv.{leaf}'),
        ('stem.{path}', 'stem.{path}'),
        ('stages.{path}', 'stages.{path}'),
    )
    return [Rule(prefix + theirs, prefix + ours) for theirs, ours in pairs]


PADDLE = KeyMap(
    [
        Rule(f'{_SQUEEZE}.bn._mean', f'{_BLOCK}.aggregation.0.bn.running_mean'),
        Rule(f'{_SQUEEZE}.bn._variance', f'{_BLOCK}.aggregation.0.bn.running_var'),
        Rule(f'{_EXCITE}.bn._mean', f'{_BLOCK}.aggregation.1.bn.running_mean'),
        Rule(f'{_EXCITE}.bn._variance', f'{_BLOCK}.aggregation.1.bn.running_var'),
        Rule(
            None,
            '{path}.num_batches_tracked',
            reason='PaddlePaddle does not count batches',
        ),
        Rule('{path}.bn._mean', '{path}.bn.running_mean'),
        Rule('{path}.bn._variance', '{path}.bn.running_var'),
        Rule(f'{_SQUEEZE}.{{path}}', f'{_BLOCK}.aggregation.0.{{path}}'),
        Rule(f'{_EXCITE}.{{path}}', f'{_BLOCK}.aggregation.1.{{path}}'),
        Rule('stem.{path}', 'stem.{path}'),
        Rule('stages.{path}', 'stages.{path}'),
        Rule('last_conv.weight', None, reason=_CLASSIFIER),
        Rule('lab.{leaf}', None, reason=_CLASSIFIER),
        Rule('fc.{leaf}', None, reason=_CLASSIFIER),  # (in, out), unlike torch's
    ]
)


def hugging_face_rules(theirs: str = '', ours: str = '') -> list[Rule]:
    """Rules of the backbone below two prefixes."""
    return [
        Rule(f'{theirs}{there}.{{path}}.{long}', f'{ours}{here}.{{path}}.{short}')
        for there, here in (('embedder', 'stem'), ('encoder.stages', 'stages'))
        for long, short in (
            ('convolution.{leaf}', 'conv.{leaf}'),
            ('normalization.{leaf}', 'bn.{leaf}'),
            ('lab.{leaf}', 'lab.{leaf}'),
        )
    ]


HUGGING_FACE = KeyMap(
    [
        *hugging_face_rules(),
        # Of B3 to B6 it has the shape of timm's and PaddleClas' and another meaning.
        Rule(
            'fc.{leaf}',
            None,
            reason='a classifier right on the last map, which no one else has',
        ),
    ]
)

SOURCES = (
    Source(
        'HGNetV2',
        ('paddle',),
        PADDLE,
        (r'stem\.stem1\.bn\._mean',),
        APACHE,
        note="trained with HGNetV2(stem_pool_pad='inf')",
    ),
    Source(
        'HGNetV2',
        ('rtdetrv2',),
        KeyMap(rtdetr_rules()),  # PPHGNetV2_*_ssld_pretrained_from_paddle.pth
        (r'stages\.0\.blocks\.0\.aggregation_squeeze_conv\.conv\.weight',),
        APACHE,
    ),
    Source(
        'HGNetV2',
        ('ours', 'dfine', 'timm'),
        OFFICIAL,
        (r'stem\.stem1\.conv\.weight',),
        APACHE,
    ),
    Source(
        'HGNetV2',
        ('hf',),
        HUGGING_FACE,
        (r'embedder\.stem1\.convolution\.weight',),
        APACHE,
    ),
)
