"""Optimiser groups: rules, merging, layer-wise decay, the published groups."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, OptimWrapper, build_optim_wrapper
from torch import nn

import mmbackbones  # noqa: F401
from mmbackbones.engine import param_groups
from mmbackbones.engine.param_groups import ParamGroupConstructor, assign_groups

TESTS = Path(__file__).parent


class Backbone(nn.Module):
    """Two layers, and what is not decayed in the families of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
        self.block = nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, 4))  # GRN
        self.scale = nn.Parameter(torch.ones(1))  # LAB

    def get_layer_depth(self, name: str, prefix: str = '') -> tuple[int, int]:
        shallow = name.removeprefix(prefix).startswith(('stem', 'pos_embed'))
        return (0 if shallow else 1), 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 1)  # its weight (1, 4) is no vector
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)


def summary(groups: list) -> dict[str, tuple]:
    return {
        group.name: (group.lr_mult, group.decay_mult, list(group.parameters))
        for group in groups
    }


BACKBONE = [
    'backbone.pos_embed', 'backbone.gamma', 'backbone.scale', 'backbone.stem.weight',
    'backbone.stem.bias', 'backbone.block.weight', 'backbone.block.bias',
]  # fmt: skip


def test_without_rules_all_is_rest_and_frozen_is_left_out() -> None:
    (group,) = assign_groups(Net())
    assert (group.name, group.lr_mult, group.decay_mult) == ('rest', 1.0, 1.0)
    heads = ['norm.weight', 'norm.bias', 'head.weight', 'head.bias']
    assert sorted(group.parameters) == sorted(BACKBONE + heads)


def test_first_match_wins_and_rest_is_last() -> None:
    groups = assign_groups(
        Net(),
        [
            dict(name='backbone', match=r'^backbone\.', lr_mult=0.1),
            dict(name='plain', match=r'norm|bias', decay_mult=0.0),
        ],
    )
    assert summary(groups) == {
        'backbone': (0.1, 1.0, BACKBONE),
        'plain': (1.0, 0.0, ['norm.weight', 'norm.bias', 'head.bias']),
        'rest': (1.0, 1.0, ['head.weight']),
    }


def test_same_options_share_a_group() -> None:
    groups = assign_groups(
        Net(),
        [
            dict(name='norms', match='norm', decay_mult=0.0),
            dict(name='stem', match='stem'),
            dict(name='biases', match='bias$', decay_mult=0.0),
        ],
    )
    names = {group.name: len(group.parameters) for group in groups}
    assert names == {'norms+biases': 4, 'stem+rest': 7}


def test_layer_decay_multiplies_the_rate_of_the_backbone() -> None:
    groups = assign_groups(
        Net(),
        [dict(name='backbone', match=r'^backbone\.', lr_mult=0.5)],
        layer_decay=0.5,
        decay_vectors=False,
    )
    shallow, deep = 0.5 * 0.5**2, 0.5 * 0.5  # depths 0 and 1 out of 3
    vectors = ['backbone.gamma', 'backbone.scale', 'backbone.block.bias']
    assert summary(groups) == {
        'backbone_depth0': (shallow, 1.0, ['backbone.stem.weight']),
        'backbone_depth0_no_decay': (
            shallow, 0.0, ['backbone.pos_embed', 'backbone.stem.bias']),
        'backbone_depth1': (deep, 1.0, ['backbone.block.weight']),
        'backbone_depth1_no_decay': (deep, 0.0, vectors),
        'rest': (1.0, 1.0, ['head.weight']),
        'rest_no_decay': (1.0, 0.0, ['norm.weight', 'norm.bias', 'head.bias']),
    }  # fmt: skip


def test_heads_keep_their_own_rate_where_no_rule_parts_them_from_the_backbone() -> None:
    rates = {
        name: group.lr_mult
        for group in assign_groups(Net(), layer_decay=0.5)
        for name in group.parameters
    }
    heads = {rate for name, rate in rates.items() if 'backbone' not in name}
    assert heads == {1.0}
    assert rates['backbone.stem.weight'] == 0.25
    assert rates['backbone.block.weight'] == 0.5


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(groups=[dict(name='a', match='nothing')]), "'a' \\('nothing'\\)"),
        (
            # The first rule leaves nothing for the second.
            dict(groups=[dict(name='a', match='.'), dict(name='b', match='head')]),
            "'b' \\('head'\\)",
        ),
        (dict(groups=[dict(name='a')]), r"groups\[0\].*lacks \['match'\]"),
        (dict(groups=[dict(name='a', match='.', lr=1)]), r"unknown keys \['lr'\]"),
        (dict(groups=[dict(name='rest', match='.')]), 'each is used once'),
        (dict(layer_decay=0.0), 'layer_decay is 0.0'),
    ],
)
def test_bad_rules_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assign_groups(Net(), **kwargs)


def test_rule_may_match_only_frozen_parameters_or_be_optional() -> None:
    rules = [
        dict(name='fixed', match='^fixed$', lr_mult=0.1),
        dict(name='lab', match='lab', optional=True),
    ]
    assert [group.name for group in assign_groups(Net(), rules)] == ['rest']


def test_layer_decay_needs_depths() -> None:
    with pytest.raises(ValueError, match='get_layer_depth'):
        assign_groups(nn.Linear(1, 1), layer_decay=0.9)


