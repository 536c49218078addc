"""DEIM's decoders, losses and DEIMv2's matcher against the official code.

Reference: checkouts of https://github.com/Intellindust-AI-Lab/DEIM and DEIMv2 at
$MMB_REFERENCE_DIR/DEIM and DEIMv2.
"""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from dfine_helpers import (
    TOYS,
    calibrate,
    features,
    named_tensors,
    randomise,
    targets,
)
from test_dfine_parity_official import (
    Network,
    as_ours,
    assert_equal_tensors,
    official_targets,
)
from torch import Tensor, nn

from mmbackbones.decoders import DEIMDecoder, DEIMRTDETRv2Decoder
from mmbackbones.losses import DETRCriterion, DFINECriterion
from mmbackbones.losses.classification import MatchabilityTerm
from mmbackbones.losses.matching import ScoreIoUMatcher
from mmbackbones.necks import HybridEncoder

_path = Path(__file__).parents[1] / 'benchmarks' / 'criterion.py'
_spec = importlib.util.spec_from_file_location('criterion_benchmark', _path)
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)

pytestmark = pytest.mark.parity


@contextmanager
def engine_of(repository: str) -> Iterator[functools.partial]:
    """Imports modules of `engine/deim`, without what their packages import."""
    root = os.environ.get('MMB_REFERENCE_DIR')
    if root is None:
        pytest.skip('MMB_REFERENCE_DIR is not set')
    engine = Path(root) / repository / 'engine'
    if not engine.is_dir():
        pytest.skip(f'{engine} does not exist')
    top = f'official_{repository}'
    stubs = {
        top: engine,
        f'{top}.deim': engine / 'deim',
        f'{top}.core': None,
        f'{top}.misc': None,
        f'{top}.misc.dist_utils': None,
        'torchvision': None,
        'torchvision.ops': None,
        'torchvision.ops.boxes': None,
    }
    modules = {name: ModuleType(name) for name in stubs}
    for name, path in stubs.items():
        modules[name].__path__ = [] if path is None else [str(path)]
    modules[f'{top}.core'].register = lambda *args, **kwargs: lambda cls: cls
    dist_utils = modules[f'{top}.misc.dist_utils']
    dist_utils.get_world_size = lambda: 1
    dist_utils.is_dist_available_and_initialized = lambda: False
    modules['torchvision.ops.boxes'].box_area = lambda boxes: (
        (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    )
    with mock.patch.dict(sys.modules, modules):
        yield lambda name: importlib.import_module(f'{top}.deim.{name}')


@pytest.fixture(scope='module')
def deim() -> Iterator[functools.partial]:
    with engine_of('DEIM') as load:
        yield load


@pytest.fixture(scope='module')
def deimv2() -> Iterator[functools.partial]:
    with engine_of('DEIMv2') as load:
        yield load


COSTS = {'cost_class': 2, 'cost_bbox': 5, 'cost_giou': 2}


def official_criterion(deim: functools.partial, *, union: bool) -> nn.Module:
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
    deim: functools.partial, sizes: tuple, num_layers: int, union: bool
) -> None:
    output, truth = benchmark.random_batch(
        sizes, num_layers=num_layers, seed=len(sizes)
    )
    leaves = benchmark.leaves(output)
    for leaf in leaves.values():
        leaf.requires_grad_()
    ours = our_criterion(union=union)(output, truth)
    theirs = benchmark.official_losses(
        official_criterion(deim, union=union), output, truth
    )
    # Its own teacher: 0 here and in D-FINE, not there in DEIM.
    extra = {f'loss_ddf_dn_{num_layers - 1}'} if union else set()
    assert set(ours) - set(theirs) == extra and set(theirs) <= set(ours)
    assert not any(ours[name] for name in extra)
    assert {name for name in ours if name.startswith('loss_mal')} == {
        'loss_mal',
        *(f'loss_mal_aux_{i}' for i in range(num_layers - 1)),
        *(f'loss_mal_dn_{i}' for i in range(num_layers)),
        'loss_mal_pre',
        'loss_mal_enc_0',
        'loss_mal_dn_pre',
    }
    for name, loss in theirs.items():
        torch.testing.assert_close(
            ours[name], loss, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f'{n}: {m}'
        )
    grads = [
        torch.autograd.grad(
            sum(losses.values()), list(leaves.values()), allow_unused=True
        )
        for losses in (ours, theirs)
    ]
    for name, mine, reference in zip(leaves, *grads, strict=True):
        if not union and 'corners' in name:
            assert mine is None and reference is None
            continue
        difference = (mine - reference).abs().max() / reference.abs().max()
        assert difference < 2e-5, f'{name}: {difference:.1e}'


