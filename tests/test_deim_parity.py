"""DEIM's decoders, losses and DEIMv2's matcher against the official code.

Reference: checkouts of https://github.com/Intellindust-AI-Lab/DEIM and DEIMv2 at
$MMB_REFERENCE_DIR/DEIM and DEIMv2.
"""

from collections.abc import Iterator

import pytest
import torch
from criterion_helpers import benchmark, with_gradients
from dfine_helpers import (
    TOYS,
    calibrate,
    features,
    named_tensors,
    randomise,
    targets,
    toys,
)
from official_helpers import (
    Loader,
    as_ours,
    checkout,
    decoder_options,
    official_packages,
    official_targets,
)
from parity_helpers import (
    Network,
    assert_equal_gradients,
    assert_equal_tensors,
    compare_losses,
    compare_training,
    shapes,
)
from torch import nn

from mmbackbones.decoders import DEIMDecoder, DEIMRTDETRv2Decoder
from mmbackbones.losses import DETRCriterion, DFINECriterion
from mmbackbones.losses.classification import MatchabilityTerm
from mmbackbones.losses.matching import ScoreIoUMatcher
from mmbackbones.necks import HybridEncoder

pytestmark = pytest.mark.parity


def official_modules(repository: str) -> Iterator[Loader]:
    """Imports modules of `engine/deim`."""
    source = checkout(repository, 'engine')
    with official_packages(f'official_{repository}', source, 'deim') as load:
        yield lambda name: load(f'deim.{name}')


@pytest.fixture(scope='module')
def deim() -> Iterator[Loader]:
    yield from official_modules('DEIM')


@pytest.fixture(scope='module')
def deimv2() -> Iterator[Loader]:
    yield from official_modules('DEIMv2')


COSTS = {'cost_class': 2, 'cost_bbox': 5, 'cost_giou': 2}


def official_criterion(deim: Loader, *, union: bool) -> nn.Module:
    weights = {'loss_mal': 1, 'loss_bbox': 5, 'loss_giou': 2}
    local = {'loss_fgl': 0.15, 'loss_ddf': 1.5}
    return deim('deim_criterion').DEIMCriterion(
        deim('matcher').HungarianMatcher(COSTS, use_focal_loss=True),
        weights | local if union else weights,
        ['mal', 'boxes', 'local'] if union else ['mal', 'boxes'],
        gamma=1.5,
        num_classes=80,
        reg_max=benchmark.NUM_BINS - 1,
        use_uni_set=union,
    )


def our_criterion(*, union: bool) -> nn.Module:
    kind = DFINECriterion if union else DETRCriterion
    return kind(classification=dict(type=MatchabilityTerm))


@pytest.mark.parametrize('union', [True, False])
@pytest.mark.parametrize('num_layers', [3, 6])
@pytest.mark.parametrize('sizes', [(5,), (3, 0, 9, 2), (40, 3), (350,)])
def test_losses_and_gradients_equal_the_official(
    deim: Loader, sizes: tuple, num_layers: int, union: bool
) -> None:
    output, truth = benchmark.random_batch(
        sizes, num_layers=num_layers, seed=len(sizes)
    )
    leaves = with_gradients(output)
    ours = our_criterion(union=union)(output, truth)
    theirs = benchmark.official_losses(
        official_criterion(deim, union=union), output, truth
    )
    # Its own teacher: 0 here and in D-FINE, not there in DEIM.
    extra = {f'loss_ddf_dn_{num_layers - 1}'} if union else set()
    assert set(ours) - set(theirs) == extra
    assert {name for name in ours if name.startswith('loss_mal')} == {
        'loss_mal',
        *(f'loss_mal_aux_{i}' for i in range(num_layers - 1)),
        *(f'loss_mal_dn_{i}' for i in range(num_layers)),
        'loss_mal_pre',
        'loss_mal_enc_0',
        'loss_mal_dn_pre',
    }
    corners = {name for name in leaves if 'corners' in name}
    assert compare_losses(ours, theirs, leaves) == (set() if union else corners)


