"""Properties of the distance bins and of the boxes that they decode to."""

import pytest
import torch
from torch.testing import assert_close

from mmbackbones.ops.distribution import (
    distance_to_box,
    edge_probabilities,
    integral,
    weighting_function,
)

UP = torch.tensor([0.5])
# The right half of W at reg_max 32, from the published models.
W4 = (
    '.07599 .15775 .24573 .34039 .44225 .55185 .66977 .79665 .93318 1.08008 1.23815 '
    '1.40822 1.59122 1.78813 2.0 4.0'
)
W8 = (
    '.11326 .23936 .37973 .53600 .70998 .90365 1.11927 1.35930 1.62653 1.92402 2.25520 '
    '2.62390 3.03435 3.49130 4.0 8.0'
)


@pytest.mark.parametrize(('reg_scale', 'right'), [(4.0, W4), (8.0, W8)])
def test_bins_are_the_published_ones(reg_scale, right):
    bins = weighting_function(32, UP, torch.tensor([reg_scale]))
    expected = torch.tensor([float(value) for value in right.split()])
    assert_close(bins[17:], expected, atol=6e-6, rtol=0)
    assert_close(weighting_function(32, 0.5, reg_scale), bins)


@pytest.mark.parametrize('reg_max', [4, 8, 32])
@pytest.mark.parametrize('reg_scale', [-4.0, 1.0, 4.0])
def test_bins_rise_from_end_to_end(reg_max, reg_scale):
    bins = weighting_function(reg_max, 0.5, reg_scale)
    bound = abs(0.5 * reg_scale)
    assert bins.shape == (reg_max + 1,)
    assert bins.diff().min() > 0
    assert bins[reg_max // 2] == 0
    assert_close(bins, -bins.flip(0))
    assert_close(bins[[0, 1, -2, -1]], bound * torch.tensor([-2.0, -1, 1, 2]))


def test_no_boxes_have_no_distances():
    bins = weighting_function(32, 0.5, 4.0)
    distances = integral(torch.zeros(0, 132), bins)
    assert distances.shape == (0, 4)
    assert distance_to_box(torch.zeros(0, 4), distances, 4.0).shape == (0, 4)


def test_a_certain_edge_is_at_its_bin():
    bins = weighting_function(32, 0.5, 4.0)
    corners = torch.full((3, 4, 33), -100.0)
    chosen = torch.tensor([[0, 5, 16, 32], [1, 1, 1, 1], [31, 2, 3, 4]])
    corners.scatter_(2, chosen[..., None], 100.0)
    assert_close(integral(corners.flatten(1), bins), bins[chosen])


def test_an_undecided_edge_does_not_move():
    bins = weighting_function(32, 0.5, 4.0)
    assert_close(integral(torch.zeros(2, 5, 132), bins), torch.zeros(2, 5, 4))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_expectations_are_taken_in_float32_at_least(dtype):
    bins = weighting_function(32, 0.5, 4.0).to(dtype)
    corners = torch.randn(4, 132, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = integral(corners.double(), bins.double())
    with torch.autocast('cpu', torch.bfloat16):
        distances = integral(corners, bins)
    assert distances.dtype == dtype
    assert_close(distances, exact.to(dtype))
    probs = edge_probabilities(corners)
    assert probs.shape == (4, 4, 33)
    assert probs.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(
    ('distances', 'box'),
    [
        ((0, 0, 0, 0), (0.5, 0.4, 0.2, 0.1)),  # stays where it is
        # one unit is 0.2 / 4 = 0.05 wide and 0.1 / 4 = 0.025 high
        ((1, 0, 0, 0), (0.475, 0.4, 0.25, 0.1)),
        ((0, 0, 1, 0), (0.525, 0.4, 0.25, 0.1)),
        ((0, 2, 0, 0), (0.5, 0.375, 0.2, 0.15)),
        ((4, 4, 4, 4), (0.5, 0.4, 0.6, 0.3)),  # W(R) moves each edge by a side
        ((-3, 0, -3, 0), (0.5, 0.4, -0.1, 0.1)),  # crossed
    ],
)
def test_boxes_by_hand(distances, box):
    ref = torch.tensor([0.5, 0.4, 0.2, 0.1])
    found = distance_to_box(ref, torch.tensor(distances, dtype=torch.float32), 4.0)
    assert_close(found, torch.tensor(box))


@pytest.mark.parametrize('reg_scale', [4.0, 8.0])
def test_distances_of_a_box_lead_back_to_it(reg_scale):
    generator = torch.Generator().manual_seed(0)
    cx, cy, w, h = torch.rand(4, 20, generator=generator) + 0.1
    x1, y1, x2, y2 = torch.rand(4, 20, generator=generator)
    half = reg_scale / 2
    distances = (
        (cx - x1) * reg_scale / w - half,
        (cy - y1) * reg_scale / h - half,
        (x2 - cx) * reg_scale / w - half,
        (y2 - cy) * reg_scale / h - half,
    )
    found = distance_to_box(
        torch.stack((cx, cy, w, h), 1), torch.stack(distances, 1), reg_scale
    )
    expected = torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), 1)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_gradients_are_right():
    bins = weighting_function(8, 0.5, 4.0).double()
    generator = torch.Generator().manual_seed(0)
    corners = torch.randn(2, 36, generator=generator, dtype=torch.float64)
    ref = torch.rand(2, 4, generator=generator, dtype=torch.float64)

    def decode(corners):
        return distance_to_box(ref, integral(corners, bins), 4.0)

    assert torch.autograd.gradcheck(decode, corners.requires_grad_())


@pytest.mark.parametrize('reg_max', [2, 31, 0, '32'])
def test_a_number_of_bins_that_has_no_middle_is_refused(reg_max):
    with pytest.raises(ValueError, match=f'reg_max is {reg_max!r}; it is an even'):
        weighting_function(reg_max, 0.5, 4.0)
