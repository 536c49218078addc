"""Maps after conversion equal those of the networks that the weights come from.

Against transformers by default; against the makers' own code with the marker
`parity`, from MMB_REFERENCE_DIR.
"""

from collections.abc import Mapping

import pytest
import torch
from backbone_helpers import fill, image, relative_errors
from convert_helpers import ALL, FAMILIES, SAM2_HIERA, shapes_of
from test_hiera import fill_hiera
from test_hiera_parity import _SAM2, official, sam2_trunk, timm  # noqa: F401
from torch import Tensor, nn

from mmbackbones.backbones.convnextv2 import ConvNeXtV2
from mmbackbones.backbones.hgnetv2 import HGNetV2
from mmbackbones.backbones.hiera import Hiera
from mmbackbones.convert import from_ours, to_ours
from mmbackbones.engine.pretrained import load_backbone

HGNETV2 = dict(
    stem_channels=[3, 8, 12],
    stage_in_channels=[12, 16, 24, 32],
    stage_mid_channels=[8, 8, 12, 12],
    stage_out_channels=[16, 24, 32, 40],
    stage_num_blocks=[1, 1, 2, 2],
    stage_downsample=[False, True, True, True],
    stage_light_block=[False, False, True, True],
    stage_kernel_size=[3, 3, 5, 5],
    stage_numb_of_layers=[3, 3, 2, 2],
)


def fill_any(net: nn.Module) -> nn.Module:
    """`fill`, for modules of any maker: no tensor stays as it was made."""
    fill(net)
    with torch.no_grad():
        for name, param in net.named_parameters():
            if 'pos' in name.split('.')[-1] or '.grn.' in name:
                param.copy_(image(*param.shape) - 0.5)
    return net.eval()


def assert_equal_maps(
    ours: nn.Module, theirs: Mapping[str, Tensor], x: Tensor, expected: tuple
) -> None:
    load_backbone(ours.eval(), theirs)
    with torch.no_grad():
        errors = relative_errors(ours(x), expected)
    assert max(errors) < 1e-5


# -- transformers --------------------------------------------------------------------


@pytest.mark.parametrize('size', [(64, 64), (48, 80)])
@pytest.mark.parametrize('affine', [True, False])
def test_hgnetv2_of_transformers(affine, size):
    transformers = pytest.importorskip('transformers', reason='needs transformers')
    arch = dict(HGNETV2, use_learnable_affine_block=affine)
    config = transformers.HGNetV2Config(
        **arch, hidden_sizes=arch['stage_out_channels'], embedding_size=12
    )
    theirs = fill_any(transformers.HGNetV2ForImageClassification(config))
    x = image(2, 3, *size)
    with torch.no_grad():
        expected = theirs(x, output_hidden_states=True).hidden_states[1:]
    assert_equal_maps(HGNetV2(arch, out_indices=ALL), theirs.state_dict(), x, expected)


