"""The block of Hiera: windowed or global attention, queries pooled or not, and MLP.

Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles,
arXiv 2306.00989.
Upstream: https://github.com/facebookresearch/hiera hiera/hiera.py, whose names are
kept, and for layer scale and a shortcut without weights
https://github.com/huggingface/pytorch-image-models timm/models/hiera.py (both
Apache-2.0).
Departs from the source:
- tokens stay on their grid and are cut into windows where attention is windowed,
  instead of being reordered once; the numbers are the same.

Legend: N batch, T frames (1 for images), H W grid, C width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbackbones.layers.drop import DropPath
from mmbackbones.layers.windows import (
    max_pool_tokens,
    merge_windows,
    partition_windows,
)

__all__ = ['HieraBlock']

_NORM_EPS = 1e-6


class WindowAttention(nn.Module):
    """Attention within windows or over everything, with 2x2 fewer queries or not.

    Args:
        in_dims: width of the tokens.
        embed_dims: width inside and of the output.
        num_heads: which divide `embed_dims`.
        window: side of the windows in tokens, 0 for all tokens of all frames.
        pool_query: replace 2x2 queries by their maximum; keys and values stay.
    """

    def __init__(
        self,
        in_dims: int,
        embed_dims: int,
        num_heads: int,
        *,
        window: int,
        pool_query: bool,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.pool_query = pool_query
        self.qkv = nn.Linear(in_dims, 3 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, T, H, W, in)` to `(N, T, H', W', C)`, H' and W' halved or not."""
        n, t, h, w = x.shape[:4]
        if self.window:
            x = partition_windows(x, self.window)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.pool_query:
            q, h, w = max_pool_tokens(q), h // 2, w // 2
        grid = q.shape[:4]
        q, k, v = (self._split_heads(y) for y in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)
        x = x.transpose(1, 2).reshape(*grid, -1)
        if self.window:
            x = merge_windows(x, (n, t, h, w))
        return self.proj(x)

    def _split_heads(self, x: Tensor) -> Tensor:
        """`(N, T, H, W, C)` to `(N, heads, T * H * W, C / heads)`."""
        return x.flatten(1, 3).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Mlp(nn.Module):
    """Two linear layers, the inner one four times as wide, with an exact GELU."""

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, 4 * embed_dims)
        self.fc2 = nn.Linear(4 * embed_dims, embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., C)` to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel, small at first."""

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed_dims,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., C)` to the same shape."""
        return x * self.gamma


class HieraBlock(nn.Module):
    """Attention and MLP, each after a norm and beside a shortcut.

    Where a stage begins (`in_dims` differs from `embed_dims`) the grid is halved and
    the width doubled: attention pools its queries, and the shortcut the normalised
    input behind a linear layer.

    Args:
        in_dims: width of the tokens.
        embed_dims: width of the output, `in_dims` or twice that.
        num_heads: which divide `embed_dims`.
        window: side of the attention windows in tokens, 0 for global attention.
        drop_path_rate: of both branches.
        layer_scale: whether learned factors per channel follow attention and MLP.
        expand_proj: whether the shortcut doubles its channels by a linear layer; if
            not, the maximum and the mean of the input are put side by side.
    """

    def __init__(
        self,
        in_dims: int,
        embed_dims: int,
        num_heads: int,
        *,
        window: int,
        drop_path_rate: float = 0.0,
        layer_scale: bool = False,
        expand_proj: bool = True,
    ) -> None:
        super().__init__()
        self.is_first = in_dims != embed_dims
        self.norm1 = nn.LayerNorm(in_dims, eps=_NORM_EPS)
        self.attn = WindowAttention(
            in_dims, embed_dims, num_heads, window=window, pool_query=self.is_first
        )
        self.norm2 = nn.LayerNorm(embed_dims, eps=_NORM_EPS)
        self.mlp = Mlp(embed_dims)
        has_proj = self.is_first and expand_proj
        self.proj = nn.Linear(in_dims, embed_dims) if has_proj else None
        self.ls1 = LayerScale(embed_dims) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(embed_dims) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, T, H, W, in)` to `(N, T, H', W', C)`, H' and W' halved or not."""
        normed = self.norm1(x)
        if self.is_first:
            x = self._pool_shortcut(x, normed)
        x = x + self.drop_path(self.ls1(self.attn(normed)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))

    def _pool_shortcut(self, x: Tensor, normed: Tensor) -> Tensor:
        if self.proj is not None:
            return max_pool_tokens(self.proj(normed))
        n, t, h, w, c = x.shape
        mean = x.reshape(n, t, h // 2, 2, w // 2, 2, c).mean((3, 5))
        return torch.cat((max_pool_tokens(x), mean), dim=-1)
