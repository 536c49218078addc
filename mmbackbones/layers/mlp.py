"""Multi-layer perceptrons of the detection heads and of decoder layers.

Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/dfine_decoder.py, MLP;
https://github.com/Intellindust-AI-Lab/DEIMv2 engine/deim/deim_utils.py, SwiGLUFFN
(both Apache-2.0).
Departs from the source: none.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['MLP', 'SwiGLU']


class MLP(nn.Module):
    """Linear layers with an activation between them, none after the last.

    Args:
        in_channels: width of the input.
        hidden_channels: width between the layers.
        out_channels: width of the output.
        num_layers: number of linear layers, at least 1.
        activation: class of the activation.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[hidden_channels] * (num_layers - 1), out_channels]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_channels)` to `(..., out_channels)`."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class SwiGLU(nn.Module):
    """Feed-forward whose hidden channels are gated by others: w3(silu(a) * b).

    GLU Variants Improve Transformer, arXiv 2002.05202. `w12` makes a and b at once.

    Args:
        channels: of input and output.
        hidden_channels: of a and of b.
    """

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(channels, 2 * hidden_channels)
        self.w3 = nn.Linear(hidden_channels, channels)
        for linear in (self.w12, self.w3):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., channels)` to the same shape."""
        gate, hidden = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * hidden)