@pytest.mark.parametrize('size', [(64, 64), (64, 96)])
def test_hiera_of_transformers(size):
    transformers = pytest.importorskip('transformers', reason='needs transformers')
    config = transformers.HieraConfig(
        embed_dim=16, depths=[2, 1, 3, 2], num_heads=[1, 2, 4, 8], image_size=size,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = fill_any(transformers.HieraForImageClassification(config))
    x = image(2, 3, *size)
    with torch.no_grad():
        states = theirs(x, output_hidden_states=True).reshaped_hidden_states[1:]
    ours = Hiera(
        dict(
            embed_dims=16,
            num_heads=1,
            depths=(2, 1, 3, 2),
            pos_embed_size=(size[0] // 4, size[1] // 4),
        ),
        out_indices=ALL,
    )
    expected = [s.permute(0, 3, 1, 2) for s in states]
    assert_equal_maps(ours, theirs.state_dict(), x, expected)


@pytest.mark.parametrize('size', [(128, 128), (128, 192)])
def test_sam2_of_transformers(size):
    transformers = pytest.importorskip('transformers', reason='needs transformers')
    from transformers.models.sam2.modeling_sam2 import Sam2HieraDetModel

    depths = (1, 2, 3, 1)
    config = transformers.Sam2HieraDetConfig(
        hidden_size=16,
        num_attention_heads=1,
        image_size=list(size),
        blocks_per_stage=list(depths),
        embed_dim_per_stage=[16, 32, 64, 128],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        global_attention_blocks=[4],
        window_positional_embedding_background_size=[7, 7],
    )
    theirs = fill_any(Sam2HieraDetModel(config))
    x = image(1, 3, *size)
    with torch.no_grad():
        states = theirs(x).intermediate_hidden_states
    ours = Hiera(
        dict(
            embed_dims=16,
            num_heads=1,
            depths=depths,
            window_spec=(8, 4, 14, 7),
            global_att_blocks=(4,),
            pos_embed='window',
            pos_embed_size=(7, 7),
        ),
        out_indices=ALL,
    )
    expected = [s.permute(0, 3, 1, 2) for s in states]
    assert_equal_maps(ours, theirs.state_dict(), x, expected)


@pytest.mark.parametrize('size', [(64, 64), (64, 96)])
def test_convnextv2_of_transformers(size):
    transformers = pytest.importorskip('transformers', reason='needs transformers')
    arch = dict(channels=(8, 12, 16, 20), depths=(1, 2, 3, 1))
    config = transformers.ConvNextV2Config(
        hidden_sizes=list(arch['channels']), depths=list(arch['depths'])
    )
    theirs = fill_any(transformers.ConvNextV2ForImageClassification(config))
    x = image(2, 3, *size)
    with torch.no_grad():
        expected = theirs(x, output_hidden_states=True).hidden_states[1:]
    ours = ConvNeXtV2(arch, out_indices=ALL)
    assert_equal_maps(ours, theirs.state_dict(), x, expected)


# -- timm ----------------------------------------------------------------------------

_TIMM = [
    *(('HGNetV2', f'b{i}', f'hgnetv2_b{i}') for i in (0, 4)),
    *(('Hiera', a, f'hiera_{a}_224') for a in ('tiny', 'base_plus')),
    *(('Hiera', f'{a}_abswin', f'hiera_{a}_abswin_256') for a in ('small', 'base')),
    ('Hiera', 'sam2_tiny', 'sam2_hiera_tiny'),
    *(('ConvNeXtV2', a, f'convnextv2_{a}') for a in ('atto', 'nano', 'tiny', 'base')),
]


@pytest.mark.parity
@pytest.mark.parametrize(('family', 'arch', 'name'), _TIMM)
def test_timm(timm, family, arch, name):  # noqa: F811
    theirs = fill_any(timm.create_model(name))
    x = image(1, 3, 256, 256) if 'abswin' in arch else image(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.forward_intermediates(x, intermediates_only=True)[-4:]
    ours = FAMILIES[family](arch, out_indices=ALL)
    assert_equal_maps(ours, theirs.state_dict(), x, expected)
    back, _ = from_ours(ours.state_dict(), 'timm')
    assert all(torch.equal(theirs.state_dict()[k], v) for k, v in back.items())


@pytest.mark.parity
@pytest.mark.parametrize(
    ('family', 'arch', 'name'),
    [
        *(('HGNetV2', f'b{i}', f'hgnetv2_b{i}') for i in range(7)),
        *(
            ('Hiera', arch, f'hiera_{arch}_224')
            for arch in ('tiny', 'small', 'base', 'base_plus', 'large', 'huge')
        ),
        *(('Hiera', f'{a}_abswin', f'hiera_{a}_abswin_256') for a in ('small', 'base')),
        *(
            ('Hiera', arch, arch.replace('sam2', 'sam2_hiera'))
            for arch in SAM2_HIERA
            if arch != 'sam2_base_plus'
        ),
        *(('ConvNeXtV2', a, f'convnextv2_{a}') for a in ConvNeXtV2.arch_settings),
    ],
)
def test_names_and_shapes_are_those_of_timm(timm, family, arch, name):  # noqa: F811
    with torch.device('meta'):
        theirs = timm.create_model(name).state_dict()
        ours = FAMILIES[family](arch, out_indices=ALL).state_dict()
    converted, report = to_ours(theirs)
    assert shapes_of(converted) == shapes_of(ours)
    assert all(name.startswith('head.') for name in report.dropped)
    back, _ = from_ours(ours, 'timm')
    assert shapes_of(back) == {
        k: tuple(v.shape) for k, v in theirs.items() if k not in report.dropped
    }


# -- official ------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize('arch', SAM2_HIERA)
def test_the_trunk_of_sam2(sam2_trunk, arch):  # noqa: F811
    theirs = fill_any(sam2_trunk(**_SAM2[arch]))
    x = image(1, 3, 256, 320)
    with torch.no_grad():
        expected = theirs(x)
    state = {f'image_encoder.trunk.{k}': v for k, v in theirs.state_dict().items()}
    state['image_encoder.neck.convs.0.conv.weight'] = torch.zeros(1)
    assert_equal_maps(Hiera(arch, out_indices=ALL), state, x, expected)


@pytest.mark.parity
@pytest.mark.parametrize('model', ['hiera_tiny_224', 'mae_hiera_tiny_224'])
def test_hiera_trained_or_masked(official, model):  # noqa: F811
    module = official.hiera_mae if model.startswith('mae') else official
    theirs = fill_hiera(getattr(module, model)())
    reference = official.hiera_tiny_224()
    reference.load_state_dict(theirs.state_dict(), strict=False)
    x = image(1, 3, 224, 224)
    with torch.no_grad():
        _, states = reference.eval()(x, return_intermediates=True)
    expected = [s.permute(0, 3, 1, 2) for s in states]
    assert_equal_maps(Hiera('tiny', out_indices=ALL), theirs.state_dict(), x, expected)
