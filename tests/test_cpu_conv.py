"""Fused convolutions for the CPU: the same numbers as the modules they replace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import TOY_ARCH, toy_detector_cfg
from mmengine.registry import MODELS
from torch import nn

import mmbackbones.detectors  # noqa: F401
from mmbackbones.backbones import HGNetV2
from mmbackbones.layers import cpu_conv
from mmbackbones.layers.conv import SummedConv
from mmbackbones.layers.cpu_conv import (
    FusedConv2d,
    FusedPool,
    FusedSum,
    fuse_for_cpu,
)
from mmbackbones.layers.fold import Bound, fold_for_inference
from mmbackbones.layers.hg_stem import StemPool
from mmbackbones.layers.reparam import ConvNorm

needs_onednn = pytest.mark.skipif(
    not cpu_conv._has_fused_convolution(), reason='torch lacks the oneDNN operators'
)

ACTIVATIONS = [
    nn.Identity(),
    nn.ReLU(),
    nn.SiLU(),
    Bound(0.3),
    Bound(-0.2, is_upper=True),
]


@needs_onednn
@pytest.mark.parametrize('act', ACTIVATIONS, ids=str)
@pytest.mark.parametrize(
    'options',
    [
        dict(out_channels=5, kernel_size=1),
        dict(out_channels=21, kernel_size=3, padding=1, stride=2, bias=False),
        dict(out_channels=3, kernel_size=5, padding=2, groups=3),
        dict(out_channels=4, kernel_size=2),
    ],
    ids=str,
)
def test_convolution_with_activation(options: dict, act: nn.Module) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, **options)
    fused = FusedConv2d(conv, act)
    assert list(fused.state_dict()) == list(conv.state_dict())
    for x in (torch.randn(1, 3, 9, 14), torch.randn(2, 3, 14, 9).transpose(2, 3)):
        with torch.no_grad():
            wanted, found = act(conv(x)), fused(x)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
        assert found.is_contiguous(memory_format=torch.channels_last)


@needs_onednn
def test_elsewhere_it_is_the_plain_convolution() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    fused = FusedConv2d(copy.deepcopy(conv), nn.SiLU())
    x = torch.randn(1, 3, 6, 6)
    fused(x).sum().backward()
    F.silu(conv(x)).sum().backward()
    torch.testing.assert_close(fused.weight.grad, conv.weight.grad)
    with torch.no_grad():
        wanted = F.silu(conv(x))
        torch.testing.assert_close(fused.double()(x.double()).float(), wanted)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert fused.float()(x).dtype == torch.bfloat16


@needs_onednn
@pytest.mark.parametrize('act', ACTIVATIONS, ids=str)
def test_sum_with_activation(act: nn.Module) -> None:
    torch.manual_seed(0)
    summed = SummedConv(nn.Conv2d(3, 4, 3, padding=1), act)
    fused = FusedSum(summed)
    assert list(fused.state_dict()) == list(summed.state_dict())
    x, added = torch.randn(2, 3, 6, 9), torch.randn(2, 4, 6, 9)
    with torch.no_grad():
        wanted, found = summed(x, added), fused(x, added.clone())
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(fused(x, added), summed(x, added))  # with gradients


@pytest.mark.parametrize('edge', [0.0, float('-inf'), 0.7])
def test_pooling_of_neighbours(edge: float) -> None:
    x = torch.randn(2, 3, 7, 10)  # negative values: the edge matters
    padded = F.pad(x, (0, 1, 0, 1))
    wanted = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=edge), 2, 1)
    assert torch.equal(StemPool(edge)(x, padded), wanted)
    assert torch.equal(FusedPool(edge)(x, padded), wanted)  # gradients are wanted
    with torch.no_grad():
        assert torch.equal(FusedPool(edge)(x, padded), wanted)


@needs_onednn
@pytest.mark.parametrize('arch', ['b0', TOY_ARCH], ids=['b0', 'toy'])
def test_backbone_is_the_same_at_odd_sizes(arch: str | dict) -> None:
    torch.manual_seed(0)
    model = fold_for_inference(HGNetV2(arch).eval())
    x = torch.rand(1, 3, 75, 97)
    with torch.no_grad():
        wanted = model(x)
        found = fuse_for_cpu(model)(x)
    assert not any(type(module) is nn.Conv2d for module in model.modules())
    assert isinstance(model.stem.pool, FusedPool)
    assert isinstance(model.stem.stem3[1], FusedSum)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@needs_onednn
def test_detector_fuses_once_and_keeps_its_names() -> None:
    torch.manual_seed(0)
    cfg = toy_detector_cfg()
    cfg.neck.expansion = 0.34  # 5 channels in a branch
    model = fold_for_inference(MODELS.build(cfg))
    names = list(model.state_dict())
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        wanted = model.extract_feat(x)
        kinds = [type(module) for module in fuse_for_cpu(model).modules()]
        assert kinds == [type(module) for module in fuse_for_cpu(model).modules()]
        found = model.extract_feat(x)
    assert list(model.state_dict()) == names
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@needs_onednn
def test_what_is_not_folded_keeps_its_activation() -> None:
    torch.manual_seed(0)
    block = ConvNorm(3, 4, 3, activation=nn.SiLU).eval()
    block.norm.bias.data.fill_(0.5)
    x = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        wanted = block(x)
        found = fuse_for_cpu(block)(x)
    assert isinstance(block.act, nn.SiLU)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_without_the_operators_nothing_changes(monkeypatch) -> None:
    monkeypatch.setattr(cpu_conv, '_has_fused_convolution', lambda: False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert type(fuse_for_cpu(model)[0]) is nn.Conv2d
