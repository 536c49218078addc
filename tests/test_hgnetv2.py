"""HGNetV2: published sizes, parity, and what only this family has."""

import pytest
import torch
import torch.nn.functional as F
from backbone_helpers import fill, image, relative_errors
from official_helpers import checkout, official_packages
from torch import nn
from torch.testing import assert_close

from mmbackbones.backbones import HGNetV2
from mmbackbones.layers.conv import ConvBNAct, LearnableAffine, fuse_conv_bn
from mmbackbones.layers.drop import DropPath, linear_drop_path_rates
from mmbackbones.layers.norm import FrozenBatchNorm2d

# B4 at a sixth of its width: light blocks, three residual ones, no affine.
SMALL_B4 = dict(
    stem_channels=[3, 8, 8],
    stage_in_channels=[8, 24, 48, 96],
    stage_mid_channels=[8, 16, 24, 32],
    stage_out_channels=[24, 48, 96, 128],
    stage_num_blocks=[1, 1, 3, 1],
    stage_downsample=[False, True, True, True],
    stage_light_block=[False, False, True, True],
    stage_kernel_size=[3, 3, 5, 5],
    stage_numb_of_layers=[6, 6, 6, 6],
)
B0 = dict(
    stem_channels=[3, 16, 16],
    stage_in_channels=[16, 64, 256, 512],
    stage_mid_channels=[16, 32, 64, 128],
    stage_out_channels=[64, 256, 512, 1024],
    stage_num_blocks=[1, 1, 2, 1],
    stage_downsample=[False, True, True, True],
    stage_light_block=[False, False, True, True],
    stage_kernel_size=[3, 3, 5, 5],
    stage_numb_of_layers=[3, 3, 3, 3],
    use_learnable_affine_block=True,
)


@pytest.mark.parametrize(
    ('arch', 'num_params', 'num_convs', 'num_affines'),
    [
        ('b0', 1_850_396, 42, 30),
        ('b1', 2_197_004, 42, 30),
        ('b2', 6_026_626, 60, 41),
        ('b3', 10_048_910, 70, 47),
        ('b4', 13_553_376, 80, 0),
        ('b5', 33_325_760, 130, 0),
        ('b6', 69_013_472, 174, 0),
    ],
)
def test_counts_are_the_published_ones(arch, num_params, num_convs, num_affines):
    with torch.device('meta'):
        net = HGNetV2(arch)
    modules = list(net.modules())
    assert sum(p.numel() for p in net.parameters()) == num_params
    assert sum(isinstance(m, nn.Conv2d) for m in modules) == num_convs
    assert sum(isinstance(m, LearnableAffine) for m in modules) == num_affines


@pytest.mark.parametrize(
    ('arch', 'num_params'), [('b4', 13_507_680), ('b5', 33_231_840)]
)
def test_frozen_norms_are_no_parameters(arch, num_params):
    with torch.device('meta'):
        net, plain = HGNetV2(arch, frozen_norm=True), HGNetV2(arch)
    assert sum(p.numel() for p in net.parameters()) == num_params
    dropped = plain.state_dict().keys() - net.state_dict().keys()
    assert net.state_dict().keys() < plain.state_dict().keys()
    assert {name.rsplit('.')[-1] for name in dropped} == {'num_batches_tracked'}


def test_the_affine_can_be_switched_either_way():
    with torch.device('meta'):
        with_b4, without_b0 = HGNetV2('b4', use_lab=True), HGNetV2('b0', use_lab=False)
    assert sum(isinstance(m, LearnableAffine) for m in with_b4.modules()) == 53
    assert not any('.lab.' in name for name in without_b0.state_dict())


def _to_hugging_face(name: str) -> str:
    name = name.replace('stem.', 'embedder.', 1).replace('.bn.', '.normalization.')
    name = name.replace('.conv.weight', '.convolution.weight')
    return f'encoder.{name}' if name.startswith('stages.') else name


@pytest.mark.parametrize('size', [(64, 64), (33, 65)])
@pytest.mark.parametrize(('arch', 'spec'), [('b0', B0), (SMALL_B4, SMALL_B4)])
def test_maps_equal_those_of_transformers(arch, spec, size):
    transformers = pytest.importorskip('transformers', reason='needs transformers')
    config = transformers.HGNetV2Config(
        **spec,
        hidden_sizes=spec['stage_out_channels'],
        embedding_size=spec['stem_channels'][-1],
        out_indices=[1, 2, 3, 4],
    )
    theirs = transformers.HGNetV2Backbone(config).eval()
    ours = fill(HGNetV2(arch, out_indices=(0, 1, 2, 3)).eval())
    theirs.load_state_dict(
        {_to_hugging_face(k): v for k, v in ours.state_dict().items()}
    )
    with torch.no_grad():
        maps = ours(image(2, 3, *size))
        expected = theirs(image(2, 3, *size)).feature_maps
    assert max(relative_errors(maps, expected)) < 1e-5


