"""The decoder layer with gates: how it starts, and what it survives."""

import torch
from torch import nn
from torch.testing import assert_close

from mmbackbones.layers.decoder_layer import GatedDecoderLayer, GatedFusion


def test_gates_start_half_open():
    module = GatedFusion(8)
    x, update = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    assert_close(module(x, update), nn.LayerNorm(8)(0.5 * x + 0.5 * update))


def test_a_gate_can_close_either_term():
    module = GatedFusion(4)
    with torch.no_grad():
        module.gate.bias[:4], module.gate.bias[4:] = 100, -100
    x, update = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    assert_close(module(x, update), nn.LayerNorm(4)(x))


def test_a_decoder_layer_starts_as_published():
    layer = GatedDecoderLayer(32, 4, (2, 2), 64)
    bound = (6 / (32 + 64)) ** 0.5
    for linear in (layer.linear1, layer.linear2):
        assert 0.97 * bound < linear.weight.abs().max() <= bound


def test_a_decoder_layer_survives_what_float16_cannot_hold():
    layer = GatedDecoderLayer(8, 2, (1,), 8)
    with torch.no_grad():
        layer.linear2.bias.fill_(1e38)
        layer.linear2.bias[0] = -1e38
    x = torch.randn(1, 3, 8)
    out = layer(x, x, torch.rand(1, 3, 4), [torch.randn(2, 4, 2, 2)])
    assert out.isfinite().all()
