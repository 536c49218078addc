"""The whole network against that of transformers, through the key map."""

import pytest
from backbone_helpers import image
from dfine_helpers import TOY_BACKBONE, build, calibrate, number_by_rows, randomise
from parity_helpers import (
    all_layers,
    compare_distributions,
    compare_files,
    compare_with_transformers,
    load_converted,
)
from torch import nn

from mmbackbones.backbones import HGNetV2

transformers = pytest.importorskip('transformers', reason='needs transformers')

# In the manner of N (affine, two maps) and X (projections in the decoder).
CASES = dict(
    N=dict(
        use_lab=True,
        spec=dict(
            in_channels=(32, 40),
            in_strides=(16, 32),
            encoder=dict(
                hidden_dim=32,
                use_encoder_idx=(1,),
                feedforward_channels=40,
                expansion=0.34,
                depth_mult=0.5,
            ),
            decoder=dict(
                hidden_dim=32,
                num_queries=15,
                num_layers=3,
                num_points=(6, 6),
                feedforward_channels=48,
                eval_size_hw=(128, 128),
            ),
        ),
    ),
    X=dict(
        use_lab=False,
        spec=dict(
            in_channels=(24, 32, 40),
            in_strides=(8, 16, 32),
            encoder=dict(hidden_dim=48, feedforward_channels=40),
            decoder=dict(
                hidden_dim=32,
                num_queries=30,
                num_layers=4,
                feedforward_channels=48,
                reg_scale=8,
                eval_size_hw=(128, 128),
            ),
        ),
    ),
)
cases = pytest.mark.parametrize('case', CASES.values(), ids=CASES)
sizes = pytest.mark.parametrize('size', [(128, 128), (96, 160)], ids=str)


def build_theirs(spec: dict, use_lab: bool) -> nn.Module:
    encoder, decoder = spec['encoder'], spec['decoder']
    num_levels = len(spec['in_channels'])
    config = transformers.DFineConfig(
        backbone_config=transformers.HGNetV2Config(
            **TOY_BACKBONE,
            use_learnable_affine_block=use_lab,
            hidden_sizes=TOY_BACKBONE['stage_out_channels'],
            depths=TOY_BACKBONE['stage_num_blocks'],
            out_indices=[2, 3, 4][-num_levels:],
        ),
        freeze_backbone_batch_norms=False,
        num_labels=7,
        feat_strides=list(spec['in_strides']),
        num_feature_levels=num_levels,
        encoder_in_channels=list(spec['in_channels']),
        encoder_hidden_dim=encoder['hidden_dim'],
        encoder_ffn_dim=encoder['feedforward_channels'],
        encode_proj_layers=list(encoder.get('use_encoder_idx', (2,))),
        hidden_expansion=encoder.get('expansion', 1.0),
        depth_mult=encoder.get('depth_mult', 1.0),
        d_model=decoder['hidden_dim'],
        decoder_in_channels=[encoder['hidden_dim']] * num_levels,
        decoder_ffn_dim=decoder['feedforward_channels'],
        decoder_n_points=list(decoder.get('num_points', (3, 6, 3))),
        decoder_layers=decoder['num_layers'],
        num_queries=decoder['num_queries'],
        reg_scale=float(decoder.get('reg_scale', 4)),
        attn_implementation='eager',
    )
    return transformers.DFineForObjectDetection(config)


def build_pair(case: dict) -> tuple[nn.ModuleDict, nn.Module]:
    """Ours and theirs, sharing weights through the key map."""
    spec, use_lab = case['spec'], case['use_lab']
    theirs = calibrate(randomise(build_theirs(spec, use_lab)), image(2, 3, 128, 128))
    num_levels = len(spec['in_channels'])
    encoder, decoder = build(spec, num_classes=7)
    backbone = HGNetV2(
        dict(TOY_BACKBONE, use_learnable_affine_block=use_lab),
        out_indices=(1, 2, 3)[-num_levels:],
    )
    ours = nn.ModuleDict(dict(backbone=backbone, encoder=encoder, decoder=decoder))
    return load_converted(ours, theirs, 'DFINE'), number_by_rows(theirs).double()


@cases
@sizes
def test_evaluation_equals_that_of_transformers(case, size):
    compare_with_transformers(*build_pair(case), image(2, 3, *size))


@cases
@sizes
def test_all_layers_equal_those_of_transformers(case, size):
    compare_distributions(*all_layers(*build_pair(case), image(2, 3, *size)))


@cases
def test_files_of_transformers_are_read_and_written(case, tmp_path):
    compare_files(build_theirs(case['spec'], case['use_lab']), tmp_path)
