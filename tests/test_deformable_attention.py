"""Deformable sampling against a loop over every point."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmbackbones.layers.attention import DeformableAttention
from mmbackbones.ops.deformable_attention import deformable_sample


def pixel(value: Tensor, row: int, column: int) -> Tensor:
    """All channels at a pixel; 0 outside."""
    height, width = value.shape[1:]
    if 0 <= row < height and 0 <= column < width:
        return value[:, row, column]
    return value.new_zeros(len(value))


def sample_by_hand(values, locations, weights, num_points):
    num_images, num_queries, num_heads = weights.shape[:3]
    out = []
    for n in range(num_images):
        for q in range(num_queries):
            for h in range(num_heads):
                level_of = [i for i, p in enumerate(num_points) for _ in range(p)]
                total = 0
                for p, level in enumerate(level_of):
                    value = values[level][n * num_heads + h]
                    height, width = value.shape[1:]
                    # pixel centres are at (i + 0.5) / size
                    x, y = locations[n, q, h, p].tolist()
                    x, y = x * width - 0.5, y * height - 0.5
                    left, top = math.floor(x), math.floor(y)
                    for row, wy in ((top, top + 1 - y), (top + 1, y - top)):
                        for column, wx in ((left, left + 1 - x), (left + 1, x - left)):
                            sample = pixel(value, row, column) * wy * wx
                            total = total + sample * weights[n, q, h, p]
                out.append(total)
    return torch.stack(out).reshape(num_images, num_queries, -1)


def random_inputs(num_points, sizes, num_queries=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    total = sum(num_points)
    values = [
        torch.randn(2 * 3, 5, h, w, generator=generator, dtype=dtype) for h, w in sizes
    ]
    shape = (2, num_queries, 3, total)
    # also beyond the borders
    locations = torch.rand(*shape, 2, generator=generator, dtype=dtype) * 1.6 - 0.3
    return values, locations, torch.rand(*shape, generator=generator, dtype=dtype)


def test_no_queries_read_nothing():
    inputs = random_inputs((2,), [(3, 4)], num_queries=0)
    assert deformable_sample(*inputs, (2,)).shape == (2, 0, 15)


@pytest.mark.parametrize(
    ('num_points', 'sizes'),
    [
        ((1,), [(1, 1)]),
        ((4,), [(3, 5)]),
        ((3, 6, 3), [(8, 6), (4, 3), (2, 2)]),
        ([6, 6], [(5, 7), (3, 4)]),
    ],
)
def test_samples_equal_those_of_a_loop(num_points, sizes):
    inputs = random_inputs(num_points, sizes)
    found = deformable_sample(*inputs, num_points)
    assert_close(found, sample_by_hand(*inputs, num_points))


def test_gradients_are_right():
    values, locations, weights = random_inputs((2, 1), [(3, 4), (2, 2)], 2)
    inputs = [*values, locations, weights]
    for tensor in inputs:
        tensor.requires_grad_()

    def sample(*args):
        return deformable_sample(args[:2], args[2], args[3], (2, 1))

    assert torch.autograd.gradcheck(sample, inputs)


def test_points_start_in_the_direction_of_their_head():
    module = DeformableAttention(16, 8, (3, 1))
    assert not module.sampling_offsets.weight.any()
    assert not module.attention_weights.weight.any()
    assert not module.attention_weights.bias.any()
    offsets = module.sampling_offsets.bias.view(8, 4, 2)
    steps = torch.tensor([1.0, 2, 3, 1])[:, None]
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for offset, direction in zip(offsets, directions, strict=True):
        assert_close(offset, steps * torch.tensor(direction), atol=5e-6, rtol=0)
    assert module.num_points_scale.tolist() == pytest.approx([1 / 3] * 3 + [1])


def test_a_fresh_module_averages_points_around_the_box():
    module = DeformableAttention(2, 1, (2,))
    # The value of a pixel is its x in [0, 1]; one head looks to the right.
    value = ((torch.arange(100) + 0.5) / 100).expand(2, 100, 100)[None]
    ref = torch.tensor([[[0.4, 0.5, 0.2, 0.6]]])
    # points at 0.4 + j / 2 * 0.2 / 2 = 0.45 and 0.5
    expected = torch.full((1, 1, 2), 0.475)
    assert_close(module(torch.randn(1, 1, 2), ref, [value]), expected)
