"""DEIMv2 as a whole against that of transformers, through the key map."""

import pytest
from backbone_helpers import image
from deimv2_helpers import as_official, neutral_projection
from dfine_helpers import TOY_BACKBONE, calibrate, randomise
from parity_helpers import (
    all_layers,
    compare_distributions,
    compare_with_transformers,
    load_converted,
)
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from mmbackbones.backbones import HGNetV2
from mmbackbones.convert import from_ours, to_ours
from mmbackbones.decoders import DEIMv2Decoder, DEIMv2LiteDecoder
from mmbackbones.necks import DEIMv2ConvEncoder, DEIMv2HybridEncoder, LiteEncoder

transformers = pytest.importorskip('transformers', reason='needs transformers')
if not hasattr(transformers, 'Deimv2ForObjectDetection'):
    pytest.skip(
        f'transformers {transformers.__version__} has no Deimv2ForObjectDetection; '
        '5.23 has',
        allow_module_level=True,
    )

# In the manner of N (convolutions after the branches, two maps), X (none, three maps,
# projections in the decoder) and Atto (a map of a backbone without the last stage).
CASES = dict(
    N=dict(
        encoder=DEIMv2ConvEncoder,
        strides=(16, 32),
        hidden_dim=48,
        fusion=dict(expansion=0.34, depth_mult=0.5),
        attention=dict(use_encoder_idx=(1,), feedforward_channels=40),
        decoder=dict(hidden_dim=48, num_layers=3, num_points=(6, 6)),
    ),
    X=dict(
        encoder=DEIMv2HybridEncoder,
        strides=(8, 16, 32),
        hidden_dim=48,
        attention=dict(use_encoder_idx=(2,), feedforward_channels=40),
        decoder=dict(hidden_dim=32, num_layers=3, num_points=(3, 6, 3)),
    ),
    Atto=dict(
        encoder=LiteEncoder,
        strides=(16,),
        hidden_dim=32,
        fusion=dict(expansion=0.34, depth_mult=0.5),
        decoder=dict(hidden_dim=32, num_layers=3, num_points=(4, 2)),
    ),
)
cases = pytest.mark.parametrize('case', CASES.values(), ids=CASES)
sizes = pytest.mark.parametrize('size', [(128, 128), (96, 160)], ids=str)
SHARED = dict(feedforward_channels=48, num_queries=20)


def backbone_spec(case: dict) -> dict:
    """Stages, in the fields of transformers' configuration."""
    num_stages = 3 if case['encoder'] is LiteEncoder else 4
    spec = {
        name: values[:num_stages] if name.startswith('stage_') else values
        for name, values in TOY_BACKBONE.items()
    }
    return dict(spec, use_learnable_affine_block=True)


def out_stages(case: dict) -> list[int]:
    """Whose maps are taken, from 0."""
    return [{8: 1, 16: 2, 32: 3}[stride] for stride in case['strides']]


def build_theirs(case: dict) -> nn.Module:
    spec, stages, decoder = backbone_spec(case), out_stages(case), case['decoder']
    lite = case['encoder'] is LiteEncoder
    num_levels = len(decoder['num_points'])
    fusion, attention = case.get('fusion', {}), case.get('attention', {})
    config = transformers.Deimv2Config(
        backbone_config=transformers.HGNetV2Config(
            **spec,
            hidden_sizes=spec['stage_out_channels'],
            depths=spec['stage_num_blocks'],
            out_indices=[stage + 1 for stage in stages],
        ),
        freeze_backbone_batch_norms=False,
        num_labels=7,
        feat_strides=list(case['strides']),
        num_feature_levels=num_levels,
        encoder_type='lite' if lite else 'hybrid',
        encoder_layers=0 if lite else 1,
        encoder_in_channels=[spec['stage_out_channels'][stage] for stage in stages],
        encoder_hidden_dim=case['hidden_dim'],
        encoder_ffn_dim=attention.get('feedforward_channels', 1024),
        encode_proj_layers=list(attention.get('use_encoder_idx', ())),
        hidden_expansion=fusion.get('expansion', 1.0),
        depth_mult=float(fusion.get('depth_mult', 1.0)),
        encoder_has_trailing_conv=case['encoder'] is not DEIMv2HybridEncoder,
        d_model=decoder['hidden_dim'],
        decoder_in_channels=[case['hidden_dim']] * num_levels,
        decoder_ffn_dim=SHARED['feedforward_channels'],
        decoder_n_points=list(decoder['num_points']),
        decoder_layers=decoder['num_layers'],
        decoder_activation_function='silu',
        num_queries=SHARED['num_queries'],
        use_gateway=not lite,
        share_bbox_head=lite,
        attn_implementation='eager',
    )
    theirs = transformers.Deimv2ForObjectDetection(config)
    calibrate(randomise(theirs), image(2, 3, 128, 128))
    return neutral_projection(theirs)


def build_ours(case: dict) -> nn.ModuleDict:
    backbone = HGNetV2(backbone_spec(case), out_indices=out_stages(case))
    encoder = case['encoder'](
        backbone.out_channels,
        case['strides'],
        hidden_dim=case['hidden_dim'],
        **case.get('fusion', {}),
        **case.get('attention', {}),
    )
    lite = case['encoder'] is LiteEncoder
    decoder = (DEIMv2LiteDecoder if lite else DEIMv2Decoder)(
        7,
        encoder.out_channels,
        encoder.out_strides,
        **SHARED,
        **case['decoder'],
        eval_size_hw=(128, 128),
    )
    return nn.ModuleDict(dict(backbone=backbone, encoder=encoder, decoder=decoder))


def build_pair(case: dict) -> tuple[nn.ModuleDict, nn.Module]:
    """Ours and theirs in the official form, sharing weights through the key map."""
    ours, theirs = build_ours(case), build_theirs(case)
    return load_converted(ours, theirs, 'DEIMv2'), as_official(theirs).double()


@cases
@sizes
def test_evaluation_equals_that_of_transformers(case, size):
    compare_with_transformers(*build_pair(case), image(2, 3, *size))


@cases
@sizes
def test_all_layers_equal_those_of_transformers(case, size):
    compare_distributions(*all_layers(*build_pair(case), image(2, 3, *size)))


@cases
def test_memory_and_files_of_transformers_are_read_and_written(case, tmp_path):
    theirs = build_theirs(case)
    in_memory = theirs.state_dict()
    state, _ = to_ours(in_memory)
    back, _ = from_ours(state, 'hf')
    assert_close(back, dict(in_memory), rtol=0, atol=0)
    again = type(theirs).from_pretrained(None, config=theirs.config, state_dict=back)
    assert_close(dict(again.state_dict()), back, rtol=0, atol=0)
    # A file holds each tensor once, a shared box head under one of its numbers.
    theirs.save_pretrained(tmp_path)
    from_file, conversion = to_ours(load_file(tmp_path / 'model.safetensors'))
    assert conversion.dropped == {}
    assert_close(from_file, state, rtol=0, atol=0)


def test_a_projection_that_was_trained_is_refused():
    theirs = build_theirs(CASES['N'])
    theirs.model.enc_output[1].bias.data[3] = 0.1
    with pytest.raises(ValueError, match=r'enc_output\.0\.weight .* does not have'):
        to_ours(theirs.state_dict())
