"""RT-DETR, v1 and v2, against the official code, on the same random weights.

Reference: a checkout of https://github.com/lyuwenyu/RT-DETR at
$MMB_REFERENCE_DIR/RT-DETR.
"""

from types import SimpleNamespace

import pytest
import torch
from backbone_helpers import fill, image
from dfine_helpers import calibrate, features, randomise, targets
from official_helpers import official_targets, stacked
from parity_helpers import (
    Network,
    assert_equal_gradients,
    assert_equal_tensors,
    compare_evaluation,
    compare_rectangles,
    compare_training,
    shapes,
    untouched_by,
)
from rtdetr_helpers import TOYS, build, build_official, official_modules
from torch.testing import assert_close

from mmbackbones.backbones import HGNetV2, ResNetVD
from mmbackbones.convert import from_ours, to_ours
from mmbackbones.ops.predictions import DecoderOutput

pytestmark = pytest.mark.parity

toys = pytest.mark.parametrize('size', TOYS)
V2_CHOICES = (
    dict(),
    dict(num_points=[2, 4, 1]),
    dict(cross_attn_method='discrete'),
    dict(query_select_method='one2many'),
    dict(query_select_method='agnostic'),
)


@pytest.fixture(scope='module', params=['v1', 'v2'])
def official(request) -> SimpleNamespace:
    with official_modules(request.param) as modules:
        modules.version = request.param
        yield modules


@pytest.fixture(scope='module')
def second() -> SimpleNamespace:
    """The official v2 alone."""
    with official_modules('v2') as modules:
        modules.version = 'v2'
        yield modules


def build_pair(
    official: SimpleNamespace, size: str, **choices: object
) -> tuple[Network, Network]:
    """Ours and theirs, sharing weights through the key map."""
    spec, version = TOYS[size], official.version
    theirs = Network(*build_official(official, version, spec, **choices))
    ours = Network(*build(version, spec, **choices))
    maps = features(spec, 128, 128)
    calibrate(randomise(theirs), maps, official_targets(targets(3, 1)))
    weights, conversion = to_ours(theirs.state_dict())
    assert conversion.source.family == 'RTDETR'
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected
    anchors = {'decoder.anchors', 'decoder.valid_mask'}
    assert set(missing) == (anchors if version == 'v1' else set())
    back, _ = from_ours(ours.state_dict(), dict(v1='rtdetr', v2='rtdetrv2')[version])
    assert back.keys() == theirs.state_dict().keys()
    return ours, theirs


def as_ours(out: dict) -> DecoderOutput:
    """The official output dictionary as our dataclass, but for the pairs."""
    aux = out.get('aux_outputs', [])
    enc = out.get('enc_aux_outputs', aux[-1:])  # v1: the last of the others
    if 'enc_aux_outputs' not in out:
        aux = aux[:-1]
    dn = out.get('dn_aux_outputs')
    return DecoderOutput(
        stacked([*aux, out]),
        dn and stacked(dn),
        enc_logits=enc[0]['pred_logits'] if enc else None,
        enc_boxes=enc[0]['pred_boxes'] if enc else None,
    )


def without_denoising(out: dict) -> DecoderOutput:
    """Of no boxes: v2 has a dummy, whose predictions no loss reads."""
    return as_ours({**out, 'dn_aux_outputs': None})


@toys
def test_evaluation_equals_the_official_one(official, size):
    maps = features(TOYS[size], 128, 128)
    compare_evaluation(*build_pair(official, size), maps, as_ours)


@pytest.mark.parametrize('choices', V2_CHOICES, ids=str)
def test_choices_of_v2_equal_the_official_ones(second, choices):
    maps = features(TOYS['R18'], 128, 128)
    compare_evaluation(*build_pair(second, 'R18', **choices), maps, as_ours)


@toys
@pytest.mark.parametrize('sizes', [(0, 0), (3, 0), (2, 7)])
def test_training_and_gradients_equal_the_official_ones(official, size, sizes):
    compare_gradients(*build_pair(official, size), size, sizes)


@pytest.mark.parametrize('choices', V2_CHOICES[1:], ids=str)
def test_training_with_choices_of_v2_equals_the_official_one(second, choices):
    compare_gradients(*build_pair(second, 'R18', **choices), 'R18', (2, 7))


def compare_gradients(
    ours: Network, theirs: Network, size: str, sizes: tuple[int, ...]
) -> None:
    maps, truth = features(TOYS[size], 128, 128), targets(*sizes)
    reader = as_ours if sum(sizes) else without_denoising
    output, mine, grads = compare_training(ours, theirs, maps, truth, reader)
    assert ('denoising.boxes' in output) == (sum(sizes) > 0)
    nothing = torch.full((1,), torch.nan)
    grads, _ = to_ours({k: nothing if g is None else g for k, g in grads.items()})
    assert grads.keys() <= shapes(ours).keys()
    untouched = {name for name, grad in grads.items() if grad.isnan().any()}
    # Of no boxes v1 leaves the embedding out, v2 sees its dummy.
    expected = {name for name, p in ours.named_parameters() if not p.requires_grad}
    expected |= untouched_by(truth, mine)
    assert untouched <= expected
    assert_equal_gradients(
        mine, {name: grad for name, grad in grads.items() if name not in expected}
    )


@toys
def test_other_shapes_equal_the_official_ones_with_its_grid_corrected(official, size):
    maps = features(TOYS[size], 96, 160)
    compare_rectangles(*build_pair(official, size), maps, as_ours)


@toys
def test_the_deployed_encoder_equals_the_official_one(official, size):
    ours, theirs = build_pair(official, size)
    ours, theirs = ours.encoder.eval(), theirs.encoder
    for module in theirs.modules():
        if hasattr(module, 'convert_to_deploy'):
            module.convert_to_deploy()
    ours.switch_to_deploy()
    maps = features(TOYS[size], 128, 128)
    with torch.no_grad():
        assert_equal_tensors(
            dict(enumerate(ours(maps))), dict(enumerate(theirs(list(maps)))), 1e-5
        )


@pytest.mark.parametrize('arch', ['r18', 'r50'])
@pytest.mark.parametrize('frozen', [False, True])
def test_resnet_vd_equals_the_official_one(official, arch, frozen):
    net = official.presnet.PResNet(
        int(arch[1:]), return_idx=[0, 1, 2, 3], freeze_norm=frozen, freeze_at=-1
    )
    theirs = fill(net).eval()
    ours = ResNetVD(arch, out_indices=(0, 1, 2, 3), frozen_norm=frozen).eval()
    ours.load_state_dict(theirs.state_dict())
    for height, width in ((64, 64), (75, 41)):
        with torch.no_grad():
            x = image(1, 3, height, width)
            assert_close(ours(x), tuple(theirs(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('arch', 'letter'), [('b4', 'L'), ('b5', 'X'), ('b6', 'H')])
def test_names_of_hgnetv2_are_the_official_ones(second, arch, letter):
    with torch.device('meta'):
        theirs = second.hgnetv2.HGNetv2(letter).state_dict()
        ours = HGNetV2(arch).state_dict()
    weights, _ = to_ours(theirs)
    assert {k: v.shape for k, v in weights.items()} == {
        k: v.shape for k, v in ours.items()
    }
    assert from_ours(ours, 'rtdetrv2')[0].keys() == theirs.keys()
