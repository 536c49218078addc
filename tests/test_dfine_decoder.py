"""The D-FINE decoder: published sizes, initial values, deploy, bad arguments.

The golden file holds a digest of all state-dict names and shapes of encoder and
decoder; it is rewritten with `ACCEPT_GOLDEN=1`.
"""

import math

import pytest
import torch
from dfine_helpers import SIZES, TOYS, build, features, toy_decoder, toys
from golden_helpers import assert_golden_names
from torch import nn
from torch.testing import assert_close

from mmbackbones.decoders import DFINEDecoder
from mmbackbones.decoders.query_selection import prior_bias
from mmbackbones.registry import MODELS

# Published sizes


@pytest.mark.parametrize(
    ('size', 'num_params', 'num_deployed'),
    [  # deployed: encoder and decoder together
        ('N', 1_228_473, 3_753_799 - 1_850_396),
        ('S', 4_449_977, 10_237_491 - 1_850_396),
        ('M', 5_764_398, 19_248_189 - 6_026_626),
        ('L', 8_393_240, 30_724_195 - 13_507_680),
        ('X', 8_689_688, 61_601_635 - 33_231_840),
    ],
)
def test_counts_are_the_published_ones(size, num_params, num_deployed):
    with torch.device('meta'):
        encoder, decoder = build(SIZES[size])
    assert sum(p.numel() for p in decoder.parameters()) == num_params
    encoder.switch_to_deploy()
    decoder.switch_to_deploy()
    deployed = [*encoder.parameters(), *decoder.parameters()]
    assert sum(p.numel() for p in deployed) == num_deployed


@pytest.mark.parametrize('size', SIZES)
def test_names_and_shapes_match_the_golden_file(size):
    with torch.device('meta'):
        network = nn.ModuleDict(
            dict(zip(('encoder', 'decoder'), build(SIZES[size]), strict=True))
        )
    assert_golden_names('dfine_state_dict.json', size, network)


# Initial values


def test_scores_start_at_one_percent():
    _, decoder = build(TOYS['L'])
    assert prior_bias(0.01) == pytest.approx(-4.59512, abs=1e-5)
    for head in (decoder.enc_score_head, *decoder.dec_score_head):
        assert_close(head.bias, torch.full((80,), -math.log(99)))
        assert head.weight.std() > 0


def test_corrections_start_at_zero():
    _, decoder = build(TOYS['L'])
    heads = [decoder.enc_bbox_head, decoder.pre_bbox_head, *decoder.dec_bbox_head]
    heads += [lqe.reg_conf for lqe in decoder.decoder.lqe_layers]
    assert len(heads) == 2 + 6 + 6
    for head in heads:
        assert not head.layers[-1].weight.any()
        assert not head.layers[-1].bias.any()
        assert head.layers[0].weight.std() > 0


@pytest.mark.parametrize('size', ['L', 'X'])
def test_projections_start_uniform_after_xavier(size):
    _, decoder = build(TOYS[size])
    weights = [decoder.enc_output.proj.weight]
    weights += [linear.weight for linear in decoder.query_pos_head.layers]
    if size == 'X':
        weights += [proj.conv.weight for proj in decoder.input_proj]
    else:
        assert not list(decoder.input_proj.parameters())
    for weight in weights:
        bound = (6 / sum(weight.shape[:2])) ** 0.5
        assert 0.95 * bound < weight.abs().max() <= bound


def test_the_denoising_embedding_starts_normal_and_padded():
    _, decoder = build(TOYS['L'])
    weight = decoder.denoising_class_embed.weight.detach()
    assert weight.shape == (81, 32)
    assert weight[:-1].std() == pytest.approx(1, abs=0.06)
    assert not weight[-1].any()


def test_the_published_constants_carry_no_gradient():
    _, decoder = build(SIZES['X'], hidden_dim=16, num_layers=1)
    assert decoder.up.tolist() == [0.5]
    assert decoder.reg_scale.tolist() == [8.0]
    frozen = {n for n, p in decoder.named_parameters() if not p.requires_grad}
    assert frozen == {'up', 'reg_scale'}
    assert decoder.decoder.up is decoder.up
    assert decoder.decoder.reg_scale is decoder.reg_scale


def test_a_fresh_decoder_predicts_its_anchors():
    _, decoder = build(TOYS['L'])
    maps = features(dict(TOYS['L'], in_channels=(32,) * 3), 128, 128)
    output = decoder(tuple(maps))
    boxes = output.queries.boxes
    assert_close(boxes, output.enc_boxes.expand_as(boxes), atol=1e-5, rtol=0)
    assert not output.queries.corners.any()


# Deploy


@toys
@pytest.mark.parametrize('eval_layer', [-1, 0, 1])
def test_a_deployed_decoder_gives_the_same(size, eval_layer):
    decoder, maps = toy_decoder(size, eval_layer=eval_layer)
    with torch.no_grad():
        before = decoder(maps).queries
        names = set(decoder.state_dict())
        decoder.switch_to_deploy()
        assert_close(vars(decoder(maps).queries), vars(before), atol=1e-5, rtol=1e-5)
    assert set(decoder.state_dict()) <= names
    last = eval_layer % TOYS[size]['decoder']['num_layers']
    assert len(decoder.decoder.layers) == last + 1
    heads = [n for n in decoder.state_dict() if n.startswith('dec_score_head')]
    assert heads == [f'dec_score_head.{last}.{leaf}' for leaf in ('weight', 'bias')]


# Bad arguments


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(in_strides=(8, 16)), r'in_strides is \(8, 16\).*in_channels'),
        (dict(num_points=(3, 6)), r'num_points is \(3, 6\).*3 maps'),
        (dict(hidden_dim=36), r'hidden_dim is 36.*num_heads, 8'),
        (dict(eval_layer=6), r'eval_layer is 6.*-6 to 5'),
        (dict(eval_layer=-7), r'eval_layer is -7'),
        (dict(reg_max=33), r'reg_max is 33.*even'),
        (dict(reg_max=2), r'reg_max is 2'),
    ],
)
def test_contradictions_are_named(changes, message):
    valid = dict(
        num_classes=5, in_channels=(16,) * 3, in_strides=(8, 16, 32), hidden_dim=16
    )
    with pytest.raises(ValueError, match=message):
        DFINEDecoder(**{**valid, **changes})


def test_it_is_registered():
    assert MODELS.get('DFINEDecoder') is DFINEDecoder
