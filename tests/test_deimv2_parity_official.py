"""DEIMv2 with HGNetV2 against the official code, on the same random weights.

Configurations are those of the official files, narrowed to run in seconds; counts and
names are of the full models. Reference: see `deimv2_helpers`.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from criterion_helpers import benchmark, with_gradients
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
from official_helpers import as_ours, official_targets
from parity_helpers import (
    assert_equal_gradients,
    assert_equal_tensors,
    compare_losses,
    correct_grid,
    read_rectangles,
    shapes,
    train,
    untouched_by,
)
from torch import Tensor, nn

from mmbackbones.losses.matching import ScoreIoUMatcher
from mmbackbones.registry import MODELS

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
    assert shapes(ours) == shapes(theirs)
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
def test_rectangles_equal_the_official_ones_with_its_grid_corrected(official, size):
    ours, theirs = (net.double() for net in pair(official, size))
    read_rectangles(theirs)
    if size != 'atto':  # whose encoder has no positions
        correct_grid(theirs.encoder)
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
    found, mine = train(ours, lambda: ours.decoder(ours.extract_feat(x), truth))
    expected, grads = train(theirs, lambda: as_ours(theirs(x, official_targets(truth))))
    assert found.keys() == expected.keys()
    assert ('denoising.corners' in found) == (sum(sizes) > 0)
    assert_equal_tensors(found, expected, 1e-6)
    untouched = {k for k, p in theirs.named_parameters() if not p.requires_grad}
    untouched |= untouched_by(truth, mine)
    assert {k for k, grad in grads.items() if grad is None} == untouched
    assert_equal_gradients(mine, grads)


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
    leaves = with_gradients(output)
    inputs = benchmark.official_inputs(output, truth, float(reg_scale))
    expected = reference(*inputs, epoch=epoch)
    # The last denoising layer is its own teacher: left out there, 0 here.
    compare_losses(criterion(output, truth), expected, leaves)
