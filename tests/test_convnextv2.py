"""ConvNeXt V2: published sizes, parity, odd sizes, layer depths."""

import importlib
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from backbone_helpers import fill, image, relative_errors
from official_helpers import checkout
from torch import nn
from torch.testing import assert_close

from mmbackbones.backbones import ConvNeXtV2
from mmbackbones.layers.norm import GlobalResponseNorm, LayerNorm2d

ALL = (0, 1, 2, 3)
TOY = dict(channels=(8, 12, 16, 20), depths=(1, 1, 3, 1))


@pytest.mark.parametrize(
    ('arch', 'with_classifier'),
    [
        ('atto', 3_708_400),
        ('femto', 5_233_240),
        ('pico', 9_066_280),
        ('nano', 15_623_800),
        ('tiny', 28_635_496),
        ('base', 88_717_800),
        ('large', 197_956_840),
        ('huge', 660_289_640),
    ],
)
def test_parameters_are_the_published_ones_less_the_classifier(arch, with_classifier):
    with torch.device('meta'):
        net = ConvNeXtV2(arch)
    width = net.out_channels[-1]
    norm, head = 2 * width, 1000 * width + 1000
    assert sum(p.numel() for p in net.parameters()) == with_classifier - norm - head


def _to_hugging_face(name: str) -> str:
    part, stage, rest = name.split('.', 2)
    if part == 'downsample_layers':
        if stage != '0':
            return f'encoder.stages.{stage}.downsampling_layer.{rest}'
        rest = rest.replace('0.', 'patch_embeddings.').replace('1.', 'layernorm.')
        return f'embeddings.{rest}'
    rest = rest.replace('.norm.', '.layernorm.')
    rest = rest.replace('.gamma', '.weight').replace('.beta', '.bias')
    return f'encoder.stages.{stage}.layers.{rest}'


@pytest.mark.parametrize('size', [(64, 64), (32, 96), (33, 70)])
@pytest.mark.parametrize('arch', ['atto', TOY])
def test_maps_equal_those_of_transformers(arch, size):
    transformers = pytest.importorskip('transformers', reason='needs transformers')
    ours = fill(ConvNeXtV2(arch, out_indices=ALL).eval())
    config = transformers.ConvNextV2Config(
        hidden_sizes=list(ours.out_channels), depths=list(ours.depths)
    )
    theirs = transformers.ConvNextV2Model(config).eval()
    state = {_to_hugging_face(k): v for k, v in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (['layernorm.weight', 'layernorm.bias'], [])
    x = image(2, 3, *size)
    padded = F.pad(x, (0, -size[1] % 32, 0, -size[0] % 32))
    with torch.no_grad():
        maps = ours(x)
        expected = theirs(padded, output_hidden_states=True).hidden_states[1:]
    cut = [
        e[..., : m.shape[2], : m.shape[3]] for m, e in zip(maps, expected, strict=True)
    ]
    assert max(relative_errors(maps, cut)) < 1e-5


def test_output_norms_equal_those_of_transformers():
    transformers = pytest.importorskip('transformers', reason='needs transformers')
    ours = fill(ConvNeXtV2(TOY, out_indices=(1, 3), with_out_norm=True).eval())
    config = transformers.ConvNextV2Config(
        hidden_sizes=list(TOY['channels']),
        depths=list(TOY['depths']),
        out_indices=[2, 4],
    )
    theirs = transformers.ConvNextV2Backbone(config).eval()
    norms = {
        'norm1.': 'hidden_states_norms.stage2.',
        'norm3.': 'hidden_states_norms.stage4.',
    }
    state = {
        name.replace(name[:6], norms[name[:6]])
        if name[:6] in norms
        else _to_hugging_face(name): value
        for name, value in ours.state_dict().items()
    }
    theirs.load_state_dict(state)
    with torch.no_grad():
        maps, expected = (
            ours(image(1, 3, 64, 96)),
            theirs(image(1, 3, 64, 96)).feature_maps,
        )
    assert max(relative_errors(maps, expected)) < 1e-5


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The official network's module; what it imports beyond torch goes unused."""
    folder = checkout('ConvNeXt-V2', 'models')
    stubs = {
        'timm.models.layers': dict(trunc_normal_=nn.init.trunc_normal_, DropPath=None),
        'MinkowskiEngine': dict(SparseTensor=None),
        'convnextv2_reference': dict(__path__=[str(folder)]),
    }
    for name, attributes in stubs.items():
        stub = ModuleType(name)
        vars(stub).update(attributes)
        monkeypatch.setitem(sys.modules, name, stub)
    for name in ('timm', 'timm.models'):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return importlib.import_module('convnextv2_reference.convnextv2')


@pytest.mark.parity
@pytest.mark.parametrize('arch', [a for a in ConvNeXtV2.arch_settings if a != 'huge'])
def test_maps_equal_those_of_the_official_code(official, arch):
    spec = ConvNeXtV2.arch_settings[arch]
    ours = ConvNeXtV2(arch, out_indices=ALL).eval()
    theirs = official.ConvNeXtV2(depths=spec.depths, dims=spec.channels).eval()
    classifier = {'norm.weight', 'norm.bias', 'head.weight', 'head.bias'}
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items() if k not in classifier
    }
    theirs.load_state_dict(fill(ours).state_dict(), strict=False)
    with torch.no_grad():
        x = image(1, 3, 64, 96)
        maps = ours(x)
        expected = []
        for downsample, stage in zip(
            theirs.downsample_layers, theirs.stages, strict=True
        ):
            x = stage(downsample(x))
            expected.append(x)
    assert max(relative_errors(maps, expected)) < 1e-5


