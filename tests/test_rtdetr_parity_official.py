"""RT-DETR, v1 and v2, against the official code, on the same random weights.

Reference: a checkout of https://github.com/lyuwenyu/RT-DETR at
$MMB_REFERENCE_DIR/RT-DETR.
"""

from types import SimpleNamespace

import pytest
import torch
from backbone_helpers import fill, image
from dfine_helpers import calibrate, features, named_tensors, randomise, targets
from rtdetr_helpers import TOYS, build, build_official, official_modules
from torch import Tensor, nn
from torch.testing import assert_close

from mmbackbones.backbones import HGNetV2, ResNetVD
from mmbackbones.convert import from_ours, to_ours
from mmbackbones.layers.position import sincos_position_2d
from mmbackbones.ops.predictions import BoxTargets, DecoderOutput, QueryPredictions

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


class Network(nn.Module):
    """Encoder and decoder in a row."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, maps: list[Tensor], targets: object = None) -> object:
        return self.decoder(self.encoder(list(maps)), targets)


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


def official_targets(flat: BoxTargets) -> list[dict[str, Tensor]]:
    labels, boxes = flat.labels.split(flat.sizes), flat.boxes.split(flat.sizes)
    return [
        dict(labels=label, boxes=box) for label, box in zip(labels, boxes, strict=True)
    ]


def stacked(layers: list[dict]) -> QueryPredictions:
    return QueryPredictions(
        torch.stack([layer['pred_logits'] for layer in layers]),
        torch.stack([layer['pred_boxes'] for layer in layers]),
    )


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


def assert_equal_tensors(ours: dict, theirs: dict, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    errors = {
        name: (ours[name] - theirs[name]).abs().max().item()
        / max(1.0, theirs[name].abs().max().item())
        for name in theirs
    }
    print(f'largest error {max(errors.values()):.2e}')
    assert {k: v for k, v in errors.items() if not v <= tolerance} == {}


def compare_evaluation(ours: Network, theirs: Network, size: str) -> None:
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
def test_evaluation_equals_the_official_one(official, size):
    compare_evaluation(*build_pair(official, size), size)


@pytest.mark.parametrize('choices', V2_CHOICES, ids=str)
def test_choices_of_v2_equal_the_official_ones(second, choices):
    compare_evaluation(*build_pair(second, 'R18', **choices), 'R18')


@toys
@pytest.mark.parametrize('sizes', [(0, 0), (3, 0), (2, 7)])
def test_training_and_gradients_equal_the_official_ones(official, size, sizes):
    compare_training(*build_pair(official, size), size, sizes)


@pytest.mark.parametrize('choices', V2_CHOICES[1:], ids=str)
def test_training_with_choices_of_v2_equals_the_official_one(second, choices):
    compare_training(*build_pair(second, 'R18', **choices), 'R18', (2, 7))


def compare_training(
    ours: Network, theirs: Network, size: str, sizes: tuple[int, ...]
) -> None:
    # Gradients through batch statistics cancel to little: float32 cannot tell.
    ours, theirs = (net.double().train() for net in (ours, theirs))
    maps = [x.double() for x in features(TOYS[size], 128, 128)]
    truth = targets(*sizes)
    outputs, gradients = [], []
    for net, args in ((ours, truth), (theirs, official_targets(truth))):
        torch.manual_seed(3)  # the same noise in the denoising queries
        output = net(maps, args)
        output = named_tensors(output if net is ours else as_ours(output))
        if not sum(sizes):  # v2 has a dummy, whose predictions no loss reads
            output = {k: v for k, v in output.items() if 'denoising' not in k}
        generator = torch.Generator().manual_seed(4)
        sum(
            (output[name] * torch.randn(output[name].shape, generator=generator)).sum()
            for name in sorted(output)
        ).backward()
        outputs.append(output)
        gradients.append({k: p.grad for k, p in net.named_parameters()})
    assert ('denoising.boxes' in outputs[0]) == (sum(sizes) > 0)
    assert_equal_tensors(*outputs, 1e-6)

    mine, official_ones = gradients
    names = [name for name, _ in to_ours(theirs.state_dict())[0].items()]
    official_ones = to_ours(
        {k: torch.full((1,), torch.nan) if g is None else g
         for k, g in official_ones.items()}
    )[0]  # fmt: skip
    assert official_ones.keys() <= set(names)
    untouched = {name for name, grad in official_ones.items() if grad.isnan().any()}
    expected = {name for name, p in ours.named_parameters() if not p.requires_grad}
    if not sum(sizes):
        # v1 leaves it out, which stops distributed training; v2 sees its dummy.
        expected.add('decoder.denoising_class_embed.weight')
        assert not mine['decoder.denoising_class_embed.weight'].any()
    assert untouched <= expected
    scale = max(g.abs().max() for g in official_ones.values() if not g.isnan().any())
    errors = {
        name: ((mine[name] - grad).abs().max() / grad.abs().max().clamp(1e-4 * scale))
        for name, grad in official_ones.items()
        if name not in expected
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