def _official_hgnetv2() -> type[nn.Module]:
    """The class of D-FINE, without importing what its package imports."""
    source = checkout('D-FINE', 'src')
    with official_packages('dfine_reference', source, 'nn', 'nn.backbone') as load:
        return load('nn.backbone.hgnetv2').HGNetv2


@pytest.mark.parity
@pytest.mark.parametrize('frozen_norm', [False, True])
@pytest.mark.parametrize('arch', HGNetV2.arch_settings)
def test_maps_equal_those_of_the_official_code(arch, frozen_norm):
    spec = HGNetV2.arch_settings[arch]
    theirs = _official_hgnetv2()(
        arch.upper(),
        use_lab=spec.use_lab,
        return_idx=[0, 1, 2, 3],
        freeze_norm=frozen_norm,
        freeze_at=-1,
        pretrained=False,
    ).eval()
    ours = HGNetV2(arch, out_indices=(0, 1, 2, 3), frozen_norm=frozen_norm).eval()
    assert [(k, v.shape) for k, v in theirs.state_dict().items()] == [
        (k, v.shape) for k, v in ours.state_dict().items()
    ]
    fill(ours)
    theirs.load_state_dict(ours.state_dict())
    for size in ((64, 64), (33, 65)):
        with torch.no_grad():
            errors = relative_errors(
                ours(image(1, 3, *size)), theirs(image(1, 3, *size))
            )
        assert max(errors) < 1e-5


def test_an_explicit_specification_equals_the_name():
    with torch.device('meta'):
        named, explicit = HGNetV2('b0'), HGNetV2(B0)
    shapes = {k: v.shape for k, v in named.state_dict().items()}
    assert shapes == {k: v.shape for k, v in explicit.state_dict().items()}


def test_an_arch_may_have_three_stages():
    spec = {k: v if k[:4] in ('stem', 'use_') else v[:3] for k, v in B0.items()}
    net = HGNetV2(spec, out_indices=(-2, -1)).eval()
    assert net.out_channels == (256, 512)
    assert net.out_strides == (8, 16)
    assert [m.shape[-2:] for m in net(image(1, 3, 40, 70))] == [(5, 9), (3, 5)]
    with pytest.raises(ValueError, match=r'-3\.\.2'):
        HGNetV2(spec)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            dict(stage_num_blocks=[1, 1, 3]),
            "one entry per stage.*'stage_num_blocks': 3",
        ),
        (dict(stage_nun_blocks=[1, 1, 1, 1]), r"unknown fields \['stage_nun_blocks'\]"),
        (dict(stem_channels=[3, 8]), 'stem_channels is .*; it takes 3 integers'),
        (dict(stem_channels=3), 'stem_channels is 3; it takes 3 integers'),
        (dict(stage_mid_channels=8), 'stage_mid_channels is 8; it takes integers'),
        (dict(stage_num_blocks=[1, 0, 1, 1]), 'stage_num_blocks is .* at least 1'),
        (dict(stage_kernel_size=[3, 3, 4, 5]), 'stage_kernel_size is .* odd'),
        (dict(stem_channels=[4, 8, 8]), 'in_channels is 3'),
        (dict(stage_in_channels=[8, 24, 50, 96]), r'stage_in_channels.*\(8, 24, 48'),
    ],
)
def test_a_bad_specification_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        HGNetV2({**SMALL_B4, **change})


def test_a_specification_without_stages_or_fields_is_named():
    with pytest.raises(ValueError, match='lacks the fields'):
        HGNetV2({})
    with pytest.raises(ValueError, match='one entry per stage'):
        HGNetV2({k: [] if k[:5] == 'stage' else v for k, v in SMALL_B4.items()})