@pytest.mark.parametrize('sizes', [(5,), (3, 0, 9, 2), (0, 12), (40, 3)])
@pytest.mark.parametrize('iou_power', [1.0, 4.0])
def test_last_matcher_equals_the_official(
    deimv2: Loader, sizes: tuple, iou_power: float
) -> None:
    output, truth = benchmark.random_batch(sizes, num_layers=2, num_queries=50)
    theirs = deimv2('matcher').HungarianMatcher(
        COSTS,
        use_focal_loss=True,
        change_matcher=True,
        iou_order_alpha=iou_power,
        matcher_change_epoch=45,
    )
    # Boxes close to those of the ground truth, so that the overlap decides.
    boxes = output.queries.boxes
    first = 0
    for image, size in enumerate(sizes):
        near = truth.boxes[first : first + size]
        boxes[:, image, :size] = near * (1 + 0.1 * torch.randn(2, size, 4))
        first += size
    ours = ScoreIoUMatcher(iou_power=iou_power)(output.queries.logits, boxes, truth)
    for layer in range(2):
        predictions = dict(
            pred_logits=output.queries.logits[layer], pred_boxes=boxes[layer]
        )
        found = theirs(predictions, official_targets(truth), epoch=45)['indices']
        query = torch.cat([q + 50 * image for image, (q, _) in enumerate(found)])
        offsets = [sum(sizes[:image]) for image in range(len(sizes))]
        target = torch.cat([t + o for o, (_, t) in zip(offsets, found, strict=True)])
        mine = dict(
            zip(ours.target[layer].tolist(), ours.query[layer].tolist(), strict=True)
        )
        assert mine == dict(zip(target.tolist(), query.tolist(), strict=True))


def official_dfine_decoder(deim: Loader, spec: dict) -> nn.Module:
    dec = spec['decoder']
    return deim('dfine_decoder').DFINETransformer(
        **decoder_options(
            spec,
            num_points=list(dec.get('num_points', (3, 6, 3))),
            reg_scale=dec.get('reg_scale', 4),
            **ACTIVATIONS,
        )
    )


def official_rtdetrv2_decoder(deim: Loader, spec: dict) -> nn.Module:
    return deim('rtdetrv2_decoder').RTDETRTransformerv2(
        **decoder_options(
            spec,
            num_points=list(spec['decoder']['num_points']),
            query_pos_method='as_reg',
            **ACTIVATIONS,
        )
    )


ACTIVATIONS = dict(activation='silu', mlp_act='silu')
DIALECTS = {
    'dfine': (DEIMDecoder, official_dfine_decoder, True),
    'rtdetrv2': (DEIMRTDETRv2Decoder, official_rtdetrv2_decoder, False),
}
dialects = pytest.mark.parametrize('dialect', DIALECTS)


def build_pair(deim: Loader, dialect: str, size: str) -> tuple[Network, Network]:
    """Two networks with our encoder; theirs' decoder gives the weights."""
    kind, official, has_bins = DIALECTS[dialect]
    spec = TOYS[size]
    options = dict(spec['decoder'])
    if not has_bins:
        options.pop('reg_scale', None)
        options.setdefault('num_points', (4, 4, 4))
        spec = dict(spec, decoder=options)

    def encoder() -> HybridEncoder:
        return HybridEncoder(spec['in_channels'], spec['in_strides'], **spec['encoder'])

    neck = encoder()
    theirs = Network(neck, official(deim, spec))
    ours = Network(encoder(), kind(80, neck.out_channels, neck.out_strides, **options))
    assert shapes(theirs) == shapes(ours)
    maps = features(spec, 128, 128)
    calibrate(randomise(theirs), maps, official_targets(targets(2, 1)))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@dialects
@toys
@pytest.mark.parametrize('image_hw', [(128, 128), (96, 160)])
def test_evaluation_equals_the_official_one(
    deim: Loader, dialect: str, size: str, image_hw: tuple
) -> None:
    ours, theirs = (net.double().eval() for net in build_pair(deim, dialect, size))
    if image_hw != (128, 128):
        theirs.decoder.eval_spatial_size = None  # anchors of what comes in
    with torch.no_grad():
        maps = [x.double() for x in features(TOYS[size], *image_hw)]
        found = named_tensors(ours(maps))
        expected = named_tensors(as_ours(theirs(maps)))
    assert expected.keys() == {'queries.logits', 'queries.boxes'}
    assert_equal_tensors(found, expected, 1e-6)


@dialects
@toys
def test_training_and_gradients_equal_the_official_ones(
    deim: Loader, dialect: str, size: str
) -> None:
    maps, truth = features(TOYS[size], 128, 128), targets(2, 7)
    _, *gradients = compare_training(
        *build_pair(deim, dialect, size), maps, truth, as_ours
    )
    assert_equal_gradients(*gradients)
