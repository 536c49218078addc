"""Networks of all families without memory, and what others publish beside them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmbackbones.backbones.convnextv2 import ConvNeXtV2
from mmbackbones.backbones.hgnetv2 import HGNetV2
from mmbackbones.backbones.hiera import Hiera
from mmbackbones.backbones.resnet_vd import ResNetVD

ALL = (0, 1, 2, 3)
FAMILIES = {cls.__name__: cls for cls in (HGNetV2, Hiera, ConvNeXtV2, ResNetVD)}
IMAGE_HIERA = ('tiny', 'small', 'base', 'base_plus', 'large', 'huge')
SAM2_HIERA = ('sam2_tiny', 'sam2_small', 'sam2_base_plus', 'sam2_large')
ABSWIN_HIERA = ('small_abswin', 'base_abswin')

Shapes = dict[str, tuple[int, ...]]


def meta_net(family: str, arch: str, **kwargs) -> nn.Module:
    with torch.device('meta'):
        return FAMILIES[family](arch, out_indices=ALL, **kwargs)


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state.items()}


def meta_tensors(shapes: Shapes) -> dict[str, Tensor]:
    return {k: torch.empty(shape, device='meta') for k, shape in shapes.items()}


def linear(name: str, width_in: int, width_out: int) -> Shapes:
    return {f'{name}.weight': (width_out, width_in), f'{name}.bias': (width_out,)}


def norm(name: str, width: int) -> Shapes:
    return {f'{name}.weight': (width,), f'{name}.bias': (width,)}


def _expanding_head(last_conv: str, lab: str, has_lab: bool, width: int) -> Shapes:
    """HGNetV2's, as PaddleClas and timm have it."""
    affine = {f'{lab}.scale': (1,), f'{lab}.bias': (1,)} if has_lab else {}
    return {f'{last_conv}.weight': (2048, width, 1, 1), **affine}


def _hiera_decoder(widths: tuple[int, ...], is_video: bool) -> Shapes:
    shapes = {
        'mask_token': (1, 1, 512),
        'decoder_pos_embed': (1, 8 * 196 if is_video else 196, 512),
        **norm('encoder_norm', widths[-1]),
        **linear('decoder_embed', widths[-1], 512),
        **norm('decoder_norm', 512),
        **linear('decoder_pred', 512, 16 * 16 * 3),
    }
    for i, side in enumerate((4, 2)):
        head = f'multi_scale_fusion_heads.{i}'
        kernel = (1, side, side) if is_video else (side, side)
        shapes[f'{head}.weight'] = (widths[-1], widths[i], *kernel)
        shapes[f'{head}.bias'] = (widths[-1],)
    for k in range(8):
        block = f'decoder_blocks.{k}'
        shapes |= norm(f'{block}.norm1', 512) | norm(f'{block}.norm2', 512)
        shapes |= linear(f'{block}.attn.qkv', 512, 1536)
        shapes |= linear(f'{block}.attn.proj', 512, 512)
        shapes |= linear(f'{block}.mlp.fc1', 512, 2048)
        shapes |= linear(f'{block}.mlp.fc2', 2048, 512)
    return shapes


def _fcmae_decoder(width: int) -> Shapes:
    return {
        'mask_token': (1, 512, 1, 1),
        'proj.weight': (512, width, 1, 1),
        'proj.bias': (512,),
        'decoder.0.dwconv.weight': (512, 1, 7, 7),
        'decoder.0.dwconv.bias': (512,),
        **norm('decoder.0.norm', 512),
        **linear('decoder.0.pwconv1', 512, 2048),
        'decoder.0.grn.gamma': (1, 1, 1, 2048),
        'decoder.0.grn.beta': (1, 1, 1, 2048),
        **linear('decoder.0.pwconv2', 2048, 512),
        'pred.weight': (3072, 512, 1, 1),
        'pred.bias': (3072,),
    }


def beside(family: str, source: str, net: nn.Module) -> Shapes:
    """What a source's files hold in addition to the backbone."""
    widths = net.out_channels
    last = widths[-1]
    has_lab = any('.lab.' in name for name in net.state_dict())
    match family, source:
        case 'HGNetV2', 'paddleclas_pdparams':
            head = _expanding_head('last_conv', 'lab', has_lab, last)
            return {**head, 'fc.weight': (2048, 1000), 'fc.bias': (1000,)}
        case 'HGNetV2', 'timm':
            names = ('head.last_conv.0', 'head.last_conv.2')
            head = _expanding_head(*names, has_lab, last)
            return {**head, **linear('head.fc', 2048, 1000)}
        case 'Hiera', 'official_cls':
            num_classes = 1000 if net.num_frames is None else 400
            return norm('norm', last) | linear('head.projection', last, num_classes)
        case 'Hiera', 'official_mae':
            return _hiera_decoder(widths, net.num_frames is not None)
        case (('Hiera' | 'ConvNeXtV2'), 'timm'):
            return norm('head.norm', last) | linear('head.fc', last, 1000)
        case 'ConvNeXtV2', 'official':
            return norm('norm', last) | linear('head', last, 1000)
        case 'ConvNeXtV2', 'official_fcmae_sparse_training_ckpt':
            return _fcmae_decoder(last)
    return {}
