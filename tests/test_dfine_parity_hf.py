"""The whole network against that of transformers, through the key map."""

import pytest
import torch
from dfine_helpers import TOY_BACKBONE, build, calibrate, number_by_rows, randomise
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from mmbackbones.backbones import HGNetV2
from mmbackbones.convert import from_ours, to_ours

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
    theirs = calibrate(randomise(build_theirs(spec, use_lab)), image())
    num_levels = len(spec['in_channels'])
    encoder, decoder = build(spec, num_classes=7)
    backbone = HGNetV2(
        dict(TOY_BACKBONE, use_learnable_affine_block=use_lab),
        out_indices=(1, 2, 3)[-num_levels:],
    )
    ours = nn.ModuleDict(dict(backbone=backbone, encoder=encoder, decoder=decoder))
    state, conversion = to_ours(theirs.state_dict())
    assert (conversion.source.family, conversion.dropped) == ('DFINE', {})
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) == {'decoder.anchors', 'decoder.valid_mask'}
    # Random networks of this depth amplify the rounding of float32.
    return ours.double().eval(), number_by_rows(theirs).double()


def image(height: int = 128, width: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, height, width, generator=generator)


@cases
@sizes
def test_evaluation_equals_that_of_transformers(case, size):
    ours, theirs = build_pair(case)
    x = image(*size).double()
    with torch.no_grad():
        found = ours.decoder(ours.encoder(ours.backbone(x))).queries
        expected = theirs(x)
    assert expected.logits.std() > 0.1
    assert_close(found.logits[0], expected.logits, atol=1e-5, rtol=1e-5)
    assert_close(found.boxes[0], expected.pred_boxes, atol=1e-5, rtol=1e-5)


@cases
@sizes
def test_all_layers_equal_those_of_transformers(case, size):
    ours, theirs = build_pair(case)
    x = image(*size).double()
    # All layers are returned in training, but statistics must stay what they are.
    ours.decoder.training = theirs.model.decoder.training = True
    with torch.no_grad():
        output = ours.decoder(ours.encoder(ours.backbone(x)))
        expected = theirs.model(x)
    found = output.queries
    pre_logits, logits = expected.intermediate_logits.split((1, len(found.logits)), 1)
    pre_boxes, boxes = expected.intermediate_reference_points.split(
        (1, len(found.logits)), 1
    )
    for mine, other in (
        (found.pre_logits[None], pre_logits),
        (found.logits, logits),
        (found.pre_boxes[None], pre_boxes),
        (found.boxes, boxes),
        (found.corners, expected.intermediate_predicted_corners),
        (output.enc_logits[None], expected.enc_topk_logits[:, None]),
        (output.enc_boxes[None], expected.enc_topk_bboxes[:, None]),
    ):
        assert_close(mine, other.transpose(0, 1), atol=1e-5, rtol=1e-5)


@cases
def test_files_of_transformers_are_read_and_written(case, tmp_path):
    theirs = randomise(build_theirs(case['spec'], case['use_lab']))
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