def wrapper_cfg(**paramwise: object) -> dict:
    return dict(
        type='OptimWrapper',
        constructor=ParamGroupConstructor,
        optimizer=dict(type='AdamW', lr=0.2, weight_decay=0.01, fused=True),
        clip_grad=dict(max_norm=0.1),
        paramwise_cfg=paramwise,
    )


def test_constructor_scales_prints_and_passes_fused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules = [dict(name='backbone', match=r'^backbone\.', lr_mult=0.1, decay_mult=0)]
    model = Net()
    logged: list[str] = []
    monkeypatch.setattr(
        param_groups, 'print_log', lambda text, logger: logged.append(text)
    )
    wrapper = build_optim_wrapper(model, wrapper_cfg(groups=rules))
    assert type(wrapper) is OptimWrapper
    backbone, rest = wrapper.optimizer.param_groups
    assert (backbone['name'], backbone['lr'], backbone['weight_decay']) == (
        'backbone', pytest.approx(0.02), 0.0)  # fmt: skip
    assert (rest['name'], rest['lr'], rest['weight_decay']) == ('rest', 0.2, 0.01)
    assert backbone['fused'] is True
    assert wrapper.get_lr()['base_lr'] == [0.2]
    (table,) = logged
    assert re.search(r'backbone +7 +73 +0\.02 +0\n', table)
    assert re.search(r'rest +4 +13 +0\.2 +0\.01\n', table)
    assert re.search(r'\(frozen\) +1 +2 +-', table)
    before = model.head.weight.clone()
    wrapper.update_params(model.head(model.norm(torch.randn(2, 4))).sum())
    assert not torch.equal(model.head.weight, before)


def test_constructor_refuses_what_it_would_ignore() -> None:
    with pytest.raises(ValueError, match=r"\['custom_keys'\]"):
        build_optim_wrapper(Net(), wrapper_cfg(custom_keys={}))
    cfg = wrapper_cfg(groups=[dict(name='a', match='head', decay_mult=0.0)])
    del cfg['optimizer']['weight_decay']
    with pytest.raises(ValueError, match='weight_decay is not set'):
        build_optim_wrapper(Net(), cfg)
    with pytest.raises(ValueError, match='no optimizer'):
        ParamGroupConstructor(dict(type='OptimWrapper'))


def unfold(node: dict | int, prefix: str = '') -> Iterator[str]:
    if node == 0:
        yield prefix[:-1]
        return
    for parts, child in node.items():
        for part in parts.split('|'):
            yield from unfold(child, f'{prefix}{part}.')


class Named(nn.Module):
    """The official parameter names, frozen where the recipe freezes them."""

    def __init__(self, size: str) -> None:
        super().__init__()
        golden = json.loads((TESTS / 'golden' / 'dfine_param_names.json').read_text())
        frozen = r'(up|reg_scale)$'
        if size in 'LX':
            frozen += r'|^backbone\.stem\.'
        self.named = [
            (name, nn.Parameter(torch.empty(1), not re.search(frozen, name)))
            for name in unfold(golden[size])
        ]

    def named_parameters(self, *args: object) -> Iterator:
        return iter(self.named)


# Group sizes counted on the official models with the official expressions; their
# second group (backbone norms, no decay) is empty.
@pytest.mark.parametrize(
    ('size', 'config', 'expected', 'trainable'),
    [
        ('N', 'dfine_nano_hgnetv2_b0_coco', (186, 151, 91), 430 - 2),
        ('S', 'dfine_hgnetv2_b0_coco', (186, 191, 111), 490 - 2),
        ('M', 'dfine_hgnetv2_b2_coco', (262, 242, 140), 646 - 2),
        ('L', 'dfine_hgnetv2_b4_coco', (75, 220, 274), 576 - 7),
        ('X', 'dfine_hgnetv2_b5_coco', (125, 226, 277), 635 - 7),
    ],
)
def test_published_groups(
    size: str, config: str, expected: tuple, trainable: int
) -> None:
    cfg = Config.fromfile(TESTS.parent / 'configs' / f'{config}.py')
    rules = cfg.optim_wrapper.paramwise_cfg
    backbone, plain, rest = assign_groups(Named(size), **rules)
    counts = tuple(len(group.parameters) for group in (backbone, plain, rest))
    assert counts == expected and sum(counts) == trainable
    assert (backbone.name, rest.name) == ('backbone', 'rest')
    assert (backbone.decay_mult, plain.decay_mult, rest.decay_mult) == (1, 0, 1)
    assert (plain.lr_mult, rest.lr_mult) == (1, 1)
    assert all(name.startswith('backbone.') for name in backbone.parameters)
    biases = [name for name in rest.parameters if name.endswith('bias')]
    assert len(biases) == (92 if size in 'LX' else 0)
    assert all(re.search('norm|bn|bias', name) for name in plain.parameters)


@pytest.mark.gpu
def test_fused_adamw_under_amp_with_clipping() -> None:
    model = Net().cuda()
    cfg = {**wrapper_cfg(groups=[]), 'type': AmpOptimWrapper, 'loss_scale': 'dynamic'}
    wrapper = build_optim_wrapper(model, cfg)
    before = model.head.weight.clone()
    with wrapper.optim_context(model):
        loss = model.head(model.norm(torch.randn(2, 4, device='cuda'))).sum()
    wrapper.update_params(loss)
    assert not torch.equal(model.head.weight, before)