@pytest.mark.parametrize('sizes', [(5,), (3, 0, 9, 2), (0, 12), (40, 3)])
@pytest.mark.parametrize('iou_power', [1.0, 4.0])
def test_last_matcher_equals_the_official(
    deimv2: functools.partial, sizes: tuple, iou_power: float
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


def official_dfine_decoder(deim: functools.partial, spec: dict) -> nn.Module:
    dec = spec['decoder']
    return deim('dfine_decoder').DFINETransformer(
        num_classes=80,
        hidden_dim=dec['hidden_dim'],
        num_queries=dec['num_queries'],
        feat_channels=[spec['encoder']['hidden_dim']] * len(spec['in_channels']),
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
        activation='silu',
        mlp_act='silu',
    )


def official_rtdetrv2_decoder(deim: functools.partial, spec: dict) -> nn.Module:
    dec = spec['decoder']
    return deim('rtdetrv2_decoder').RTDETRTransformerv2(
        num_classes=80,
        hidden_dim=dec['hidden_dim'],
        num_queries=dec['num_queries'],
        feat_channels=[spec['encoder']['hidden_dim']] * len(spec['in_channels']),
        feat_strides=list(spec['in_strides']),
        num_levels=len(spec['in_channels']),
        num_points=list(dec.get('num_points', (4, 4, 4))),
        nhead=dec.get('num_heads', 8),
        num_layers=dec['num_layers'],
        dim_feedforward=dec['feedforward_channels'],
        num_denoising=dec['num_denoising'],
        eval_spatial_size=list(dec['eval_size_hw']),
        eval_idx=dec.get('eval_layer', -1),
        query_pos_method='as_reg',
        activation='silu',
        mlp_act='silu',
    )


DIALECTS = {
    'dfine': (DEIMDecoder, official_dfine_decoder, True),
    'rtdetrv2': (DEIMRTDETRv2Decoder, official_rtdetrv2_decoder, False),
}
dialects = pytest.mark.parametrize('dialect', DIALECTS)
toys = pytest.mark.parametrize('size', TOYS)


def build_pair(
    deim: functools.partial, dialect: str, size: str
) -> tuple[Network, Network]:
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
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {
        k: v.shape for k, v in ours.state_dict().items()
    }
    maps = features(spec, 128, 128)
    calibrate(randomise(theirs), maps, official_targets(targets(2, 1)))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@dialects
@toys
@pytest.mark.parametrize('image_hw', [(128, 128), (96, 160)])
def test_evaluation_equals_the_official_one(
    deim: functools.partial, dialect: str, size: str, image_hw: tuple
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
    deim: functools.partial, dialect: str, size: str
) -> None:
    ours, theirs = (net.double().train() for net in build_pair(deim, dialect, size))
    maps = [x.double() for x in features(TOYS[size], 128, 128)]
    truth = targets(2, 7)
    outputs, gradients = [], []
    for net, args in ((ours, truth), (theirs, official_targets(truth))):
        torch.manual_seed(3)  # the same noise in the denoising queries
        output = net(maps, args)
        output = named_tensors(output if net is ours else official_output(output))
        generator = torch.Generator().manual_seed(4)
        sum(
            (output[name] * torch.randn(output[name].shape, generator=generator)).sum()
            for name in sorted(output)
        ).backward()
        outputs.append(output)
        gradients.append({k: p.grad for k, p in net.named_parameters()})
    assert outputs[0].keys() == outputs[1].keys()
    assert_equal_tensors(*outputs, 1e-6)
    compare_gradients(*gradients)


def official_output(out: dict) -> object:
    """As `as_ours`; RT-DETRv2's has no predictions before refinement."""
    out.setdefault('pre_outputs', None)
    out.setdefault('dn_pre_outputs', None)
    return as_ours(out)


def compare_gradients(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    scale = max(grad.abs().max() for grad in theirs.values() if grad is not None)
    errors = {
        name: ((mine[name] - grad).abs().max() / grad.abs().max().clamp(1e-4 * scale))
        for name, grad in theirs.items()
        if grad is not None
    }
    assert len(errors) > 50
    print(f'largest error of a gradient {max(errors.values()):.2e}')
    assert {k: v for k, v in errors.items() if not v <= 1e-5} == {}
