"""Encoder and decoder against the official code, on the same random weights.

Reference: a checkout of https://github.com/Peterande/D-FINE at
$MMB_REFERENCE_DIR/D-FINE.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from dfine_helpers import TOYS, build, calibrate, features, randomise, targets, toys
from official_helpers import (
    as_ours,
    checkout,
    decoder_options,
    official_packages,
    official_targets,
)
from parity_helpers import (
    Network,
    assert_equal_gradients,
    compare_evaluation,
    compare_rectangles,
    compare_training,
    shapes,
    untouched_by,
)
from torch import nn

from mmbackbones.decoders.denoising import (
    denoising_visible_mask,
    make_denoising_queries,
)
from mmbackbones.layers.position import sincos_position_2d
from mmbackbones.ops.distribution import distance_to_box, weighting_function

pytestmark = pytest.mark.parity


@pytest.fixture(scope='module')
def official() -> Iterator[SimpleNamespace]:
    source = checkout('D-FINE', 'src')
    names = ('hybrid_encoder', 'dfine_decoder', 'dfine_utils', 'denoising')
    with official_packages('official_dfine', source, 'zoo', 'zoo.dfine') as load:
        yield SimpleNamespace(**{name: load(f'zoo.dfine.{name}') for name in names})


def build_official(official: SimpleNamespace, spec: dict) -> Network:
    enc, dec = spec['encoder'], spec['decoder']
    encoder = official.hybrid_encoder.HybridEncoder(
        in_channels=list(spec['in_channels']),
        feat_strides=list(spec['in_strides']),
        hidden_dim=enc['hidden_dim'],
        nhead=enc.get('num_heads', 8),
        dim_feedforward=enc['feedforward_channels'],
        use_encoder_idx=list(enc.get('use_encoder_idx', (2,))),
        expansion=enc.get('expansion', 1.0),
        depth_mult=enc.get('depth_mult', 1.0),
        eval_spatial_size=list(dec['eval_size_hw']),
    )
    decoder = official.dfine_decoder.DFINETransformer(
        **decoder_options(
            spec,
            num_points=list(dec.get('num_points', (3, 6, 3))),
            reg_scale=dec.get('reg_scale', 4),
        )
    )
    return Network(encoder, decoder)


def build_pair(official: SimpleNamespace, size: str) -> tuple[Network, Network]:
    """Ours and theirs, sharing weights through theirs' state dict."""
    theirs = build_official(official, TOYS[size])
    ours = Network(*build(TOYS[size]))
    assert shapes(theirs) == shapes(ours)
    maps, no_boxes = features(TOYS[size], 128, 128), official_targets(targets(0, 0))
    calibrate(randomise(theirs), maps, no_boxes)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@toys
def test_evaluation_equals_the_official_one(official, size):
    maps = features(TOYS[size], 128, 128)
    compare_evaluation(*build_pair(official, size), maps, as_ours)


@toys
@pytest.mark.parametrize('sizes', [(0, 0), (3, 0), (2, 7)])
def test_training_and_gradients_equal_the_official_ones(official, size, sizes):
    maps, truth = features(TOYS[size], 128, 128), targets(*sizes)
    output, mine, theirs = compare_training(
        *build_pair(official, size), maps, truth, as_ours
    )
    assert ('denoising.corners' in output) == (sum(sizes) > 0)
    untouched = {'decoder.up', 'decoder.reg_scale'} | untouched_by(truth, mine)
    assert {name for name, grad in theirs.items() if grad is None} == untouched
    assert_equal_gradients(mine, theirs)


@toys
def test_other_shapes_equal_the_official_ones_with_its_grid_corrected(official, size):
    maps = features(TOYS[size], 96, 160)
    compare_rectangles(*build_pair(official, size), maps, as_ours)


@pytest.mark.parametrize('side', [1, 4, 20])
def test_positions_equal_the_official_ones_on_squares(official, side):
    build_grid = official.hybrid_encoder.HybridEncoder
    expected = build_grid.build_2d_sincos_position_embedding(side, side, 64)
    torch.testing.assert_close(sincos_position_2d(side, side, 64), expected)


@pytest.mark.parametrize('sizes', [(1,), (3, 0), (2, 7, 1), (0, 12)])
def test_denoising_equals_the_official_one(official, sizes):
    truth = targets(*sizes, num_classes=5)
    embed = nn.Embedding(6, 8, padding_idx=5)
    torch.manual_seed(5)
    found = make_denoising_queries(truth, embed, 10, 0.5, 1.0)
    torch.manual_seed(5)
    get = official.denoising.get_contrastive_denoising_training_group
    content, box_logits, blocked, meta = get(
        official_targets(truth), 5, 9, embed, 10, 0.5, 1.0
    )
    torch.testing.assert_close(found.content, content)
    torch.testing.assert_close(found.box_logits, box_logits)
    groups = meta['dn_num_group']
    visible = denoising_visible_mask(content.shape[1], groups, 9, content.device)
    if groups == 1:  # the number of those that see all
        first = torch.arange(len(blocked)) < visible
        visible = first[:, None] | ~first
    assert torch.equal(visible, ~blocked)
    pairs = found.pairs
    assert pairs.num_groups == groups
    for i, slots in enumerate(meta['dn_positive_idx']):
        assert torch.equal(pairs.query[pairs.image == i], slots)
        first = sum(sizes[:i])
        expected = torch.arange(first, first + sizes[i]).repeat(groups)
        assert torch.equal(pairs.target[pairs.image == i], expected)


@pytest.mark.parametrize('reg_scale', [4.0, 8.0])
def test_bins_and_boxes_equal_the_official_ones(official, reg_scale):
    up, scale = torch.tensor([0.5]), torch.tensor([reg_scale])
    torch.testing.assert_close(
        weighting_function(32, up, scale),
        official.dfine_utils.weighting_function(32, up, scale),
    )
    boxes, distances = targets(50).boxes, torch.randn(50, 4)
    torch.testing.assert_close(
        distance_to_box(boxes, distances, scale),
        official.dfine_utils.distance2bbox(boxes, distances, scale),
    )
