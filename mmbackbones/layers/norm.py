"""Normalisations that torch does not have.

Departs from the sources named at each class:
- `FrozenBatchNorm2d` keeps the dtype of its input, so that autocast does not
  double the memory of a frozen backbone;
- `GlobalResponseNorm` takes its norm in fp32 or better, where squares of a
  half-precision map would overflow.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['FrozenBatchNorm2d', 'GlobalResponseNorm', 'LayerNorm2d', 'RMSNorm']


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation whose affine and statistics are all constants.

    Upstream: https://github.com/facebookresearch/detectron2
    detectron2/layers/batch_norm.py (Apache-2.0).

    The four vectors are buffers with the names of `nn.BatchNorm2d`, so they are no
    parameters to any count or optimiser, and a batch-norm checkpoint loads: its
    `num_batches_tracked` is dropped on the way.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer('weight', torch.ones(num_features))
        self.register_buffer('bias', torch.zeros(num_features))
        self.register_buffer('running_mean', torch.zeros(num_features))
        self.register_buffer('running_var', torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C, H, W)` to the same shape and dtype."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        # One multiply and one add, and the input is not kept for the backward pass.
        y = x * scale.to(x.dtype).view(-1, 1, 1)
        return y.add_(shift.to(x.dtype).view(-1, 1, 1))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        state_dict.pop(f'{prefix}num_batches_tracked', None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Channels and eps, for `print(model)`."""
        return f'{self.weight.numel()}, eps={self.eps}'


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of a map.

    Upstream: https://github.com/facebookresearch/ConvNeXt-V2 models/utils.py (MIT).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C, H, W)` to the same shape, channels last in memory."""
        y = x.permute(0, 2, 3, 1)  # (N, H, W, C)
        y = F.layer_norm(y, self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)  # (N, C, H, W)


class GlobalResponseNorm(nn.Module):
    """Makes channels compete by their norm over the whole map ("GRN").

    ConvNeXt V2, arXiv 2301.00808, algorithm 1.
    Upstream: https://github.com/facebookresearch/ConvNeXt-V2 models/utils.py (MIT).

    G_c = |x_c| over H and W, N_c = G_c / (mean of G over channels + 1e-6),
    y = gamma * x * N + beta + x. Both parameters start at 0, that is, as the identity.

    Args:
        num_channels: C.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, num_channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, H, W, C)` to the same shape and dtype."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=dtype)
        # (N, 1, 1, C)
        scale = self.gamma * norm / (norm.mean(dim=-1, keepdim=True) + 1e-6) + 1
        return (x * scale).add_(self.beta).to(x.dtype)


class RMSNorm(nn.Module):
    """Division by the root mean square over the last dimension, and a scale.

    Root Mean Square Layer Normalization, arXiv 1910.07467.
    Upstream: https://github.com/Intellindust-AI-Lab/DEIMv2 engine/deim/deim_utils.py
    (Apache-2.0). `nn.RMSNorm` calls its parameter `weight`.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` to the same shape; squares are taken in float32."""
        y = x if x.dtype == torch.float64 else x.float()
        y = y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return y.type_as(x) * self.scale
