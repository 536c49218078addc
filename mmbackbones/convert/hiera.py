"""Names of Hiera elsewhere, to the official ones, which are ours.

Upstream: https://github.com/facebookresearch/hiera hiera/hiera.py and hiera_mae.py,
https://github.com/huggingface/pytorch-image-models timm/models/hiera.py,
https://github.com/huggingface/transformers src/transformers/models/hiera and sam2,
https://github.com/facebookresearch/sam2 sam2/modeling/backbones/hieradet.py (all
Apache-2.0). The published weights of Hiera are CC BY-NC 4.0, those of SAM 2 and timm's
own ("abswin") Apache-2.0.
"""

import re
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from mmbackbones.convert.keymap import KeyMap, Rule
from mmbackbones.convert.source import APACHE, NON_COMMERCIAL, Source

__all__ = ['SOURCES']

_CLASSIFIER = 'the classifier or its norm, which backbones do not have'
_DECODER = 'for pre-training only'

_BACKBONE = [
    Rule('pos_embed', 'pos_embed'),
    Rule('pos_embed_{leaf}', 'pos_embed_{leaf}'),
    Rule('patch_embed.{path}', 'patch_embed.{path}'),
    Rule('blocks.{path}', 'blocks.{path}'),
]

# Meta's, with or without the decoder of pre-training; timm's; ours
OFFICIAL = KeyMap(
    [
        *_BACKBONE,
        Rule('norm{i}.{leaf}', 'norm{i}.{leaf}'),  # ours with output norms
        Rule('norm.{leaf}', None, reason=_CLASSIFIER),
        Rule('head.{path}', None, reason=_CLASSIFIER),
        Rule('encoder_norm.{leaf}', None, reason=_DECODER),
        Rule('multi_scale_fusion_heads.{path}', None, reason=_DECODER),
        Rule('mask_token', None, reason=_DECODER),
        Rule('decoder_pos_embed', None, reason=_DECODER),
        Rule('decoder_{leaf}.{path}', None, reason=_DECODER),
    ]
)

TIMM_ABSWIN = KeyMap(
    [
        Rule('pos_embed_win', 'pos_embed_window'),
        Rule('head.{path}', None, reason=_CLASSIFIER),
        *(rule for rule in _BACKBONE if rule.sources != 'pos_embed_{leaf}'),
    ]
)

SAM2 = KeyMap(
    [
        Rule('blocks.{n}.mlp.layers.0.{leaf}', 'blocks.{n}.mlp.fc1.{leaf}'),
        Rule('blocks.{n}.mlp.layers.1.{leaf}', 'blocks.{n}.mlp.fc2.{leaf}'),
        *_BACKBONE,
    ]
)

HUGGING_FACE_SAM2 = KeyMap(
    [
        Rule('patch_embed.projection.{leaf}', 'patch_embed.proj.{leaf}'),
        Rule('blocks.{n}.layer_norm{i}.{leaf}', 'blocks.{n}.norm{i}.{leaf}'),
        Rule('blocks.{n}.mlp.proj_in.{leaf}', 'blocks.{n}.mlp.fc1.{leaf}'),
        Rule('blocks.{n}.mlp.proj_out.{leaf}', 'blocks.{n}.mlp.fc2.{leaf}'),
        *(rule for rule in _BACKBONE if rule.sources != 'patch_embed.{path}'),
    ]
)


def hugging_face_table(state_dict: Mapping[str, Tensor]) -> KeyMap:
    """The table of a network: blocks are counted within their stage there.

    Args:
        state_dict: with Hugging Face's names or ours.
    """
    rules = [
        Rule('embeddings.position_embeddings', 'pos_embed'),
        Rule(
            'embeddings.patch_embeddings.projection.{leaf}', 'patch_embed.proj.{leaf}'
        ),
        Rule('pooler.layernorm.{leaf}', None, reason=_CLASSIFIER),
    ]
    depths = _depths(state_dict)
    for i in range(len(depths)):  # stage1 is the first of theirs, norm0 of ours
        norm = f'hidden_states_norms.stage{i + 1}.{{leaf}}'
        rules.append(Rule(norm, f'norm{i}.{{leaf}}'))
    places = [(i, j) for i, depth in enumerate(depths) for j in range(depth)]
    for n, (i, j) in enumerate(places):
        theirs, ours = f'encoder.stages.{i}.layers.{j}', f'blocks.{n}'
        rules += [
            Rule(f'{theirs}.layernorm_before.{{leaf}}', f'{ours}.norm1.{{leaf}}'),
            Rule(f'{theirs}.layernorm_after.{{leaf}}', f'{ours}.norm2.{{leaf}}'),
            Rule(f'{theirs}.{{path}}', f'{ours}.{{path}}'),
        ]
    return KeyMap(rules)


def _depths(state_dict: Mapping[str, Tensor]) -> list[int]:
    """Number of blocks of every stage."""
    names = '\n'.join(state_dict)
    theirs = r'^encoder\.stages\.(\d+)\.layers\.\d+\.attn\.proj\.bias$'
    if stages := re.findall(theirs, names, re.MULTILINE):
        return list(Counter(sorted(map(int, stages))).values())
    num_blocks = len(
        re.findall(r'^blocks\.\d+\.attn\.proj\.bias$', names, re.MULTILINE)
    )
    depths = [0]
    for n in range(num_blocks):  # the first block of a stage widens
        before, after = (state_dict[f'blocks.{n}.norm{i}.weight'] for i in (1, 2))
        if len(before) != len(after):
            depths.append(0)
        depths[-1] += 1
    return depths


SOURCES = (
    Source(
        'Hiera',
        ('timm',),
        TIMM_ABSWIN,
        (r'pos_embed_win', r'blocks\.0\.ls1\.gamma'),
        APACHE,
    ),
    Source(
        'Hiera',
        ('ours', 'official', 'timm'),
        OFFICIAL,
        (
            r'patch_embed\.proj\.weight',
            r'blocks\.0\.mlp\.fc1\.weight',
            r'blocks\.\d+\.proj\.weight|pos_embed_window',  # else it may be any ViT
        ),
        f"{NON_COMMERCIAL} ({APACHE} if SAM 2's or timm's abswin)",
    ),
    Source(
        'Hiera',
        ('hf',),
        hugging_face_table,
        (
            r'embeddings\.position_embeddings',
            r'encoder\.stages\.0\.layers\.0\.attn\.qkv\.weight',
        ),
        NON_COMMERCIAL,
        prefixes=('', 'hiera.'),
    ),
    Source(
        'Hiera',
        ('sam2',),
        SAM2,
        (r'pos_embed_window', r'blocks\.0\.mlp\.layers\.0\.weight'),
        APACHE,
        prefixes=('', 'image_encoder.trunk.'),
    ),
    Source(
        'Hiera',
        ('hf',),
        HUGGING_FACE_SAM2,
        (r'pos_embed_window', r'blocks\.0\.mlp\.proj_in\.weight'),
        APACHE,
        prefixes=('', 'vision_encoder.backbone.'),
    ),
)
