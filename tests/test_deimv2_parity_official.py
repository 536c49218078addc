"""DEIMv2 with HGNetV2 against the official code, on the same random weights.

Configurations are those of the official files, narrowed to run in seconds; counts and
names are of the full models. Reference: see `deimv2_helpers`.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deimv2_helpers import (
    SIZES,
    build_official,
    build_official_criterion,
    build_ours,
    load_model_config,
    official_config,
    official_modules,
)
from dfine_helpers import calibrate, named_tensors, randomise, targets
from test_dfine_parity_official import (
    as_ours,
    assert_equal_tensors,
    official_targets,
)
from torch import Tensor, nn

from mmbackbones.layers.position import sincos_position_2d
from mmbackbones.losses.matching import ScoreIoUMatcher
from mmbackbones.registry import MODELS

_path = Path(__file__).parents[1] / 'benchmarks' / 'criterion.py'
_spec = importlib.util.spec_from_file_location('criterion_benchmark', _path)
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)

pytestmark = pytest.mark.parity

every = pytest.mark.parametrize('size', SIZES)
# One of each kind of encoder: lite, with and without convolutions in the branches.
kinds = pytest.mark.parametrize('size', ['atto', 'n', 'm', 'x'])
SIDE = 128


@pytest.fixture(scope='module')
def official() -> Iterator[SimpleNamespace]:
    with official_modules() as modules:
        yield modules


def narrowed(size: str) -> tuple[dict, object]:
    """Official configuration and ours with fewer queries, at 128 px."""
    config, ours = official_config(size), load_model_config(size)
    config['eval_spatial_size'] = [SIDE, SIDE]
    config['DEIMTransformer'].update(num_queries=20, num_denoising=10)
    ours.model.decoder.update(
        eval_size_hw=(SIDE, SIDE), num_queries=20, num_denoising=10
    )
    return config, ours


def images(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, height, width, generator=generator)


def pair(official: SimpleNamespace, size: str) -> tuple[nn.Module, nn.Module]:
    """Ours and theirs, sharing weights through theirs' state dict."""
    config, ours = narrowed(size)
    theirs = randomise(build_official(official, config))
    calibrate(theirs, images(SIDE, SIDE), official_targets(targets(0, 0)))
    ours = build_ours(ours)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


@every
def test_names_shapes_and_counts_are_the_official_ones(official, size):
    theirs = build_official(official, official_config(size))
    ours = build_ours(load_model_config(size))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert num_parameters(ours) == num_parameters(theirs)
    ours.switch_to_deploy()
    assert num_parameters(ours) == num_parameters(theirs.deploy())


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@every
def test_evaluation_equals_the_official_one(official, size):
    # Random networks of this depth amplify the rounding of float32 to 3e-4.
    ours, theirs = (net.double() for net in pair(official, size))
    with torch.no_grad():
        x = images(SIDE, SIDE).double()
        expected = named_tensors(as_ours(theirs(x)))
        assert_equal_tensors(named_tensors(ours._forward(x)), expected, 1e-6)
        ours.switch_to_deploy()
        theirs.deploy()
        assert_equal_tensors(
            named_tensors(ours._forward(x)), named_tensors(as_ours(theirs(x))), 1e-6
        )


@kinds
def test_rectangles_equal_the_official_ones_with_its_grid_corrected(
    official, size, monkeypatch
):
    ours, theirs = (net.double() for net in pair(official, size))
    # Anchors and positions of the maps that come in, as upstream does in training.
    theirs.encoder.eval_spatial_size = theirs.decoder.eval_spatial_size = None
    if hasattr(theirs.encoder, 'build_2d_sincos_position_embedding'):
        monkeypatch.setattr(
            theirs.encoder,
            'build_2d_sincos_position_embedding',
            lambda w, h, dim, temperature: sincos_position_2d(h, w, dim, temperature),
        )
    x = images(96, 160).double()
    with torch.no_grad():
        expected = named_tensors(as_ours(theirs(x)))
        assert_equal_tensors(named_tensors(ours._forward(x)), expected, 1e-6)


