"""What every backbone promises, over every (class, arch).

A new family adds itself to `FAMILIES`; the first arch of its table is its smallest.
The golden files hold a digest of all state-dict names and shapes; they are rewritten
with `ACCEPT_GOLDEN=1`.
"""

from itertools import combinations
from math import ceil

import pytest
import torch
from backbone_helpers import fill, image
from golden_helpers import assert_golden_names
from helpers import TOY_ARCH
from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

import mmbackbones  # noqa: F401  (puts a stand-in where compiled mmcv is missing)
from mmbackbones.backbones import ConvNeXtV2, HGNetV2, Hiera, ResNetVD

FAMILIES = [HGNetV2, ConvNeXtV2, Hiera, ResNetVD]
BACKBONES = [(cls, arch) for cls in FAMILIES for arch in cls.arch_settings]
SMALLEST = [(cls, next(iter(cls.arch_settings))) for cls in FAMILIES]

every = pytest.mark.parametrize(('cls', 'arch'), BACKBONES)
smallest = pytest.mark.parametrize(('cls', 'arch'), SMALLEST)


@every
def test_maps_have_the_declared_channels_and_strides(cls, arch):
    with torch.device('meta'):
        net = cls(arch, out_indices=(0, 1, 2, 3))
        maps = net(torch.rand(1, 3, 97, 131))
    assert net.out_indices == (0, 1, 2, 3)
    assert net.out_strides == (4, 8, 16, 32)
    assert isinstance(maps, tuple)
    assert [tuple(m.shape) for m in maps] == [
        (1, c, ceil(97 / s), ceil(131 / s))
        for c, s in zip(net.out_channels, net.out_strides, strict=True)
    ]


@every
def test_defaults_are_those_of_a_detector(cls, arch):
    with torch.device('meta'):
        net = cls(arch)
    assert net.out_indices == (1, 2, 3)
    assert net.out_strides == (8, 16, 32)
    assert all(p.requires_grad for p in net.parameters())


@every
def test_names_and_shapes_match_the_golden_file(cls, arch):
    with torch.device('meta'):
        net = cls(arch)
    assert_golden_names(f'{cls.__name__.lower()}_state_dict.json', arch, net)


@smallest
@pytest.mark.parametrize(
    ('given', 'resolved'),
    [
        (2, (2,)),
        (-1, (3,)),
        ([-4], (0,)),
        ((3, 0), (0, 3)),
        ((-1, 1), (1, 3)),
        *((s, s) for n in (1, 2, 3, 4) for s in combinations(range(4), n)),
    ],
)
def test_out_indices_give_a_subset_of_all_maps(cls, arch, given, resolved):
    net = fill(cls(arch, out_indices=(0, 1, 2, 3)).eval())
    subset = cls(arch, out_indices=given).eval()
    subset.load_state_dict(net.state_dict())
    assert subset.out_indices == resolved
    assert subset.out_channels == tuple(net.out_channels[i] for i in resolved)
    assert subset.out_strides == tuple(net.out_strides[i] for i in resolved)
    with torch.no_grad():
        expected = [net(image(1, 3, 32, 32))[i] for i in resolved]
        assert_close(list(subset(image(1, 3, 32, 32))), expected)


@smallest
@pytest.mark.parametrize(
    'given', [(), 4, -5, (1, 1), (3, -1), ('1',), (1.0,), '1', 1.0, None]
)
def test_bad_out_indices_name_the_range(cls, arch, given):
    with torch.device('meta'), pytest.raises(ValueError, match=r'out_indices.*-4\.\.3'):
        cls(arch, out_indices=given)


@smallest
@pytest.mark.parametrize('frozen_stages', [-2, 5, '1', None])
def test_bad_frozen_stages_name_the_range(cls, arch, frozen_stages):
    with torch.device('meta'), pytest.raises(ValueError, match=r'frozen_stages.*4'):
        cls(arch, frozen_stages=frozen_stages)


