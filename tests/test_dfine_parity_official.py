"""Encoder and decoder against the official code, on the same random weights.

Reference: a checkout of https://github.com/Peterande/D-FINE at
$MMB_REFERENCE_DIR/D-FINE.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from dfine_helpers import (
    TOYS,
    build,
    calibrate,
    features,
    named_tensors,
    randomise,
    targets,
)
from torch import Tensor, nn

from mmbackbones.decoders.denoising import (
    denoising_visible_mask,
    make_denoising_queries,
)
from mmbackbones.layers.position import sincos_position_2d
from mmbackbones.ops.distribution import distance_to_box, weighting_function
from mmbackbones.ops.predictions import BoxTargets, DecoderOutput, QueryPredictions

pytestmark = pytest.mark.parity

toys = pytest.mark.parametrize('size', TOYS)


@pytest.fixture(scope='module')
def official() -> SimpleNamespace:
    """The modules of D-FINE, without importing what its packages import."""
    root = os.environ.get('MMB_REFERENCE_DIR')
    if root is None:
        pytest.skip('MMB_REFERENCE_DIR is not set')
    folder = Path(root) / 'D-FINE' / 'src' / 'zoo' / 'dfine'
    if not folder.is_dir():
        pytest.skip(f'{folder} does not exist')
    stubs = {
        'dfine_network': (),
        'dfine_network.core': (),
        'dfine_network.zoo': (),
        'dfine_network.zoo.dfine': (folder,),
        'torchvision': (),
        'torchvision.ops': (),
        'torchvision.ops.boxes': (),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, paths in stubs.items():
            module = ModuleType(name)
            module.__path__ = [str(p) for p in paths]
            patch.setitem(sys.modules, name, module)
        sys.modules['dfine_network.core'].register = lambda: lambda cls: cls
        sys.modules['torchvision.ops.boxes'].box_area = None
        names = ('hybrid_encoder', 'dfine_decoder', 'dfine_utils', 'denoising')
        yield SimpleNamespace(
            **{
                name: importlib.import_module(f'dfine_network.zoo.dfine.{name}')
                for name in names
            }
        )


class Network(nn.Module):
    """Encoder and decoder in a row."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, maps: list[Tensor], targets: object = None) -> object:
        return self.decoder(self.encoder(list(maps)), targets)


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
        num_classes=80,
        hidden_dim=dec['hidden_dim'],
        num_queries=dec['num_queries'],
        feat_channels=[enc['hidden_dim']] * len(spec['in_channels']),
        feat_strides=list(spec['in_strides']),
        num_levels=len(spec['in_channels']),
        num_points=list(dec.get('num_points', (3, 6, 3))),
        nhead=dec.get('num_heads', 8),
        num_layers=dec['num_layers'],
        dim_feedforward=dec['feedforward_channels'],
        num_denoising=dec['num_denoising'],
        eval_spatial_size=list(dec['eval_size_hw']),
        eval_idx=dec.get('eval_layer', -1),
        reg_scale=dec.get('reg_scale', 4),
    )
    return Network(encoder, decoder)


def build_pair(official: SimpleNamespace, size: str) -> tuple[Network, Network]:
    """Ours and theirs, sharing weights through theirs' state dict."""
    theirs = build_official(official, TOYS[size])
    ours = Network(*build(TOYS[size]))
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {
        k: v.shape for k, v in ours.state_dict().items()
    }
    maps, no_boxes = features(TOYS[size], 128, 128), official_targets(targets(0, 0))
    calibrate(randomise(theirs), maps, no_boxes)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def official_targets(flat: BoxTargets) -> list[dict[str, Tensor]]:
    labels, boxes = flat.labels.split(flat.sizes), flat.boxes.split(flat.sizes)
    return [
        dict(labels=label, boxes=box) for label, box in zip(labels, boxes, strict=True)
    ]


def stacked(final: dict, layers: list[dict], pre: dict | None) -> QueryPredictions:
    layers = [*layers, final] if final else layers
    corners = [layer['pred_corners'] for layer in layers if 'pred_corners' in layer]
    return QueryPredictions(
        torch.stack([layer['pred_logits'] for layer in layers]),
        torch.stack([layer['pred_boxes'] for layer in layers]),
        torch.stack(corners) if corners else None,
        layers[-1].get('ref_points'),
        pre and pre['pred_logits'],
        pre and pre['pred_boxes'],
    )


