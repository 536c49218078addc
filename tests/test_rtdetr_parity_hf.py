"""RT-DETR, v1 and v2, as a whole against that of transformers, through the key map."""

from functools import cache

import pytest
from backbone_helpers import image
from dfine_helpers import calibrate, number_by_rows, randomise
from parity_helpers import (
    all_layers,
    compare_files,
    compare_with_transformers,
    load_converted,
)
from rtdetr_helpers import STRIDES, build
from torch import nn
from torch.testing import assert_close

from mmbackbones.backbones import ResNetVD
from mmbackbones.convert import from_ours

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
    theirs = calibrate(randomise(build_theirs(version)), image(2, 3, 128, 128))
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
    load_converted(ours, theirs, 'RTDETR')
    dropped = from_ours(ours.state_dict(), 'hf')[1].dropped
    assert set(dropped) == {'decoder.anchors', 'decoder.valid_mask'}
    return ours, number_by_rows(theirs).double()


@cases
@sizes
def test_evaluation_equals_that_of_transformers(version, size):
    compare_with_transformers(*build_pair(version), image(2, 3, *size))


@cases
@sizes
def test_all_layers_equal_those_of_transformers(version, size):
    output, expected = all_layers(*build_pair(version), image(2, 3, *size))
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
    compare_files(build_theirs(version), tmp_path)
