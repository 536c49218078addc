"""Multi-layer perceptron of the detection heads.

Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/dfine_decoder.py, MLP
(Apache-2.0).
Departs from the source: none.
"""

from itertools import pairwise

from torch import Tensor, nn

__all__ = ['MLP']


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