def as_ours(out: dict) -> DecoderOutput:
    """The official output dictionary as our dataclass, but for the pairs."""
    (enc,) = out.get('enc_aux_outputs', [{}])
    groups = out.get('dn_meta', {}).get('dn_num_group', 0)
    dn = out['dn_outputs'] if groups else None
    return DecoderOutput(
        stacked(out, out.get('aux_outputs', []), out.get('pre_outputs')),
        dn and stacked({}, dn, out['dn_pre_outputs']),
        enc_logits=enc.get('pred_logits'),
        enc_boxes=enc.get('pred_boxes'),
    )


def assert_equal_tensors(ours: dict, theirs: dict, tolerance: float) -> None:
    errors = {
        name: (ours[name] - theirs[name]).abs().max().item()
        / max(1.0, theirs[name].abs().max().item())
        for name in theirs
    }
    print(f'largest error {max(errors.values()):.2e}')
    assert {k: v for k, v in errors.items() if not v <= tolerance} == {}


@toys
def test_evaluation_equals_the_official_one(official, size):
    ours, theirs = build_pair(official, size)
    ours.eval()
    with torch.no_grad():
        maps = features(TOYS[size], 128, 128)
        fused = theirs.encoder(list(maps))
        assert_equal_tensors(
            dict(enumerate(ours.encoder(maps))), dict(enumerate(fused)), 1e-5
        )
        found = named_tensors(ours.decoder(fused))
        expected = named_tensors(as_ours(theirs.decoder(fused)))
    assert expected.keys() == {'queries.logits', 'queries.boxes'}
    assert_equal_tensors(found, expected, 1e-5)


@toys
@pytest.mark.parametrize('sizes', [(0, 0), (3, 0), (2, 7)])
def test_training_and_gradients_equal_the_official_ones(official, size, sizes):
    # Gradients through batch statistics cancel to little: float32 cannot tell.
    ours, theirs = (net.double().train() for net in build_pair(official, size))
    maps = [x.double() for x in features(TOYS[size], 128, 128)]
    truth = targets(*sizes)
    outputs, gradients = [], []
    for net, args in ((ours, truth), (theirs, official_targets(truth))):
        torch.manual_seed(3)  # the same noise in the denoising queries
        output = net(maps, args)
        output = named_tensors(output if net is ours else as_ours(output))
        generator = torch.Generator().manual_seed(4)
        sum(
            (output[name] * torch.randn(output[name].shape, generator=generator)).sum()
            for name in sorted(output)
        ).backward()
        outputs.append(output)
        gradients.append({k: p.grad for k, p in net.named_parameters()})
    assert outputs[0].keys() == outputs[1].keys()
    assert ('denoising.corners' in outputs[0]) == (sum(sizes) > 0)
    assert_equal_tensors(*outputs, 1e-6)

    mine, official_ones = gradients
    untouched = {name for name, grad in official_ones.items() if grad is None}
    expected = {'decoder.up', 'decoder.reg_scale'}
    if not sum(sizes):
        # The official code leaves it out, which stops distributed training.
        expected.add('decoder.denoising_class_embed.weight')
        assert not mine['decoder.denoising_class_embed.weight'].any()
    assert untouched == expected
    scale = max(g.abs().max() for g in official_ones.values() if g is not None)
    errors = {
        name: ((mine[name] - grad).abs().max() / grad.abs().max().clamp(1e-4 * scale))
        for name, grad in official_ones.items()
        if grad is not None
    }
    print(f'largest error of a gradient {max(errors.values()):.2e}')
    assert {k: v for k, v in errors.items() if not v <= 1e-5} == {}


@toys
def test_other_shapes_equal_the_official_ones_with_its_grid_corrected(
    official, size, monkeypatch
):
    ours, theirs = (net.double() for net in build_pair(official, size))
    ours.eval()
    # Anchors and positions of the maps that come in, as upstream does in training.
    theirs.encoder.eval_spatial_size = theirs.decoder.eval_spatial_size = None
    maps = [x.double() for x in features(TOYS[size], 96, 160)]
    with torch.no_grad():
        found = named_tensors(ours(maps))
        transposed = as_ours(theirs(maps)).queries.boxes
        monkeypatch.setattr(
            theirs.encoder,
            'build_2d_sincos_position_embedding',
            lambda w, h, dim, temperature: sincos_position_2d(h, w, dim, temperature),
        )
        expected = named_tensors(as_ours(theirs(maps)))
    assert_equal_tensors(found, expected, 1e-6)
    assert (transposed - expected['queries.boxes']).abs().max() > 1e-3


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
