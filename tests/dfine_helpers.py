"""Sizes, weights and inputs for tests of D-FINE's encoder and decoder."""

import pytest
import torch
from torch import Tensor, nn

from mmbackbones.decoders import DFINEDecoder
from mmbackbones.necks import HybridEncoder
from mmbackbones.ops.predictions import BoxTargets, DecoderOutput

# The published sizes: backbone channels and strides, what differs from defaults.
SIZES = dict(
    N=dict(
        in_channels=(512, 1024),
        in_strides=(16, 32),
        encoder=dict(
            hidden_dim=128,
            use_encoder_idx=(1,),
            feedforward_channels=512,
            expansion=0.34,
            depth_mult=0.5,
        ),
        decoder=dict(
            hidden_dim=128, num_layers=3, num_points=(6, 6), feedforward_channels=512
        ),
    ),
    S=dict(
        in_channels=(256, 512, 1024),
        in_strides=(8, 16, 32),
        encoder=dict(expansion=0.5, depth_mult=0.34),
        decoder=dict(num_layers=3),
    ),
    M=dict(
        in_channels=(384, 768, 1536),
        in_strides=(8, 16, 32),
        encoder=dict(depth_mult=0.67),
        decoder=dict(num_layers=4),
    ),
    L=dict(
        in_channels=(512, 1024, 2048),
        in_strides=(8, 16, 32),
        encoder=dict(),
        decoder=dict(),
    ),
    X=dict(
        in_channels=(512, 1024, 2048),
        in_strides=(8, 16, 32),
        encoder=dict(hidden_dim=384, feedforward_channels=2048),
        decoder=dict(reg_scale=8),
    ),
)

# What the decoders of all toys share.
TOY_DECODER = dict(
    hidden_dim=32,
    num_queries=30,
    feedforward_channels=40,
    num_denoising=10,
    eval_size_hw=(128, 128),
)

# Relatives of N, L and X that run in milliseconds.
TOYS = dict(
    N=dict(
        in_channels=(12, 20),
        in_strides=(16, 32),
        encoder=dict(
            hidden_dim=32,
            use_encoder_idx=(1,),
            num_heads=4,
            feedforward_channels=40,
            expansion=0.34,
            depth_mult=0.5,
        ),
        decoder=dict(
            TOY_DECODER, num_queries=15, num_layers=3, num_heads=4, num_points=(6, 6)
        ),
    ),
    L=dict(
        in_channels=(12, 20, 28),
        in_strides=(8, 16, 32),
        encoder=dict(hidden_dim=32, feedforward_channels=40),
        decoder=dict(TOY_DECODER, num_layers=6),
    ),
    X=dict(
        in_channels=(12, 20, 28),
        in_strides=(8, 16, 32),
        encoder=dict(hidden_dim=48, feedforward_channels=80),
        decoder=dict(TOY_DECODER, num_layers=4, reg_scale=8, eval_layer=2),
    ),
)

toys = pytest.mark.parametrize('size', TOYS)

# HGNetV2 in the fields of transformers' configuration.
TOY_BACKBONE = dict(
    stem_channels=[3, 8, 8],
    stage_in_channels=[8, 16, 24, 32],
    stage_mid_channels=[8, 8, 8, 8],
    stage_out_channels=[16, 24, 32, 40],
    stage_num_blocks=[1, 1, 2, 1],
    stage_downsample=[False, True, True, True],
    stage_light_block=[False, False, True, True],
    stage_kernel_size=[3, 3, 5, 5],
    stage_numb_of_layers=[2, 2, 2, 2],
)


def build(
    spec: dict, num_classes: int = 80, **decoder: object
) -> tuple[HybridEncoder, DFINEDecoder]:
    """Encoder and decoder of an entry of `SIZES` or `TOYS`."""
    encoder = HybridEncoder(spec['in_channels'], spec['in_strides'], **spec['encoder'])
    return encoder, DFINEDecoder(
        num_classes,
        encoder.out_channels,
        encoder.out_strides,
        **{**spec['decoder'], **decoder},
    )


def toy_decoder(
    size: str = 'L', height: int = 128, width: int = 128, **changes: object
) -> tuple[DFINEDecoder, list[Tensor]]:
    """A randomised decoder in evaluation, and maps for it."""
    encoder, decoder = build(TOYS[size], 5, **changes)
    spec = dict(TOYS[size], in_channels=encoder.out_channels)
    return randomise(decoder).eval(), features(spec, height, width)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give all trainable parameters and statistics values that nothing ignores."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in module.parameters():
            if not param.requires_grad:
                continue
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim == 1:
                is_norm_weight = bool((param == 1).all())
                param.copy_(noise * 0.2 + float(is_norm_weight))
            else:
                param.copy_(noise / param[0].numel() ** 0.5)
        for child in module.modules():
            if isinstance(child, nn.BatchNorm2d):
                shape = child.running_mean.shape
                child.running_mean.copy_(torch.randn(shape, generator=generator) * 0.3)
                child.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
            if isinstance(child, nn.Embedding):
                child.weight[-1] = 0
    return module


def calibrate(network: nn.Module, *inputs: object) -> nn.Module:
    """Take the statistics of one batch, so that maps vary by position everywhere."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(*inputs)
    return network.eval()


def number_by_rows(theirs: nn.Module) -> nn.Module:
    """Corrects, in place, the grid of positions in a model of transformers.

    Up to version 4 it is that of the official code, column by column: the same on
    square maps, and scrambled on all others.
    """
    encoder = theirs.model.encoder
    if hasattr(encoder, 'build_2d_sincos_position_embedding'):
        build_grid = encoder.build_2d_sincos_position_embedding
        encoder.build_2d_sincos_position_embedding = (
            lambda width, height, *args, **kwargs: build_grid(
                height, width, *args, **kwargs
            )
        )
    return theirs


def features(spec: dict, height: int, width: int, batch: int = 2) -> list[Tensor]:
    """The same noise as backbone maps of an image of that size on every call."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, c, -(-height // s), -(-width // s), generator=generator)
        for c, s in zip(spec['in_channels'], spec['in_strides'], strict=True)
    ]


def targets(*sizes: int, num_classes: int = 80) -> BoxTargets:
    """Ground truth with the given number of boxes in each image."""
    generator = torch.Generator().manual_seed(2)
    total = sum(sizes)
    centre = torch.rand(total, 2, generator=generator) * 0.6 + 0.2
    size = torch.rand(total, 2, generator=generator) * 0.35 + 0.02
    labels = torch.randint(num_classes, (total,), generator=generator)
    return BoxTargets(labels, torch.cat((centre, size), 1), sizes)


def named_tensors(output: DecoderOutput) -> dict[str, Tensor]:
    """All floating tensors of a decoder's output by a readable name."""
    found = {'enc_logits': output.enc_logits, 'enc_boxes': output.enc_boxes}
    for part in ('queries', 'denoising'):
        predictions = getattr(output, part)
        for name, value in vars(predictions).items() if predictions else ():
            found[f'{part}.{name}'] = value
    return {name: value for name, value in found.items() if value is not None}