@smallest
@pytest.mark.parametrize('in_channels', [0, -3, '3', None])
def test_bad_in_channels_are_named(cls, arch, in_channels):
    with torch.device('meta'), pytest.raises(ValueError, match=f'is {in_channels!r};'):
        cls(arch, in_channels=in_channels)


@smallest
@pytest.mark.parametrize('drop_path_rate', [-0.1, 1.0, '0.1', None])
def test_bad_drop_path_rate_names_the_range(cls, arch, drop_path_rate):
    with torch.device('meta'), pytest.raises(ValueError, match=r'drop_path_rate.*0, 1'):
        cls(arch, drop_path_rate=drop_path_rate)


@pytest.mark.parametrize('cls', FAMILIES)
@pytest.mark.parametrize('arch', ['b9', '', None])
def test_an_unknown_arch_is_answered_with_the_choices(cls, arch):
    known = next(iter(cls.arch_settings))
    with pytest.raises(ValueError, match=f'arch is .*{known}'):
        cls(arch)


@smallest
@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 1, 32, 32), (1, 4, 32, 32)])
def test_a_wrong_input_is_refused(cls, arch, shape):
    with torch.device('meta'), pytest.raises(ValueError, match='in_channels is 3'):
        cls(arch)(torch.zeros(shape))


@smallest
def test_an_empty_image_is_refused(cls, arch):
    with torch.device('meta'), pytest.raises(ValueError, match=r'\(1, 3, 0, 32\)'):
        cls(arch)(torch.zeros(1, 3, 0, 32))


@smallest
def test_in_channels_may_differ_from_three(cls, arch):
    with torch.device('meta'):
        net = cls(arch, in_channels=5)
        assert net(torch.zeros(1, 5, 64, 64))[0].shape[-1] == 8


@smallest
def test_an_arch_is_named_in_either_case(cls, arch):
    with torch.device('meta'):
        assert cls(arch.upper()).state_dict().keys() == cls(arch).state_dict().keys()


@smallest
@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 4])
def test_frozen_parts_get_no_gradient_and_stay_still(cls, arch, frozen_stages):
    net = fill(cls(arch, out_indices=(0, 1, 2, 3), frozen_stages=frozen_stages))
    frozen = {
        id(member)
        for part in net._parts()[: frozen_stages + 1]
        for whole in part
        for member in (
            [whole] if isinstance(whole, nn.Parameter) else whole.parameters()
        )
    }
    assert net.train() is net
    before = {k: v.clone() for k, v in net.named_buffers()}
    maps = net(image(2, 3, 64, 64))
    if frozen_stages < 4:
        sum(m.square().mean() for m in maps).backward()
    for name, param in net.named_parameters():
        assert param.requires_grad == (id(param) not in frozen), name
        assert (param.grad is not None) == param.requires_grad, name
    for name, module in net.named_modules():
        if isinstance(module, _BatchNorm):
            is_frozen = id(module.weight) in frozen
            assert module.training != is_frozen, name
            mean = f'{name}.running_mean'
            assert torch.equal(before[mean], module.running_mean) == is_frozen, name
    assert net.eval() is net
    assert not any(m.training for m in net.modules())


@smallest
def test_stages_that_never_run_are_not_trained(cls, arch):
    net = fill(cls(arch, out_indices=1))
    net(image(2, 3, 64, 64))[0].square().mean().backward()
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in net.named_parameters() if p.grad is not None}
    assert 0 < len(trained) < len(list(net.parameters()))


@smallest
def test_norm_eval_uses_and_keeps_the_running_statistics(cls, arch):
    net = fill(cls(arch, norm_eval=True)).train()
    before = {k: v.clone() for k, v in net.named_buffers()}
    trained = net(image(2, 3, 64, 64))
    assert all(torch.equal(before[k], v) for k, v in net.named_buffers())
    assert_close(trained, net.eval()(image(2, 3, 64, 64)))


