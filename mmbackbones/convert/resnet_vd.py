"""Names of ResNet-vd elsewhere, to those of RT-DETR's PyTorch code, which are ours.

Upstream: https://github.com/lyuwenyu/RT-DETR
rtdetr_paddle/ppdet/modeling/backbones/resnet.py,
https://github.com/huggingface/transformers
src/transformers/models/rt_detr/modeling_rt_detr_resnet.py, both Apache-2.0, as are
the published weights.
"""

from collections.abc import Mapping
from string import ascii_lowercase

from torch import Tensor

from mmbackbones.convert.keymap import KeyMap, Rule
from mmbackbones.convert.source import APACHE, Source

__all__ = ['SOURCES', 'hugging_face_rules']

# ResNet*_vd_*_from_paddle.pth, and ours
OFFICIAL = KeyMap(
    [
        Rule('conv1.{path}', 'conv1.{path}'),
        Rule('res_layers.{path}', 'res_layers.{path}'),
    ]
)

_LETTERS = (3, 4, 6, 3)  # blocks of each stage, at most

# The last stage but one of 101 layers has more blocks than there are letters for.
_LONG_STAGE = ('res4.res4b1.', 'res_layers.2.blocks.6.')


def _paddle_rules(theirs: str, ours: str) -> list[Rule]:
    """A block of any depth of names; statistics first, they are called otherwise."""
    return [
        Rule(f'{theirs}.{{path}}._mean', f'{ours}.{{path}}.running_mean'),
        Rule(f'{theirs}.{{path}}._variance', f'{ours}.{{path}}.running_var'),
        Rule(f'{theirs}.{{path}}', f'{ours}.{{path}}'),
    ]


def _paddle(state_dict: Mapping[str, Tensor]) -> KeyMap:
    """Blocks have letters there: res2a, res2b, ...; or res4a, res4b1, res4b2, ..."""
    is_long = any(name.startswith(_LONG_STAGE) for name in state_dict)
    rules = [
        Rule(
            None,
            '{path}.num_batches_tracked',
            reason='PaddlePaddle does not count batches',
        ),
        *_paddle_rules('conv1', 'conv1'),
    ]
    for stage, depth in enumerate(_LETTERS):
        name = f'res{stage + 2}'
        blocks = list(ascii_lowercase[:depth])
        if is_long and stage == 2:
            blocks = ['a', *(f'b{i}' for i in range(1, 23))]
        for i, block in enumerate(blocks):
            rules += _paddle_rules(
                f'{name}.{name}{block}', f'res_layers.{stage}.blocks.{i}'
            )
    return KeyMap(rules)


def hugging_face_rules(theirs: str = '', ours: str = '') -> list[Rule]:
    """Rules of the backbone below two prefixes."""
    pairs = [(f'embedder.embedder.{i}', f'conv1.conv1_{i + 1}') for i in range(3)]
    block, our_block = 'encoder.stages.{i}.layers.{j}', 'res_layers.{i}.blocks.{j}'
    pairs += [
        (f'{block}.layer.{k}', f'{our_block}.branch2{letter}')
        for k, letter in enumerate('abc')
    ]
    # Behind a pooling, where the stage shrinks the map, or by itself.
    pairs += [
        (f'{block}.shortcut.1', f'{our_block}.short.conv'),
        (f'{block}.shortcut', f'{our_block}.short'),
    ]
    return [
        Rule(f'{theirs}{there}.{long}.{{leaf}}', f'{ours}{here}.{short}.{{leaf}}')
        for there, here in pairs
        for long, short in (('convolution', 'conv'), ('normalization', 'norm'))
    ]


SOURCES = (
    Source(
        'ResNetVD',
        ('paddle',),
        _paddle,
        (r'conv1\.conv1_1\.norm\._mean', r'res2\.res2a\.branch2a\.conv\.weight'),
        APACHE,
        prefixes=('', 'backbone.'),
    ),
    Source(
        'ResNetVD',
        ('ours', 'rtdetr', 'rtdetrv2'),
        OFFICIAL,
        (
            r'conv1\.conv1_1\.conv\.weight',
            r'res_layers\.0\.blocks\.0\.branch2a\.conv\.weight',
        ),
        APACHE,
    ),
    Source(
        'ResNetVD',
        ('hf',),
        KeyMap(hugging_face_rules()),
        (r'embedder\.embedder\.0\.convolution\.weight',),
        APACHE,
        prefixes=('', 'model.backbone.model.'),
    ),
)
