"""Folding for inference: the same numbers from fewer operations."""

import pytest
import torch
from helpers import TOY_ARCH, toy_detector_cfg
from mmengine.registry import MODELS
from torch import Tensor, nn

import mmbackbones.detectors  # noqa: F401
from mmbackbones.backbones import HGNetV2, Hiera
from mmbackbones.layers.attention import DeformableAttention
from mmbackbones.layers.conv import ConvBNAct, LearnableAffine
from mmbackbones.layers.fold import Bound, fold_for_inference, pad_channels
from mmbackbones.layers.hiera_block import LayerScale
from mmbackbones.layers.norm import FrozenBatchNorm2d
from mmbackbones.layers.reparam import RepNCSPELAN, UpsampledProjection
from mmbackbones.layers.rtdetr_layer import ProjectedDeformableAttention

FOLDED = (nn.BatchNorm2d, FrozenBatchNorm2d, LearnableAffine, LayerScale)


def stir(model: nn.Module) -> nn.Module:
    """Values of all that folds, negative scales included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
                shape = module.weight.shape
                module.weight.copy_(torch.rand(shape, generator=generator) + 0.5)
                for vector in (module.bias, module.running_mean):
                    vector.copy_(torch.randn(shape, generator=generator) * 0.2)
                module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
            if isinstance(module, LearnableAffine):
                for scalar in (module.scale, module.bias):
                    scalar.copy_(torch.randn(1, generator=generator) + 0.3)
            if isinstance(module, LayerScale):
                module.gamma.copy_(torch.randn(module.gamma.shape, generator=generator))
    return model.eval()


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Largest difference relative to the largest value."""
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize('scale', [0.7, 0.0, -1.3])
@pytest.mark.parametrize('bias', [0.4, -0.6])
def test_an_affine_folds_past_the_relu(scale: float, bias: float) -> None:
    torch.manual_seed(0)
    block = stir(ConvBNAct(3, 4, 3, use_lab=True))
    with torch.no_grad():
        block.lab.scale.fill_(scale)
        block.lab.bias.fill_(bias)
        x = torch.randn(2, 3, 5, 6)
        wanted = block(x)
        found = fold_for_inference(block)(x)
    assert isinstance(block.act, Bound)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    'options',
    [
        dict(arch='b0'),
        dict(arch=TOY_ARCH, frozen_norm=True),
        dict(arch=TOY_ARCH, use_lab=False),
        dict(arch=TOY_ARCH, stem_pool_pad='inf'),
    ],
    ids=str,
)
def test_backbone_is_the_same_at_odd_sizes(options: dict) -> None:
    torch.manual_seed(0)
    model = stir(HGNetV2(**options))
    x = torch.rand(2, 3, 75, 97)
    with torch.no_grad():
        wanted = model(x)
        found = fold_for_inference(model)(x)
    assert not any(isinstance(module, FOLDED) for module in model.modules())
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs)


@pytest.mark.slow
def test_b4_is_the_same() -> None:
    torch.manual_seed(0)
    model = stir(HGNetV2('b4', frozen_norm=True))
    x = torch.rand(1, 3, 128, 96)
    with torch.no_grad():
        wanted = model(x)
        found = fold_for_inference(model)(x)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs)


def test_layer_scales_fold() -> None:
    torch.manual_seed(0)
    arch = dict(
        embed_dims=16,
        num_heads=1,
        depths=(1, 1, 1, 1),
        pos_embed_size=(8, 8),
        layer_scale=True,
    )
    model = stir(Hiera(arch))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        found = fold_for_inference(model)(x)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs)


def test_detector_folds_once_and_for_all() -> None:
    torch.manual_seed(0)
    model = stir(MODELS.build(toy_detector_cfg()))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x, mode='tensor').queries
        fold_for_inference(model)
        names = [type(module) for module in model.modules()]
        fold_for_inference(model)
        found = model(x, mode='tensor').queries
    assert names == [type(module) for module in model.modules()]
    assert not any(isinstance(module, FOLDED) for module in model.modules())
    # The order of queries with nearly equal scores may change.
    key = wanted.logits[-1].amax(-1).argsort(), found.logits[-1].amax(-1).argsort()
    for name in ('logits', 'boxes'):
        ours, theirs = getattr(found, name)[-1], getattr(wanted, name)[-1]
        ours, theirs = (
            value.gather(1, order[..., None].expand_as(value))
            for value, order in ((ours, key[1]), (theirs, key[0]))
        )
        assert_close(ours, theirs)


def test_padded_branches_are_the_same() -> None:
    torch.manual_seed(0)
    cfg = toy_detector_cfg()
    cfg.neck.expansion = 0.34  # 5 channels in a branch
    model = fold_for_inference(stir(MODELS.build(cfg)))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = model.extract_feat(x)
        assert model.encoder.fpn_blocks[0].cv2[1].conv.out_channels == 5
        found = pad_channels(model).extract_feat(x)
    assert model.encoder.fpn_blocks[0].cv2[1].conv.out_channels == 8
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize('size_hw', [(64, 64), (96, 64), (75, 97)], ids=str)
def test_projections_go_before_the_upsampling(size_hw: tuple[int, int]) -> None:
    torch.manual_seed(0)
    cfg = toy_detector_cfg()
    cfg.neck.expansion = 0.34  # 5 channels in a branch
    model = stir(MODELS.build(cfg)).double()
    x = torch.rand(2, 3, *size_hw).double()
    with torch.no_grad():
        wanted = model.extract_feat(x)
        found = fold_for_inference(fold_for_inference(model)).extract_feat(x)
    for block in model.encoder.fpn_blocks:
        assert all(isinstance(half, UpsampledProjection) for half in block.cv1)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_a_block_alone_is_split_by_its_outputs() -> None:
    torch.manual_seed(0)
    block = stir(RepNCSPELAN(6, 8, 10, 3, 1))
    x = torch.rand(1, 6, 7, 5)
    with torch.no_grad():
        wanted = block(x)
        found = fold_for_inference(fold_for_inference(block))(x)
    assert len(block.cv1) == 2
    assert_close(found, wanted)


@pytest.mark.parametrize('make', [DeformableAttention, ProjectedDeformableAttention])
def test_offsets_fold(make: type[DeformableAttention]) -> None:
    torch.manual_seed(0)
    attention = make(8, 2, (3, 1))
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    queries, boxes = torch.randn(2, 5, 8), torch.rand(2, 5, 4)
    channels = 8 if make is ProjectedDeformableAttention else 4
    maps = [torch.randn(16 // channels, channels, size, 6) for size in (7, 4)]
    with torch.no_grad():
        wanted = attention(queries, boxes, maps)
        found = fold_for_inference(fold_for_inference(attention))(queries, boxes, maps)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