def test_stem_pool_pad_touches_the_edge_and_only_with_the_affine():
    zero, inf = (
        fill(HGNetV2(B0, out_indices=0, stem_pool_pad=pad).eval())
        for pad in ('zero', 'inf')
    )
    with torch.no_grad():
        # Below zero after the affine, so that a zero beside it would win the maximum.
        for net in (zero, inf):
            net.stem.stem1.lab.bias.fill_(-5.0)
        a, b = zero.stem(image(1, 3, 64, 64)), inf.stem(image(1, 3, 64, 64))
        assert_close(a[..., :-1, :-1], b[..., :-1, :-1])
        assert not torch.allclose(a[..., -1, :], b[..., -1, :])
        assert not torch.allclose(a[..., :, -1], b[..., :, -1])
        for net in (zero, inf):
            net.stem.stem1.lab = nn.Identity()
        assert_close(zero.stem(image(1, 3, 64, 64)), inf.stem(image(1, 3, 64, 64)))
    with pytest.raises(ValueError, match=r"stem_pool_pad is 'same'.*zero.*inf"):
        HGNetV2('b0', stem_pool_pad='same')


def test_init_weights_draws_from_kaiming_normal():
    net = HGNetV2('b0')
    net.init_weights()
    conv = net.stages[1].blocks[0].layers[1].conv
    fan_out = conv.out_channels * 9
    assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert all(
        m.weight.eq(1).all() for m in net.modules() if isinstance(m, nn.BatchNorm2d)
    )
    untouched = HGNetV2('b0', init_cfg=[])
    before = untouched.stem.stem1.conv.weight.clone()
    untouched.init_weights()
    assert torch.equal(untouched.stem.stem1.conv.weight, before)


@pytest.mark.parametrize('frozen_norm', [False, True])
def test_fused_network_gives_the_same_maps(frozen_norm):
    net = fill(HGNetV2(B0, frozen_norm=frozen_norm).eval())
    with torch.no_grad():
        expected = net(image(1, 3, 64, 96))
        assert fuse_conv_bn(net) is net
        assert max(relative_errors(net(image(1, 3, 64, 96)), expected)) < 1e-5
        assert not any('.bn.' in name for name in net.state_dict())
        again = fuse_conv_bn(net)(image(1, 3, 64, 96))
        assert max(relative_errors(again, expected)) < 1e-5


def test_conv_bn_act_is_what_it_says():
    layer = fill(ConvBNAct(2, 4, 3, stride=2, groups=2, use_lab=True).eval())
    x, bn = image(1, 2, 5, 6) - 0.5, layer.bn
    y = F.conv2d(x, layer.conv.weight, stride=2, padding=1, groups=2)
    y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-5)
    assert_close(layer(x), layer.lab.scale * y.relu() + layer.lab.bias)
    bare = ConvBNAct(2, 4, 1, use_act=False, use_lab=True)
    assert not isinstance(bare.lab, LearnableAffine)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_frozen_batch_norm_loads_and_equals_a_batch_norm(dtype):
    plain = fill(nn.BatchNorm2d(4)).eval()
    frozen = FrozenBatchNorm2d(4)
    frozen.load_state_dict(plain.state_dict())
    x = (image(2, 4, 5, 6) * 4 - 2).requires_grad_()
    y = frozen(x.to(dtype))
    assert y.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2  # of 8 bits, some lost
    assert_close(y.float(), plain(x), rtol=tolerance, atol=tolerance)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    (expected,) = torch.autograd.grad(plain(x).sum(), x)
    assert_close(grad, expected, rtol=tolerance, atol=tolerance)
    assert not list(frozen.parameters())


@pytest.mark.parametrize(
    ('rate', 'depths', 'expected'),
    [
        (0.5, [], []),
        (0.5, [1], [[0.0]]),
        (0.0, [1, 2], [[0.0], [0.0, 0.0]]),
        (0.4, [1, 1, 3], [[0.0], [0.1], [0.2, 0.3, 0.4]]),
    ],
)
def test_drop_path_rates_grow_linearly_over_all_blocks(rate, depths, expected):
    rates = linear_drop_path_rates(rate, depths)
    assert len(rates) == len(expected)
    for found, wanted in zip(rates, expected, strict=True):
        assert found == pytest.approx(wanted)


def test_drop_path_keeps_or_drops_whole_samples():
    torch.manual_seed(0)
    layer, x = DropPath(0.25), torch.ones(4000, 2, 3)
    y = layer(x)
    per_sample = y.flatten(1)
    assert torch.equal(per_sample.amin(1), per_sample.amax(1))
    assert_close(per_sample[:, 0].unique(), torch.tensor([0.0, 4 / 3]))
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert layer.eval()(x) is x
    assert DropPath(0.0).train()(x) is x
