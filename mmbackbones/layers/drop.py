"""Stochastic depth: whole residual branches left out, sample by sample.

Deep Networks with Stochastic Depth, arXiv 1603.09382.
Upstream: https://github.com/huggingface/pytorch-image-models timm/layers/drop.py
(Apache-2.0).
Departs from the source:
- the schedule is computed in plain Python, so networks build on the meta device.
"""

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ['DropPath', 'linear_drop_path_rates']


def linear_drop_path_rates(
    drop_path_rate: float, depths: Sequence[int]
) -> list[list[float]]:
    """Rates that grow linearly over all blocks, from 0 to `drop_path_rate`.

    Args:
        drop_path_rate: rate of the very last block, in [0, 1).
        depths: number of blocks of each stage.

    Returns:
        One list per stage, one rate per block.

    Raises:
        ValueError: `drop_path_rate` is not in [0, 1).
    """
    is_number = isinstance(drop_path_rate, (int, float))
    if not is_number or not 0 <= drop_path_rate < 1:
        raise ValueError(f'drop_path_rate is {drop_path_rate!r}; it must be in [0, 1)')
    last = max(sum(depths) - 1, 1)
    return [
        [drop_path_rate * (sum(depths[:i]) + j) / last for j in range(depth)]
        for i, depth in enumerate(depths)
    ]


class DropPath(nn.Module):
    """Zeroes a residual branch for a random part of the batch while training.

    The branches that stay are scaled by `1 / (1 - rate)`, so the expectation is
    that of evaluation, where the branch always stays.

    Args:
        rate: probability to leave a sample's branch out, in [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, ...)` to the same shape."""
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * x.new_empty(shape).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """The rate, for `print(model)`."""
        return f'rate={self.rate:.3f}'