@pytest.mark.slow
def test_checkpointing_compiles():
    plain, compiled = (
        fill(HGNetV2(TOY_ARCH, out_indices=0, with_cp=cp)) for cp in (False, True)
    )
    forward = torch.compile(compiled, backend='aot_eager')
    results = []
    for net, run in ((plain, plain), (compiled, forward)):
        run(image(2, 3, 32, 32))[0].square().mean().backward()
        grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        results.append((grads, dict(net.named_buffers())))
    assert_close(results[1], results[0])


@smallest
@pytest.mark.parametrize('drop_path_rate', [0.0, 0.5])
def test_checkpointing_changes_no_number(cls, arch, drop_path_rate):
    results = []
    for with_cp in (False, True):
        net = cls(arch, with_cp=with_cp, drop_path_rate=drop_path_rate)
        net = fill(net).train()
        torch.manual_seed(3)
        maps = net(image(4, 3, 64, 64))
        sum(m.square().mean() for m in maps).backward()
        grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        results.append((maps, grads, dict(net.named_buffers())))
    assert_close(results[1], results[0])


@smallest
def test_drop_path_acts_in_training_only(cls, arch):
    plain = fill(cls(arch).eval())
    net = cls(arch, drop_path_rate=0.9, norm_eval=True)
    net.load_state_dict(plain.state_dict())
    x = image(4, 3, 64, 64)
    with torch.no_grad():
        assert_close(net.eval()(x), plain(x))
        torch.manual_seed(0)
        assert not torch.allclose(net.train()(x)[-1], plain(x)[-1])


@smallest
def test_autocast_stays_close_to_fp32(cls, arch):
    net = fill(cls(arch)).eval()
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
        with torch.autocast('cpu', torch.bfloat16):
            maps = net(x)
    for found, wanted in zip(maps, expected, strict=True):
        error = (found.float() - wanted).norm() / wanted.norm()
        assert error < 0.05  # bfloat16 has 8 bits, and the network many layers


@pytest.mark.parametrize(
    ('cls', 'arch'), [*SMALLEST, (Hiera, 'small_abswin'), (Hiera, 'sam2_tiny')]
)
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_all_weights_may_be_of_another_precision(cls, arch, dtype):
    net = fill(cls(arch)).eval()
    x = image(1, 3, 64, 96)
    with torch.no_grad():
        expected = net(x)
        maps = net.to(dtype)(x.to(dtype))
    for found, wanted in zip(maps, expected, strict=True):
        assert found.dtype == dtype
        assert (found.to(wanted) - wanted).norm() < 0.05 * wanted.norm()


@every
def test_layer_depth_grows_from_the_stem_to_the_last_block(cls, arch):
    with torch.device('meta'):
        net = cls(arch)
    depths = []
    for name, _ in net.named_parameters():
        depth, num = net.get_layer_depth(f'backbone.{name}', 'backbone.')
        assert (depth, num) == net.get_layer_depth(name)
        assert num == net.num_layers
        depths.append(depth)
    stem = net._parts()[0][0]
    stem = (
        {id(stem)}
        if isinstance(stem, nn.Parameter)
        else set(map(id, stem.parameters()))
    )
    first = [d for d, p in zip(depths, net.parameters(), strict=True) if id(p) in stem]
    assert set(first) <= {min(depths)}
    assert max(depths) == net.num_layers - 2
    assert net.get_layer_depth('encoder.x', 'backbone.')[0] == net.num_layers - 1


@smallest
@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmseg'])
def test_a_text_config_builds_from_any_scope(cls, arch, scope):
    if scope == 'mmdet':
        from mmdet.registry import MODELS
    elif scope == 'mmseg':
        from mmseg.registry import MODELS
    else:
        MODELS = ROOT_MODELS
    with torch.device('meta'):
        net = MODELS.build(dict(type=cls.__name__, arch=arch, out_indices=[-1]))
    assert type(net) is cls
    assert net.out_indices == (3,)