@pytest.mark.parametrize('size', [(32, 64), (31, 33), (97, 131), (1, 1)])
def test_odd_sizes_give_the_maps_of_the_padded_image(size):
    net = fill(ConvNeXtV2(TOY, out_indices=ALL).eval())
    x = image(1, 3, *size)
    padded = F.pad(x, (0, -size[1] % 32, 0, -size[0] % 32))
    with torch.no_grad():
        for stride, found, whole in zip(
            (4, 8, 16, 32), net(x), net(padded), strict=True
        ):
            height, width = -(-size[0] // stride), -(-size[1] // stride)
            assert found.shape[-2:] == (height, width)
            assert_close(found, whole[..., :height, :width])


def test_maps_are_channels_last_in_memory():
    maps = ConvNeXtV2(TOY)(image(2, 3, 64, 64))
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


def test_init_weights_draws_a_truncated_normal():
    net = ConvNeXtV2('atto')
    net.init_weights()
    block = net.stages[2][3]
    assert block.pwconv1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.dwconv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.pwconv1.bias.eq(0).all()
    assert block.grn.gamma.eq(0).all()


@pytest.mark.parametrize('arch', [{}, dict(TOY, widths=(1,)), 'b0'])
def test_a_bad_arch_is_named(arch):
    with pytest.raises(ValueError, match=r"arch is .*'atto'.*channels and depths"):
        ConvNeXtV2(arch)


@pytest.mark.parametrize(
    'depths', [(1, 1, 1), 3, (1, -1, 1, 1), (1, 1.0, 1, 1), '1111']
)
def test_bad_numbers_of_an_arch_are_named(depths):
    with pytest.raises(ValueError, match=r'arch.depths is .*4 integers of at least 1'):
        ConvNeXtV2(dict(TOY, depths=depths))


@pytest.mark.parametrize(
    ('arch', 'depths'),
    [
        (  # one layer per block, of 12
            'atto',
            {
                'downsample_layers.0.0.weight': 1,
                'stages.0.1.norm.bias': 2,
                'downsample_layers.1.0.weight': 3,
                'downsample_layers.2.1.bias': 5,
                'stages.2.5.grn.gamma': 10,
                'downsample_layers.3.1.bias': 11,
                'stages.3.1.pwconv2.weight': 12,
                'norm3.weight': 13,
            },
        ),
        (  # twelve layers after the stem
            'base',
            {
                'downsample_layers.0.0.weight': 0,
                'stages.0.2.norm.bias': 1,
                'downsample_layers.1.0.weight': 2,
                'stages.1.0.norm.bias': 2,
                'downsample_layers.2.1.bias': 3,
                'stages.2.2.grn.gamma': 3,
                'stages.2.3.grn.gamma': 4,
                'stages.2.26.grn.gamma': 11,
                'downsample_layers.3.1.bias': 12,
                'stages.3.2.pwconv2.weight': 12,
                'norm3.weight': 13,
            },
        ),
    ],
)
def test_layer_depths_are_those_of_the_published_recipes(arch, depths):
    with torch.device('meta'):
        net = ConvNeXtV2(arch)
    found = {name: net.get_layer_depth(f'b.{name}', 'b.') for name in depths}
    assert found == {name: (depth, 14) for name, depth in depths.items()}


def test_output_norms_are_few_and_named_by_stage():
    with torch.device('meta'):
        plain, net = (
            ConvNeXtV2(TOY),
            ConvNeXtV2(TOY, out_indices=(0, -1), with_out_norm=True),
        )
    extra = net.state_dict().keys() - plain.state_dict().keys()
    assert extra == {'norm0.weight', 'norm0.bias', 'norm3.weight', 'norm3.bias'}


def test_global_response_norm_by_hand():
    layer = GlobalResponseNorm(2)
    x = torch.tensor([[[[3.0, 1.0], [4.0, 0.0]]]])  # (1, 1, 2, 2): norms 5 and 1
    assert_close(layer(x), x)  # starts as the identity
    with torch.no_grad():
        layer.gamma.fill_(2.0)
        layer.beta.copy_(torch.tensor([0.5, 0.0]))
    # N = (5/3, 1/3); y = 2 x N + beta + x
    expected = torch.tensor([[[[3 + 10 + 0.5, 1 + 2 / 3], [4 + 40 / 3 + 0.5, 0.0]]]])
    assert_close(layer(x), expected)


def test_global_response_norm_does_not_overflow_in_half_precision():
    layer = fill(GlobalResponseNorm(4))
    x = image(1, 64, 64, 4) * 3000  # norms of 110 000, and half ends at 65 504
    half = x.half().requires_grad_()
    y = layer(half)
    assert y.dtype == torch.float16
    assert_close(y.float(), layer(x), rtol=2e-3, atol=2e-3)
    y.float().mean().backward()
    assert half.grad.isfinite().all()
    assert layer.gamma.grad.dtype == torch.float32


def test_layer_norm_2d_is_a_layer_norm_over_channels():
    layer = fill(LayerNorm2d(3, eps=1e-6))
    reference = nn.LayerNorm(3, eps=1e-6)
    reference.load_state_dict(layer.state_dict())
    x = image(2, 3, 4, 5)
    expected = reference(x.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x)
    assert_close(layer(x), expected)
