"""Attention layers against torch's own."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmbackbones.layers.attention import SelfAttention, TransformerEncoderLayer


@pytest.mark.parametrize('masked', [False, True])
def test_self_attention_equals_that_of_torch(masked):
    torch.manual_seed(0)
    ours = SelfAttention(24, 4).eval()
    theirs = nn.MultiheadAttention(24, 4, batch_first=True).eval()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    nn.init.normal_(ours.in_proj_bias)
    theirs.load_state_dict(ours.state_dict())
    x, pos = torch.randn(2, 7, 24), torch.randn(1, 7, 24)
    visible = torch.rand(7, 7) < 0.5
    visible.fill_diagonal_(True)
    blocked = ~visible if masked else None
    expected, _ = theirs(x + pos, x + pos, x, attn_mask=blocked)
    assert_close(ours(x, pos, visible if masked else None), expected)


def test_a_number_says_the_same_as_its_mask():
    attention = SelfAttention(16, 4)
    x, pos = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    first = torch.arange(7) < 3
    mask = first[:, None] | ~first
    torch.testing.assert_close(attention(x, pos, 3), attention(x, pos, mask))


def test_self_attention_starts_like_that_of_torch():
    module = SelfAttention(64, 8)
    bound = (6 / (3 * 64 + 64)) ** 0.5  # xavier, of the joint matrix
    assert 0.98 * bound < module.in_proj_weight.abs().max() <= bound
    assert not module.in_proj_bias.any()
    assert not module.out_proj.bias.any()


def test_an_encoder_layer_equals_that_of_torch():
    torch.manual_seed(0)
    ours = TransformerEncoderLayer(16, 4, 20)
    theirs = nn.TransformerEncoderLayer(
        16, 4, 20, dropout=0, activation='gelu', batch_first=True
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 16)
    assert_close(ours(x, torch.zeros(1, 5, 16)), theirs(x))
