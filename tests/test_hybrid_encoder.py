"""The hybrid encoder: positions, shapes, re-parameterisation, published sizes."""

import math

import pytest
import torch
from dfine_helpers import SIZES, TOYS, build, features, randomise
from torch import nn
from torch.testing import assert_close

from mmbackbones.layers.position import sincos_position_2d
from mmbackbones.layers.reparam import ConvNorm, RepVGGBlock
from mmbackbones.necks import HybridEncoder
from mmbackbones.registry import MODELS

toys = pytest.mark.parametrize('size', TOYS)


@pytest.mark.parametrize(
    ('size', 'num_params'),
    [
        ('N', 703_824),
        ('S', 4_021_504),
        ('M', 7_799_040),
        ('L', 9_343_232),
        ('X', 20_700_032),
    ],
)
def test_counts_are_the_published_ones(size, num_params):
    with torch.device('meta'):
        encoder, _ = build(SIZES[size])
    assert sum(p.numel() for p in encoder.parameters()) == num_params


@toys
@pytest.mark.parametrize(('height', 'width'), [(32, 32), (96, 160), (97, 131)])
def test_maps_keep_their_sizes(size, height, width):
    encoder, _ = build(TOYS[size])
    maps = features(TOYS[size], height, width)
    outs = encoder(maps)
    assert isinstance(outs, tuple)
    assert encoder.out_strides == TOYS[size]['in_strides']
    assert [x.shape for x in outs] == [
        (2, c, *x.shape[2:]) for c, x in zip(encoder.out_channels, maps, strict=True)
    ]


def test_one_image_and_one_map_are_enough():
    encoder = HybridEncoder((6,), (32,), 8, use_encoder_idx=(0,)).eval()
    (out,) = encoder((torch.randn(1, 6, 1, 1),))
    assert out.shape == (1, 8, 1, 1)


@toys
def test_every_parameter_gets_a_gradient(size):
    encoder, _ = build(TOYS[size])
    sum(x.sin().sum() for x in encoder(features(TOYS[size], 64, 96))).backward()
    assert {n for n, p in encoder.named_parameters() if p.grad is None} == set()


@toys
def test_one_image_has_the_gradients_that_it_has_beside_another(size):
    encoder = randomise(build(TOYS[size])[0]).double().eval()
    pair = [x.double() for x in features(TOYS[size], 96, 96)]
    grads = []
    for num in (1, 2):
        maps = [x[:num].clone().requires_grad_() for x in pair]
        sum(x[:1].sin().sum() for x in encoder(tuple(maps))).backward()
        grads.append([x.grad[0] for x in maps])
    assert_close(*grads)


@toys
def test_deployed_maps_are_the_same(size):
    encoder = randomise(build(TOYS[size])[0]).eval()
    maps = features(TOYS[size], 64, 96)
    with torch.no_grad():
        before = encoder(maps)
        names = encoder.state_dict().keys()
        encoder.switch_to_deploy()
        encoder.switch_to_deploy()  # nothing left to do
        assert_close(encoder(maps), before, atol=1e-5, rtol=1e-5)
    norms = [n for n, m in encoder.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == [f'input_proj.{i}.norm' for i in range(len(maps))]
    assert not any(n.endswith('.conv1.norm.weight') for n in encoder.state_dict())
    assert 'lateral_convs.0.conv.weight' in names & encoder.state_dict().keys()


def test_deploying_a_block_in_training_mode_uses_running_statistics():
    block = randomise(nn.Sequential(ConvNorm(4, 4, 3, 2, 4), RepVGGBlock(4))).eval()
    x = torch.randn(2, 4, 5, 5)
    expected = block(x)
    block.train()
    for module in block:
        module.switch_to_deploy()
    assert_close(block(x), expected)


def test_rows_come_first_in_the_positions():
    pos = sincos_position_2d(2, 3, 8)[0].view(2, 3, 8)
    # two frequencies, 1 and 10000^(-1/2) = 0.01: sin y, cos y, sin x, cos x
    for y in range(2):
        for x in range(3):
            expected = [f(i * w) for i in (y, x) for f in SIN_COS for w in (1, 0.01)]
            assert pos[y, x].tolist() == pytest.approx(expected)


SIN_COS = (math.sin, math.cos)


def test_positions_follow_rows_and_columns_on_any_shape():
    wide = sincos_position_2d(3, 5, 16)[0].view(3, 5, 2, 8)
    tall = sincos_position_2d(5, 3, 16)[0].view(5, 3, 2, 8)
    assert_close(wide.transpose(0, 1).flip(2), tall)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(in_strides=(8, 16)), r'in_strides is \(8, 16\).*in_channels'),
        (dict(in_strides=(8, 16, 64)), r'in_strides is \(8, 16, 64\).*twice'),
        (dict(hidden_dim=30), r'hidden_dim is 30.*num_heads, 8'),
        (dict(hidden_dim=6, num_heads=3), r'hidden_dim is 6.*multiple of 4'),
        (dict(use_encoder_idx=(3,)), r'use_encoder_idx is \(3,\).*0 to 2'),
        (dict(use_encoder_idx=(-1,)), r'use_encoder_idx is \(-1,\)'),
    ],
)
def test_contradictions_are_named(changes, message):
    valid = dict(in_channels=(4, 4, 4), in_strides=(8, 16, 32), hidden_dim=16)
    with pytest.raises(ValueError, match=message):
        HybridEncoder(**{**valid, **changes})


def test_it_is_registered():
    assert MODELS.get('HybridEncoder') is HybridEncoder


@pytest.mark.parametrize('num_layers', [0, 2])
def test_transformer_layers_are_counted(num_layers):
    encoder = HybridEncoder(
        (4, 4), (16, 32), 16, (0, 1), num_layers, num_heads=2, feedforward_channels=8
    )
    assert [len(m.layers) for m in encoder.encoder] == [num_layers] * 2
    assert len(encoder((torch.randn(2, 4, 4, 4), torch.randn(2, 4, 2, 2)))) == 2
