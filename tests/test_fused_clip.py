"""Clipping within the optimiser's step, against clipping before it."""

import copy

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn
from torch.optim import SGD, AdamW

from mmbackbones.engine.fused_clip import FusedClip, fuse_clipping
from mmbackbones.engine.param_groups import ParamGroupConstructor


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def steps(wrapper: OptimWrapper, model: nn.Module, gains: list[float]) -> list[float]:
    """Norms that were logged, one for each step with gradients of that size."""
    norms = []
    for i, gain in enumerate(gains):
        generator = torch.Generator().manual_seed(i)
        for parameter in model.parameters():
            parameter.grad = gain * torch.randn(parameter.shape, generator=generator)
        wrapper.step()
        norms.append(wrapper.message_hub.get_scalar('train/grad_norm').current())
    return norms


def test_equals_clipping_before_the_step() -> None:
    """Gradients that are clipped, and some that are within the bound."""
    ours, theirs = net(), net()
    options = dict(lr=0.1, weight_decay=0.1, fused=True)
    clip = dict(max_norm=0.5, norm_type=2)
    plain = OptimWrapper(AdamW(theirs.parameters(), **options), clip_grad=clip.copy())
    fused = OptimWrapper(AdamW(ours.parameters(), **options), clip_grad=clip.copy())
    fuse_clipping(fused)
    assert isinstance(fused.clip_func, FusedClip)
    gains = [3.0, 0.001, 100.0, 0.02]
    expected = steps(plain, theirs, gains)
    assert steps(fused, ours, gains) == pytest.approx(expected, rel=1e-6)
    assert min(expected) < 0.5 < max(expected)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-5, atol=1e-6)


def test_a_step_that_was_not_clipped_is_not_scaled() -> None:
    """What remains of a clipped step is gone in the next one."""
    ours, theirs = net(), net()
    wrapper = OptimWrapper(
        AdamW(ours.parameters(), lr=0.1, fused=True), clip_grad=dict(max_norm=0.5)
    )
    fuse_clipping(wrapper)
    optimizer = wrapper.optimizer
    steps(wrapper, ours, [3.0])
    theirs.load_state_dict(ours.state_dict())
    reference = AdamW(theirs.parameters(), lr=0.1, fused=True)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model in (ours, theirs):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 4.0)
    optimizer.step()
    reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


class OtherWrapper(OptimWrapper):
    """As mmengine's with a loss scaler, which needs a GPU."""


def wrapper_of(kind: type = OptimWrapper, **changes: object) -> OptimWrapper:
    options = dict(
        optimizer=AdamW(net().parameters(), fused=True), clip_grad=dict(max_norm=0.1)
    )
    return kind(**{**options, **changes})


@pytest.mark.parametrize(
    'wrapper',
    [
        wrapper_of(OtherWrapper),
        wrapper_of(optimizer=AdamW(net().parameters())),
        wrapper_of(optimizer=SGD(net().parameters(), lr=0.1, fused=True)),
        wrapper_of(clip_grad=dict(max_norm=0.1, norm_type=1)),
        wrapper_of(clip_grad=dict(type='value', clip_value=0.1)),
        wrapper_of(clip_grad=dict(max_norm=0.1, error_if_nonfinite=True)),
    ],
    ids=['a scaler', 'not fused', 'sgd', '1-norm', 'by value', 'with a check'],
)
def test_where_it_is_not_the_same_nothing_changes(wrapper: OptimWrapper) -> None:
    before = wrapper.clip_func
    fuse_clipping(wrapper)
    assert wrapper.clip_func is before


def test_without_clipping_nothing_changes() -> None:
    wrapper = wrapper_of(clip_grad=None)
    fuse_clipping(wrapper)
    assert not hasattr(wrapper, 'clip_func')


def test_the_constructor_fuses() -> None:
    constructor = ParamGroupConstructor(
        dict(
            type='OptimWrapper',
            optimizer=dict(type=AdamW, lr=1e-3, fused=True),
            clip_grad=dict(max_norm=0.1, norm_type=2),
        )
    )
    assert isinstance(constructor(net()).clip_func, FusedClip)
