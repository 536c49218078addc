"""RT-DETR, v1 and v2, as a whole against that of transformers, through the key map."""

from functools import cache

import pytest
import torch
from dfine_helpers import calibrate, number_by_rows, randomise
from rtdetr_helpers import STRIDES, build
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from mmbackbones.backbones import ResNetVD
from mmbackbones.convert import from_ours, to_ours

transformers = pytest.importorskip('transformers', reason='needs transformers')

# v1 in the manner of R18, v2 of R101.
CASES = dict(
    v1=dict(
        arch='r18',
        encoder=dict(hidden_dim=32, feedforward_channels=40, expansion=0.5),
        decoder=dict(hidden_dim=32, num_layers=3),
    ),
    v2=dict(
        arch='r50',
        encoder=dict(hidden_dim=48, feedforward_channels=40),
        decoder=dict(hidden_dim=32, num_layers=2, num_points=(3, 3, 3)),
    ),
)
cases = pytest.mark.parametrize('version', CASES)
sizes = pytest.mark.parametrize('size', [(128, 128), (96, 160)], ids=str)


def build_theirs(version: str) -> nn.Module:
    case = CASES[version]
    encoder, decoder = case['encoder'], case['decoder']
    net = ResNetVD(case['arch'])
    points = decoder.get('num_points', (4,))[0]
    extra = dict(decoder_n_levels=3) if version == 'v2' else {}
    prefix = dict(v1='RTDetr', v2='RTDetrV2')[version]
    config = getattr(transformers, f'{prefix}Config')(
        backbone_config=transformers.RTDetrResNetConfig(
            hidden_sizes=[64, 128, 256, 512]
            if case['arch'] == 'r18'
            else [256, 512, 1024, 2048],
            depths=[len(stage.blocks) for stage in net.res_layers],
            layer_type='basic' if case['arch'] == 'r18' else 'bottleneck',
            out_indices=[2, 3, 4],
        ),
        freeze_backbone_batch_norms=False,
        num_labels=7,
        encoder_in_channels=list(net.out_channels),
        encoder_hidden_dim=encoder['hidden_dim'],
        encoder_ffn_dim=encoder['feedforward_channels'],
        hidden_expansion=encoder.get('expansion', 1.0),
        d_model=decoder['hidden_dim'],
        decoder_in_channels=[encoder['hidden_dim']] * 3,
        decoder_ffn_dim=48,
        decoder_n_points=points,
        decoder_layers=decoder['num_layers'],
        num_queries=30,
        **extra,
    )
    return getattr(transformers, f'{prefix}ForObjectDetection')(config)


def build_pair(version: str) -> tuple[nn.ModuleDict, nn.Module]:
    """Ours and theirs, sharing weights through the key map, in evaluation mode."""
    ours, theirs = _build_pair(version)
    return ours.eval(), theirs.eval()


@cache
def _build_pair(version: str) -> tuple[nn.ModuleDict, nn.Module]:
    case = CASES[version]
    theirs = calibrate(randomise(build_theirs(version)), image())
    backbone = ResNetVD(case['arch'])
    spec = dict(
        in_channels=backbone.out_channels,
        in_strides=STRIDES,
        encoder=case['encoder'],
        decoder=dict(
            case['decoder'],
            feedforward_channels=48,
            num_queries=30,
            eval_size_hw=(128, 128),
        ),
    )
    encoder, decoder = build(version, spec, num_classes=7)
    ours = nn.ModuleDict(dict(backbone=backbone, encoder=encoder, decoder=decoder))
    state, conversion = to_ours(theirs.state_dict())
    assert (conversion.source.family, conversion.dropped) == ('RTDETR', {})
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) == {'decoder.anchors', 'decoder.valid_mask'}
    assert set(from_ours(ours.state_dict(), 'hf')[1].dropped) == set(missing)
    # Random networks of this depth amplify the rounding of float32.
    return ours.double(), number_by_rows(theirs).double()


def image(height: int = 128, width: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, height, width, generator=generator)


@cases
@sizes
def test_evaluation_equals_that_of_transformers(version, size):
    ours, theirs = build_pair(version)
    x = image(*size).double()
    with torch.no_grad():
        found = ours.decoder(ours.encoder(ours.backbone(x))).queries
        expected = theirs(x)
    assert expected.logits.std() > 0.1
    assert_close(found.logits[0], expected.logits, atol=1e-5, rtol=1e-5)
    assert_close(found.boxes[0], expected.pred_boxes, atol=1e-5, rtol=1e-5)


@cases
@sizes
def test_all_layers_equal_those_of_transformers(version, size):
    ours, theirs = build_pair(version)
    x = image(*size).double()
    # All layers are returned in training, but statistics must stay what they are.
    ours.decoder.training = theirs.model.decoder.training = True
    with torch.no_grad():
        output = ours.decoder(ours.encoder(ours.backbone(x)))
        expected = theirs.model(x)
    found = output.queries
    for mine, other in (
        (found.logits, expected.intermediate_logits.transpose(0, 1)),
        (found.boxes, expected.intermediate_reference_points.transpose(0, 1)),
        (output.enc_logits, expected.enc_topk_logits),
        (output.enc_boxes, expected.enc_topk_bboxes),
    ):
        assert_close(mine, other, atol=1e-5, rtol=1e-5)


@cases
def test_files_of_transformers_are_read_and_written(version, tmp_path):
    theirs = randomise(build_theirs(version))
    theirs.save_pretrained(tmp_path)
    file = load_file(tmp_path / 'model.safetensors')
    state, _ = to_ours(theirs.state_dict())
    assert_close(to_ours(file)[0], state, rtol=0, atol=0)
    back, conversion = from_ours(state, 'hf')
    assert conversion.dropped == {}
    # A file holds each tensor once, and not under its name of newer versions.
    twice = {name for name in back if name.startswith(('class_embed', 'bbox_embed'))}
    assert_close({n: back[n] for n in back.keys() - twice}, file, rtol=0, atol=0)
    again = type(theirs).from_pretrained(None, config=theirs.config, state_dict=back)
    assert_close(again.state_dict(), theirs.state_dict(), rtol=0, atol=0)
