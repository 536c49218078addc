"""Images and weights for tests of backbones."""

import torch
from torch import Tensor, nn


def image(*shape: int) -> Tensor:
    """The same uniform noise in [0, 1) on every call."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def fill(net: nn.Module) -> nn.Module:
    """Give a network weights and statistics that no layer could ignore unnoticed."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in net.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.rand(tensor.shape, generator=generator)
        leaf = name.rsplit('.')[-1]
        if leaf in ('running_var', 'scale') or (leaf == 'weight' and tensor.ndim == 1):
            tensor.copy_(noise + 0.5)
        elif leaf in ('gamma', 'beta') or tensor.ndim == 1:
            tensor.copy_(noise - 0.5)
        else:  # keeps the variance of what passes
            tensor.copy_((noise - 0.5) * (12 / tensor[0].numel()) ** 0.5)
    return net


def relative_errors(
    found: tuple[Tensor, ...], expected: tuple[Tensor, ...]
) -> list[float]:
    """Largest difference of each pair of maps, by the largest expected value."""
    return [
        ((f - e).abs().max() / e.abs().max()).item()
        for f, e in zip(found, expected, strict=True)
    ]
