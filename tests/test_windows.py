"""Attention windows against their definition."""

import pytest
import torch
import torch.nn.functional as F
from backbone_helpers import fill, image
from torch.testing import assert_close

from mmbackbones.layers.hiera_block import WindowAttention
from mmbackbones.layers.windows import merge_windows, partition_windows


@pytest.mark.parametrize('shape', [(1, 1, 1, 1, 1), (2, 3, 8, 4, 2), (1, 2, 5, 7, 3)])
@pytest.mark.parametrize('side', [1, 4])
def test_merging_undoes_the_partition(shape, side):
    x = image(*shape)
    windows = partition_windows(x, side)
    assert windows.shape[1:] == (1, side, side, shape[-1])
    assert_close(merge_windows(windows, shape[:4]), x)
    first = F.pad(x, (0, 0, 0, side, 0, side))[0, 0, :side, :side]
    assert_close(windows[0, 0], first)


@pytest.mark.parametrize('pool_query', [False, True])
@pytest.mark.parametrize('size', [(2, 8, 12), (1, 6, 10), (1, 2, 2)])
@pytest.mark.parametrize('side', [4, 8])
def test_window_attention_is_masked_global_attention(side, size, pool_query):
    frames, height, width = size
    attn = WindowAttention(6, 12, 2, window=side, pool_query=pool_query)
    fill(attn).eval()
    x = image(2, *size, 6)
    bottom, right = -height % side, -width % side
    padded = F.pad(x, (0, 0, 0, right, 0, bottom))
    grid = padded.shape[2:4]

    t, row, column = torch.meshgrid(
        *(torch.arange(n) for n in (frames, *grid)), indexing='ij'
    )
    window_of_key = torch.stack((t, row // side, column // side), -1).flatten(0, 2)
    q, k, v = attn.qkv(padded).chunk(3, dim=-1)  # (N, T, H, W, 12)
    window_of_query = window_of_key
    if pool_query:
        q = q.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
        window_of_query = window_of_key.view(frames, *grid, 3)[:, ::2, ::2].flatten(
            0, 2
        )
    same = (window_of_query[:, None] == window_of_key).all(-1)
    q, k, v = (y.flatten(1, 3).unflatten(-1, (2, 6)).transpose(1, 2) for y in (q, k, v))
    scores = (q @ k.mT / 6**0.5).masked_fill(~same, float('-inf'))
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    step = 2 if pool_query else 1
    y = attn.proj(y).unflatten(1, (frames, grid[0] // step, grid[1] // step))
    assert_close(attn(x), y[:, :, : height // step, : width // step])
