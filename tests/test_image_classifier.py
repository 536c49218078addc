"""Class logits equal those of the makers, through the converter."""

import pytest
import torch
from backbone_helpers import image
from convert_helpers import ALL
from test_convert_numbers import HGNETV2, fill_any
from test_convnextv2 import official as official_convnextv2  # noqa: F401
from test_hiera import fill_hiera
from test_hiera_parity import official as official_hiera  # noqa: F401
from test_hiera_parity import timm  # noqa: F401

from mmbackbones.backbones.hgnetv2 import HGNetV2
from mmbackbones.classifiers import ImageClassifier
from mmbackbones.convert import classifier_to_ours, from_ours
from mmbackbones.convert.hgnetv2 import PADDLE

CONVNEXTV2 = dict(channels=(8, 12, 16, 20), depths=(1, 2, 3, 1))
TOYS = {
    'HGNetV2': dict(HGNETV2, use_learnable_affine_block=True),
    'Hiera': dict(
        embed_dims=16, num_heads=1, depths=(2, 1, 3, 2), pos_embed_size=(16, 16)
    ),
    'ConvNeXtV2': CONVNEXTV2,
}


def assert_equal_logits(ours, state_dict, x, expected):
    converted, _ = classifier_to_ours(state_dict)
    missing, unexpected = ours.load_state_dict(converted, strict=False)
    assert not unexpected
    assert all('num_batches_tracked' in name for name in missing), missing
    with torch.no_grad():
        logits = ours.eval()(x)
    assert logits.std() > 0
    torch.testing.assert_close(
        logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def transformers_model(family):
    transformers = pytest.importorskip('transformers', reason='needs transformers')
    if family == 'HGNetV2':
        arch = TOYS[family]
        config = transformers.HGNetV2Config(
            **arch, hidden_sizes=arch['stage_out_channels'], embedding_size=12
        )
        return transformers.HGNetV2ForImageClassification(config)
    if family == 'Hiera':
        config = transformers.HieraConfig(
            embed_dim=16, depths=[2, 1, 3, 2], num_heads=[1, 2, 4, 8],
            image_size=(64, 64), layer_norm_eps=1e-6,
        )  # fmt: skip
        return transformers.HieraForImageClassification(config)
    config = transformers.ConvNextV2Config(
        hidden_sizes=list(CONVNEXTV2['channels']),
        depths=list(CONVNEXTV2['depths']),
        layer_norm_eps=1e-6,
    )
    return transformers.ConvNextV2ForImageClassification(config)


@pytest.mark.parametrize('family', TOYS)
def test_logits_equal_those_of_transformers(family):
    theirs = fill_any(transformers_model(family))
    x = image(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(x).logits
    ours = ImageClassifier(
        dict(type=family, arch=TOYS[family]),
        num_classes=expected.shape[1],
        expand_channels=None,
    )
    assert_equal_logits(ours, theirs.state_dict(), x, expected)


_TIMM = [
    ('HGNetV2', 'b0', 'hgnetv2_b0'),
    ('HGNetV2', 'b4', 'hgnetv2_b4'),
    ('Hiera', 'tiny', 'hiera_tiny_224'),
    ('Hiera', 'base_plus', 'hiera_base_plus_224'),
    ('ConvNeXtV2', 'atto', 'convnextv2_atto'),
    ('ConvNeXtV2', 'base', 'convnextv2_base'),
]


@pytest.mark.parity
@pytest.mark.parametrize(('family', 'arch', 'name'), _TIMM)
@pytest.mark.parametrize('size', [(224, 224), (192, 256)])
def test_logits_equal_those_of_timm(timm, family, arch, name, size):  # noqa: F811
    if family == 'Hiera' and size != (224, 224):
        pytest.skip('its classifiers take 224 x 224')
    theirs = fill_any(timm.create_model(name))
    x = image(1, 3, *size)
    with torch.no_grad():
        expected = theirs(x)
    ours = ImageClassifier(dict(type=family, arch=arch))
    assert_equal_logits(ours, theirs.state_dict(), x, expected)


@pytest.mark.parity
@pytest.mark.parametrize('arch', ['tiny', 'base_plus'])
def test_hiera_logits_equal_the_official(official_hiera, arch):  # noqa: F811
    theirs = fill_hiera(getattr(official_hiera, f'hiera_{arch}_224')()).eval()
    theirs.head.act_func = torch.nn.Identity()  # probabilities in evaluation there
    x = image(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs(x)
    ours = ImageClassifier(dict(type='Hiera', arch=arch))
    assert_equal_logits(ours, theirs.state_dict(), x, expected)


@pytest.mark.parity
@pytest.mark.parametrize('arch', ['atto', 'base'])
def test_convnextv2_logits_equal_the_official(official_convnextv2, arch):  # noqa: F811
    theirs = fill_any(getattr(official_convnextv2, f'convnextv2_{arch}')())
    x = image(1, 3, 160, 224)
    with torch.no_grad():
        expected = theirs(x)
    ours = ImageClassifier(dict(type='ConvNeXtV2', arch=arch))
    assert_equal_logits(ours, theirs.state_dict(), x, expected)


def test_paddle_keeps_the_linear_layer_the_other_way_round():
    arch = TOYS['HGNetV2']
    ours = fill_any(ImageClassifier(dict(type='HGNetV2', arch=arch), 10, 24))
    names = PADDLE.inverse()
    theirs, _ = names.convert(
        {
            name.removeprefix('backbone.'): value
            for name, value in ours.state_dict().items()
            if name.startswith('backbone.')
        }
    )
    for name, value in ours.head.state_dict().items():
        theirs[name] = value.T if name == 'fc.weight' else value
    x = image(2, 3, 64, 64)
    with torch.no_grad():
        expected = ours(x)
    other = ImageClassifier(dict(type='HGNetV2', arch=arch), 10, 24)
    assert_equal_logits(other, theirs, x, expected)


def official_convnextv2_state() -> tuple[ImageClassifier, dict]:
    """A classifier, and its weights under the names of the authors."""
    ours = fill_any(ImageClassifier(dict(type='ConvNeXtV2', arch=CONVNEXTV2), 10))
    head = {'head.norm.': 'norm.', 'head.fc.': 'head.', 'backbone.': ''}
    state = {}
    for name, value in ours.state_dict().items():
        (prefix, theirs), *_ = (x for x in head.items() if name.startswith(x[0]))
        state[theirs + name.removeprefix(prefix)] = value
    return ours, state


def test_names_below_a_wrapper_of_torch_are_known():
    ours, state = official_convnextv2_state()
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        expected = ours(x)
    other = ImageClassifier(dict(type='ConvNeXtV2', arch=CONVNEXTV2), 10)
    wrapped = {f'module.{name}': value for name, value in state.items()}
    assert_equal_logits(other, wrapped, x, expected)


def test_mmpretrain_has_the_norm_of_the_head_in_its_backbone():
    ours, state = official_convnextv2_state()
    backbone = {k: v for k, v in state.items() if not k.startswith(('norm.', 'head.'))}
    theirs, _ = from_ours(backbone, 'mmpretrain')
    theirs = {f'backbone.{name}': value for name, value in theirs.items()}
    for leaf in ('weight', 'bias'):
        theirs[f'backbone.norm3.{leaf}'] = state[f'norm.{leaf}']
        theirs[f'head.fc.{leaf}'] = state[f'head.{leaf}']
    theirs['data_preprocessor.mean'] = torch.zeros(3)
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        expected = ours(x)
    other = ImageClassifier(dict(type='ConvNeXtV2', arch=CONVNEXTV2), 10)
    assert_equal_logits(other, theirs, x, expected)
    _, report = classifier_to_ours(theirs)
    assert 'data_preprocessor.mean' in report.dropped


@pytest.mark.parity
def test_logits_of_video_equal_the_official(official_hiera):  # noqa: F811
    depths = (1, 1, 2, 1)
    theirs = official_hiera.hiera_base_16x224(
        embed_dim=16, num_heads=1, stages=depths, num_classes=10, head_dropout=0.0
    )
    fill_hiera(theirs).eval().head.act_func = torch.nn.Identity()
    x = image(1, 3, 16, 224, 224)
    with torch.no_grad():
        expected = theirs(x)
    spec = dict(embed_dims=16, num_heads=1, depths=depths)
    ours = ImageClassifier(dict(type='Hiera', arch=spec, num_frames=16), 10)
    assert_equal_logits(ours, theirs.state_dict(), x, expected)


def test_logits_of_video_come_out():
    arch = dict(TOYS['Hiera'], depths=(1, 1, 1, 1))
    model = ImageClassifier(dict(type='Hiera', arch=arch, num_frames=4), 10)
    assert model(image(2, 3, 4, 32, 64)).shape == (2, 10)


@pytest.mark.parametrize(
    ('backbone', 'head'),
    [
        (dict(type='HGNetV2Lite', arch='atto'), {'last_conv', 'lab', 'fc'}),
        (dict(type='ResNetVD', arch='r18'), {'fc'}),
    ],
)
def test_other_families_have_the_head_of_their_kind(backbone, head):
    with torch.device('meta'):
        model = ImageClassifier(backbone)
    assert {name.split('.')[0] for name in model.head.state_dict()} == head


@pytest.mark.parametrize(
    ('family', 'arch', 'num_params'),
    [  # with 1000 classes; HGNetV2 as PaddleClas and timm count
        ('HGNetV2', 'b0', 5_996_550),
        ('HGNetV2', 'b1', 6_343_158),
        ('HGNetV2', 'b2', 11_221_356),
        ('HGNetV2', 'b3', 16_292_216),
        ('HGNetV2', 'b4', 19_796_680),
        ('HGNetV2', 'b5', 39_569_064),
        ('HGNetV2', 'b6', 75_256_776),
        ('Hiera', 'tiny', 27_910_216),
        ('Hiera', 'small', 35_008_072),
        ('Hiera', 'base', 51_524_968),
        ('Hiera', 'base_plus', 69_896_616),
        ('Hiera', 'large', 213_739_912),
        ('Hiera', 'huge', 672_779_752),
        ('ConvNeXtV2', 'atto', 3_708_400),
    ],
)
def test_parameters_with_1000_classes(family, arch, num_params):
    with torch.device('meta'):
        model = ImageClassifier(dict(type=family, arch=arch))
    assert sum(p.numel() for p in model.parameters()) == num_params


def test_bad_input_is_named():
    for num_classes in (0, None, '10'):
        with pytest.raises(ValueError, match=f'num_classes is {num_classes!r};'):
            ImageClassifier(dict(type='HGNetV2', arch=TOYS['HGNetV2']), num_classes)
    net = HGNetV2(TOYS['HGNetV2'], out_indices=ALL)
    with pytest.raises(ValueError, match='HGNetV2 have no classifier'):
        classifier_to_ours(net.state_dict())
    with pytest.raises(ValueError, match='nothing'):
        classifier_to_ours({'nothing.weight': torch.zeros(1)})
