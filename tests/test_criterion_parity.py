"""Every loss term and every gradient against the official criterion."""

import os

import pytest
from criterion_helpers import benchmark, with_gradients
from parity_helpers import compare_losses

from mmbackbones.losses import DFINECriterion

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        'MMB_REFERENCE_DIR' not in os.environ,
        reason='MMB_REFERENCE_DIR is not set; it holds the official D-FINE/',
    ),
]


@pytest.fixture(scope='module')
def official():
    return benchmark.official_criterion()


def compare(official, output, targets, reg_scale=4.0):
    leaves = with_gradients(output)
    ours = DFINECriterion(reg_scale=reg_scale)(output, targets)
    theirs = benchmark.official_losses(official, output, targets, reg_scale)
    assert set(ours) == set(theirs)
    assert not compare_losses(ours, theirs, leaves)
    return ours


@pytest.mark.parametrize('num_layers', [3, 6])
@pytest.mark.parametrize(
    'sizes', [(5,), (1,), (3, 0, 9, 2), (0, 7, 0, 1), (40, 3), (350,)]
)
@pytest.mark.parametrize('reg_scale', [4.0, 8.0])
def test_losses_and_gradients_equal_the_official(
    official, sizes, num_layers, reg_scale
):
    batch = benchmark.random_batch(sizes, num_layers=num_layers, seed=len(sizes))
    compare(official, *batch, reg_scale=reg_scale)


@pytest.mark.parametrize('num_layers', [3, 6])
def test_layers_that_agree_equal_the_official(official, num_layers):
    # as late in training
    output, targets = benchmark.random_batch((3, 0, 9, 2), num_layers=num_layers)
    benchmark.bring_together(output, 0.02)
    compare(official, output, targets)


def test_first_iteration_equals_the_official(official):
    # all layers alike: the official criterion then skips the distillation
    output, targets = benchmark.random_batch((3, 0, 9, 2), num_layers=3)
    benchmark.bring_together(output, 0)
    losses = compare(official, output, targets)
    assert all(loss == 0 for name, loss in losses.items() if 'ddf' in name)


def test_crossed_edges_equal_the_official(official):
    # distributions may put the right edge left of the left one
    output, targets = benchmark.random_batch((3, 5), num_layers=3)
    for queries in (output.queries, output.denoising):
        queries.boxes[:, :, ::3, 2:] *= -1
    compare(official, output, targets)
