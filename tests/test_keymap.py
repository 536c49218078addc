"""Rules that rename state dicts: each kind by hand, and the tables as bijections."""

import pytest
import torch
from dfine_helpers import TOY_BACKBONE, TOYS, build
from torch import Tensor

from mmbackbones.backbones import HGNetV2
from mmbackbones.convert.dfine import HUGGING_FACE
from mmbackbones.convert.keymap import CONCAT_QKV, KeyMap, Rule, Transform

TRANSPOSE = Transform(lambda x: [x[0].T], lambda x: [x[0].T])


def tensors(*names: str) -> dict[str, Tensor]:
    return {name: torch.full((2, 3), float(i)) for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ('rules', 'names', 'expected'),
    [
        ([], [], []),
        ([Rule('a.weight', 'b.w')], ['a.weight'], ['b.w']),
        ([Rule('a.{n}.{leaf}', 'b{n}.{leaf}')], ['a.12.bias'], ['b12.bias']),
        ([Rule('a.{n}.{m}', 'b.{m}.{n}')], ['a.1.2'], ['b.2.1']),
        ([Rule('a.{n}.x{n}', 'b.{n}')], ['a.3.x3'], ['b.3']),
        ([Rule('a.{path}.bn.{leaf}', '{path}.{leaf}')], ['a.b.c.bn.d'], ['b.c.d']),
        # the first that fits decides
        ([Rule('a.0', 'z'), Rule('a.{n}', 'b.{n}')], ['a.0', 'a.1'], ['z', 'b.1']),
        ([Rule('a.{n}', 'b.{n}'), Rule('a.0', 'z')], ['a.0', 'a.1'], ['b.0', 'b.1']),
        ([Rule('up', ('up', 'inner.up'))], ['up'], ['up', 'inner.up']),
    ],
)  # fmt: skip
def test_names_by_hand(rules, names, expected):
    state = tensors(*names)
    result, report = KeyMap(rules).convert(state)
    assert list(result) == expected
    assert all(any(v is w for w in state.values()) for v in result.values())
    report.raise_if_lossy()


@pytest.mark.parametrize(
    ('pattern', 'key'),
    [
        ('a.{n}', 'a.x'),  # a number
        ('a.{leaf}', 'a.b.c'),  # no dots
        ('a.{leaf}', 'a.'),  # not nothing
        ('a.b', 'a-b'),  # a dot is a dot
        ('a', 'ab'),  # all of the name
        ('a.{n}.{n}', 'a.1.2'),  # the same twice
    ],
)
def test_what_does_not_fit_is_reported(pattern, key):
    rule = Rule(pattern, pattern)
    result, report = KeyMap([rule]).convert(tensors(key))
    assert result == {}
    assert report.unmapped == [key]
    assert report.unused == [rule]
    with pytest.raises(ValueError, match='1 keys match no rule'):
        report.raise_if_lossy()


def test_dropped_keys_come_with_the_reason():
    table = KeyMap([Rule('head.{path}', None, reason='classes differ')])
    result, report = table.convert(tensors('head.fc.weight', 'head.fc.bias'))
    assert result == {}
    assert report.dropped == {
        'head.fc.weight': 'classes differ',
        'head.fc.bias': 'classes differ',
    }
    report.raise_if_lossy()


def test_keys_of_the_result_alone_are_dropped_on_the_way_back():
    table = KeyMap([Rule(None, 'anchors', reason='computed')])
    assert table.convert({})[1].unused == []
    assert table.inverse().convert(tensors('anchors'))[1].dropped == {
        'anchors': 'computed'
    }


@pytest.mark.parametrize('rule', [('a', None), (None, 'a')])
def test_dropping_without_a_reason_is_refused(rule):
    with pytest.raises(ValueError, match='give a reason'):
        Rule(*rule)


def test_unknown_placeholders_are_refused():
    with pytest.raises(ValueError, match=r"\{name\} in 'a.\{name\}'.*leaf"):
        KeyMap([Rule('a.{name}', 'b.{name}')])