@kinds
@pytest.mark.parametrize('sizes', [(0, 0), (2, 5)])
def test_training_and_gradients_equal_the_official_ones(official, size, sizes):
    # Gradients through batch statistics cancel to little: float32 cannot tell.
    ours, theirs = (net.double().train() for net in pair(official, size))
    x, truth = images(SIDE, SIDE).double(), targets(*sizes)
    outputs = []
    for net in (ours, theirs):
        torch.manual_seed(3)  # the same noise in the denoising queries
        if net is ours:
            output = ours.decoder(ours.extract_feat(x), truth)
        else:
            output = as_ours(theirs(x, official_targets(truth)))
        output = named_tensors(output)
        generator = torch.Generator().manual_seed(4)
        sum(
            (output[name] * torch.randn(output[name].shape, generator=generator)).sum()
            for name in sorted(output)
        ).backward()
        outputs.append(output)
    assert outputs[0].keys() == outputs[1].keys()
    assert ('denoising.corners' in outputs[0]) == (sum(sizes) > 0)
    assert_equal_tensors(*outputs, 1e-6)
    compare_gradients(ours, theirs, sum(sizes))


def compare_gradients(ours: nn.Module, theirs: nn.Module, num_boxes: int) -> None:
    mine = {k: p.grad for k, p in ours.named_parameters()}
    expected = {k: p.grad for k, p in theirs.named_parameters()}
    untouched = {k for k, p in theirs.named_parameters() if not p.requires_grad}
    if not num_boxes:
        untouched.add('decoder.denoising_class_embed.weight')
        assert not mine['decoder.denoising_class_embed.weight'].any()
    assert {k for k, grad in expected.items() if grad is None} == untouched
    expected = {k: grad for k, grad in expected.items() if grad is not None}
    scale = max(grad.abs().max() for grad in expected.values())
    errors = {
        k: ((mine[k] - grad).abs().max() / grad.abs().max().clamp(1e-4 * scale)).item()
        for k, grad in expected.items()
    }
    print(f'largest error of a gradient {max(errors.values()):.2e}')
    assert {k: v for k, v in errors.items() if not v <= 1e-5} == {}


@pytest.mark.parametrize('size', ['atto', 'n', 'x'])
@pytest.mark.parametrize('sizes', [(4,), (3, 0, 7)])
@pytest.mark.parametrize('late', [False, True])
def test_loss_terms_and_gradients_equal_the_official_ones(official, size, sizes, late):
    """Atto's criterion has no union and no distributions; N's and X's have both."""
    config, ours = official_config(size), load_model_config(size)
    criterion = MODELS.build(ours.model.criterion)
    reference = build_official_criterion(official, config)
    epoch = 0
    if late:  # the matching of the last epochs
        epoch = config['DEIMCriterion']['matcher']['matcher_change_epoch']
        criterion.matcher = ScoreIoUMatcher(iou_power=4.0)
    output, truth = benchmark.random_batch(sizes, num_layers=3, seed=len(sizes))
    benchmark.bring_together(output, 0.02)  # as late in training
    reg_scale = config['DEIMTransformer']['reg_scale']
    leaves = list(benchmark.leaves(output).items())
    for _, leaf in leaves:
        leaf.requires_grad_()
    inputs = benchmark.official_inputs(output, truth, float(reg_scale))
    expected = reference(*inputs, epoch=epoch)
    found = criterion(output, truth)
    # The last denoising layer is its own teacher: left out there, 0 here.
    assert all(found[name] == 0 for name in found.keys() - expected.keys())
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f'{n}: {m}'
        )
    tensors = [leaf for _, leaf in leaves]
    grads = [
        torch.autograd.grad(sum(losses.values()), tensors, allow_unused=True)
        for losses in (found, expected)
    ]
    for (name, _), mine, theirs in zip(leaves, *grads, strict=True):
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            difference = (mine - theirs).abs().max() / theirs.abs().max()
            assert difference < 2e-5, f'{name}: {difference:.1e}'
