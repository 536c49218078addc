"""Position tables at the size of a grid."""

import pytest
import torch
from backbone_helpers import image
from torch.testing import assert_close

from mmbackbones.layers.position_table import resample_table, tile_table


def test_a_table_is_stretched_in_space_and_time_or_left_alone():
    table = image(1, 2, 4, 6)
    assert resample_table(table, (4, 6)) is table
    flat = torch.full((1, 2, 4, 6), 3.0)
    assert_close(resample_table(flat, (7, 5)), torch.full((1, 2, 7, 5), 3.0))
    pillow = resample_table(table, (8, 12), antialias=True)
    assert not torch.allclose(pillow, resample_table(table, (8, 12)))
    times = torch.tensor([[[0.0, 4.0]]])
    assert_close(resample_table(times, (4,)), torch.tensor([[[0.0, 1.0, 3.0, 4.0]]]))


@pytest.mark.parametrize('size', [(2, 3), (4, 6), (5, 4), (1, 1)])
def test_a_window_table_repeats_from_the_top_left(size):
    table = image(1, 2, 2, 3)
    tiled = tile_table(table, size)
    assert tiled.shape == (1, 2, *size)
    for row in range(size[0]):
        for column in range(size[1]):
            assert_close(tiled[..., row, column], table[..., row % 2, column % 3])
