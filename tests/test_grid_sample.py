"""Sampling by gathering equals grid_sample, at borders and outside also."""

import pytest
import torch
import torch.nn.functional as F

from mmbackbones.ops.grid_sample import grid_sample_by_gather


@pytest.mark.parametrize('size_hw', [(1, 1), (1, 5), (4, 7), (9, 3)])
@pytest.mark.parametrize('reach', [0.5, 1.0, 1.4, 3.0])
def test_equal_everywhere(size_hw: tuple[int, int], reach: float) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, *size_hw, generator=generator)
    grid = (torch.rand(2, 6, 50, 2, generator=generator) * 2 - 1) * reach
    wanted = F.grid_sample(maps, grid, align_corners=False)
    found = grid_sample_by_gather(maps, grid)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_exact_borders_and_points_far_away() -> None:
    height, width = 4, 6
    maps = torch.arange(1.0, 25.0).view(1, 1, height, width)
    # Outer borders, centres of the corner pixels, just outside, and far away.
    x = torch.tensor([-1, 1, -1 + 1 / width, 1 - 1 / width, -1 - 1 / width, 1e8, -1e8])
    y = torch.tensor([-1, 1, -1 + 1 / height, 1 - 1 / height, 1 + 1 / height, 0, 1e9])
    grid = torch.stack(torch.meshgrid(x, y, indexing='ij'), -1)[None]
    wanted = F.grid_sample(maps, grid, align_corners=False)
    found = grid_sample_by_gather(maps, grid)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert wanted.abs().max() > 0
    assert (found[..., -2:, :] == 0).all()  # far away in x


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_finds_the_pixels_of_large_maps(dtype: torch.dtype) -> None:
    """Pixel numbers above 2048, or 256, are no numbers of these types."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, 4, 80, 96, generator=generator).to(dtype)
    grid = (torch.rand(1, 5, 50, 2, generator=generator) * 2.2 - 1.1).to(dtype)
    wanted = F.grid_sample(maps.float(), grid.float(), align_corners=False)
    found = grid_sample_by_gather(maps, grid)
    assert found.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.float(), wanted, atol=tolerance, rtol=tolerance)
