"""Everything that follows a linear operation and is linear itself, made part of it.

Departs from the usual folding of batch norms:
- frozen batch norms fold, too;
- a learnable affine folds into the convolution before it, past the ReLU between them:
  s relu(z) + b is max(s z + b, b) where s >= 0, and min(s z + b, b) where s < 0. The
  map that comes out is the same, so zero padding behind it does no harm;
- 1x1 convolutions come before the upsampling, and halves out of two convolutions;
- constant factors of sampling offsets go into the linear layer that predicts them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mmbackbones.layers.attention import DeformableAttention
from mmbackbones.layers.conv import ConvBNAct, LearnableAffine
from mmbackbones.layers.hg_stem import HGStem
from mmbackbones.layers.hiera_block import HieraBlock, LayerScale
from mmbackbones.layers.norm import FrozenBatchNorm2d
from mmbackbones.layers.reparam import ConvNorm, RepNCSPELAN

__all__ = ['Bound', 'fold_for_inference', 'pad_channels']

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
_SERIES = (nn.Sequential, ConvBNAct, ConvNorm)  # run their children in order


class Bound(nn.Module):
    """A one-sided bound, where a ReLU and a learnable affine were.

    Args:
        value: of the bound.
        is_upper: whether values above it are cut, rather than those below.
    """

    def __init__(self, value: float, *, is_upper: bool = False) -> None:
        super().__init__()
        self.value = value
        self.is_upper = is_upper

    def forward(self, x: Tensor) -> Tensor:
        """Cut a tensor of any shape, in place."""
        return x.clamp_(max=self.value) if self.is_upper else x.clamp_(min=self.value)

    def extra_repr(self) -> str:
        """The bound, for `print(model)`."""
        return f'{"<=" if self.is_upper else ">="} {self.value:.4g}'


@torch.no_grad()
def fold_for_inference(model: nn.Module, *, channels_last: bool = True) -> nn.Module:
    """Fold all that folds, in place; the same numbers, but training is over.

    Re-parameterised blocks become single convolutions (`switch_to_deploy`), batch
    norms, frozen or not, go into the convolutions before them, learnable affines
    likewise, layer scales into the linear layers before them; projections behind
    upsampling go before it. Folding twice changes nothing.

    The names of the state dict change: load a checkpoint first.

    Args:
        model: a backbone, detector or segmentor.
        channels_last: keep the weights of convolutions, and so all maps, channels
            last in memory, which is faster on CPUs and in half precision on GPUs.

    Returns:
        `model`, in evaluation mode.
    """
    model.eval()
    if hasattr(model, 'switch_to_deploy'):
        model.switch_to_deploy()
    for module in list(model.modules()):
        if isinstance(module, _SERIES):
            _fold_norms(module)
        if isinstance(module, ConvBNAct):
            _fold_affine(module)
        if isinstance(module, HieraBlock):
            _fold_layer_scales(module)
    for module in list(model.modules()):
        # Encoders come before the blocks inside them, and know which maps are coarse.
        if hasattr(module, 'upsample_late'):
            module.upsample_late()
        if isinstance(module, RepNCSPELAN):
            module.split_projection()
        if isinstance(module, HGStem):
            module.split_concatenation()
        if isinstance(module, DeformableAttention):
            module.fold_scale()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def _fold_norms(series: nn.Module) -> None:
    """Fold each norm that directly follows a convolution."""
    before = None
    for name, child in series.named_children():
        if isinstance(child, _NORMS) and type(before) is nn.Conv2d:
            before.weight, before.bias = fuse_conv_bn_weights(
                before.weight,
                before.bias,
                child.running_mean,
                child.running_var,
                child.eps,
                child.weight,
                child.bias,
            )
            setattr(series, name, nn.Identity())
        before = child


def _fold_affine(block: ConvBNAct) -> None:
    if not isinstance(block.lab, LearnableAffine):
        return
    scale, bias = block.lab.scale, block.lab.bias
    block.conv.weight.mul_(scale)
    block.conv.bias.mul_(scale).add_(bias)
    block.act = Bound(bias.item(), is_upper=scale.item() < 0)
    block.lab = nn.Identity()


def _fold_layer_scales(block: HieraBlock) -> None:
    for name, linear in (('ls1', block.attn.proj), ('ls2', block.mlp.fc2)):
        scale = getattr(block, name)
        if isinstance(scale, LayerScale):
            linear.weight.mul_(scale.gamma[:, None])
            linear.bias.mul_(scale.gamma)
            setattr(block, name, nn.Identity())


@torch.no_grad()
def pad_channels(model: nn.Module, multiple: int = 8) -> nn.Module:
    """Widen the branches of `RepNCSPELAN`, in place, to a multiple; the same numbers.

    Runtimes keep maps in blocks of channels. ONNX Runtime leaves convolutions whose
    channels are no multiple of 4 out of that, as the 21 of D-FINE-N's branches; filled
    up with zeros they are in.

    Args:
        model: after `fold_for_inference`.
        multiple: of the channels.

    Returns:
        `model`.
    """
    for block in model.modules():
        if type(block) is RepNCSPELAN:  # its descendants' branches are built otherwise
            width = block.cv2[1].conv.out_channels
            more = -width % multiple
            if more:
                _widen(block, width, more)
    return model


def _widen(block: RepNCSPELAN, width: int, more: int) -> None:
    for branch in (block.cv2, block.cv3):
        layer, last = branch
        for conv in (layer.conv1.conv, layer.conv2.conv):
            _resize(conv, more_out=more)
        for bottleneck in layer.bottlenecks:
            _resize(bottleneck.conv, more_in=more, more_out=more)
        _resize(last.conv, more_in=more, more_out=more)
    for conv in (block.cv3[0].conv1.conv, block.cv3[0].conv2.conv):
        _resize(conv, more_in=more)
    # Both branches are at the end of what the last convolution reads.
    conv = block.cv4.conv
    head, first, second = conv.weight.split(
        (conv.in_channels - 2 * width, width, width), 1
    )
    first, second = (F.pad(part, (0, 0, 0, 0, 0, more)) for part in (first, second))
    conv.weight = nn.Parameter(torch.cat((head, first, second), 1))
    conv.in_channels += 2 * more


def _resize(conv: nn.Conv2d, *, more_in: int = 0, more_out: int = 0) -> None:
    """Append channels of zeros; SiLU, which follows everywhere, keeps them zero."""
    conv.weight = nn.Parameter(
        F.pad(conv.weight, (0, 0, 0, 0, 0, more_in, 0, more_out))
    )
    conv.bias = nn.Parameter(F.pad(conv.bias, (0, more_out)))
    conv.in_channels += more_in
    conv.out_channels += more_out