def test_transforms_are_applied_and_undone():
    table = KeyMap([Rule('fc.{leaf}', 'linear.{leaf}', TRANSPOSE)])
    state = tensors('fc.weight')
    result, _ = table.convert(state)
    assert result['linear.weight'].shape == (3, 2)
    back, _ = table.inverse().convert(result)
    assert torch.equal(back['fc.weight'], state['fc.weight'])


def test_parts_are_joined_in_the_order_of_the_rule():
    rule = Rule(('q.{n}', 'k.{n}', 'v.{n}'), 'qkv.{n}', CONCAT_QKV)
    state = tensors('v.0', 'q.0', 'k.0', 'q.1', 'k.1', 'v.1')
    result, report = KeyMap([rule]).convert(state)
    report.raise_if_lossy()
    assert result['qkv.0'][::2, 0].tolist() == [1, 2, 0]
    assert result['qkv.1'][::2, 0].tolist() == [3, 4, 5]
    back, _ = KeyMap([rule]).inverse().convert(result)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_missing_parts_are_reported():
    rule = Rule(('q.{n}', 'k.{n}', 'v.{n}'), 'qkv.{n}', CONCAT_QKV)
    result, report = KeyMap([rule]).convert(tensors('q.0', 'v.0'))
    assert result == {}
    assert report.incomplete == ['q.0', 'v.0']
    with pytest.raises(ValueError, match='2 lack their partners'):
        report.raise_if_lossy()


def test_any_name_of_an_alias_is_enough_but_they_must_agree():
    table = KeyMap([Rule(('head', 'tied.head'), 'head')])
    for name in ('head', 'tied.head'):
        assert list(table.convert(tensors(name))[0]) == ['head']
    tied = torch.ones(2)
    assert list(table.convert({'head': tied, 'tied.head': tied})[0]) == ['head']
    with pytest.raises(ValueError, match=r'tied.head and head are names of one tensor'):
        table.convert(tensors('head', 'tied.head'))


def official_state(size: str) -> dict[str, Tensor]:
    """Random values under all names of a toy D-FINE with its backbone."""
    generator = torch.Generator().manual_seed(0)
    encoder, decoder = build(TOYS[size])
    backbone = HGNetV2(dict(TOY_BACKBONE, use_learnable_affine_block=size == 'N'))
    state = {
        f'{part}.{name}': value
        for part, module in (
            ('backbone', backbone),
            ('encoder', encoder),
            ('decoder', decoder),
        )
        for name, value in module.state_dict().items()
    }
    return {
        name: torch.rand(value.shape, generator=generator)
        if value.is_floating_point() and not name.endswith(('.up', '.reg_scale'))
        else value
        for name, value in state.items()
    }


def test_the_hugging_face_table_is_a_bijection():
    unused = set(HUGGING_FACE.rules)
    for size in TOYS:
        state = official_state(size)
        theirs, report = HUGGING_FACE.inverse().convert(state)
        report.raise_if_lossy()
        assert report.dropped.keys() == {'decoder.anchors', 'decoder.valid_mask'}
        back, report = HUGGING_FACE.convert(theirs)
        report.raise_if_lossy()
        assert state.keys() - back.keys() == {'decoder.anchors', 'decoder.valid_mask'}
        assert all(torch.equal(back[name], state[name]) for name in back)
        again, _ = HUGGING_FACE.inverse().convert(back)
        assert again.keys() == theirs.keys()
        assert all(torch.equal(again[name], theirs[name]) for name in theirs)
        unused &= set(report.unused)
    assert unused == set()


def test_two_tensors_of_one_name_are_refused():
    table = KeyMap(
        [Rule('proj.{n}.0.{leaf}', 'proj.{n}.{leaf}'), Rule('{path}', '{path}')]
    )
    with pytest.raises(
        ValueError, match=r'proj.1.0.w and proj.1.w both become proj.1.w'
    ):
        table.convert(tensors('proj.1.0.w', 'proj.1.w'))
