"""Sizes and official modules for tests of RT-DETR's encoder and decoders."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from dfine_helpers import TOY_DECODER
from official_helpers import checkout, decoder_options, official_packages
from torch import nn

from mmbackbones.decoders import RTDETRDecoder, RTDETRv2Decoder
from mmbackbones.necks import RTDETRHybridEncoder

DECODERS = dict(v1=RTDETRDecoder, v2=RTDETRv2Decoder)
STRIDES = (8, 16, 32)

# Relatives of R18 (narrow fusion blocks), R101 (wide encoder) and H (two layers of
# attention, R50-m's early evaluation) that run in milliseconds.
TOYS = dict(
    R18=dict(
        in_channels=(12, 20, 28),
        in_strides=STRIDES,
        encoder=dict(hidden_dim=32, feedforward_channels=40, expansion=0.5),
        decoder=dict(TOY_DECODER, num_layers=3),
    ),
    H=dict(
        in_channels=(12, 20, 28),
        in_strides=STRIDES,
        encoder=dict(hidden_dim=48, feedforward_channels=80, num_encoder_layers=2),
        decoder=dict(TOY_DECODER, num_layers=4, eval_layer=2),
    ),
)


def build(
    version: str, spec: dict, num_classes: int = 80, **decoder: object
) -> tuple[RTDETRHybridEncoder, RTDETRDecoder]:
    """Encoder and decoder of an entry of `TOYS`."""
    encoder = RTDETRHybridEncoder(
        spec['in_channels'], spec['in_strides'], **spec['encoder']
    )
    return encoder, DECODERS[version](
        num_classes,
        encoder.out_channels,
        encoder.out_strides,
        **{**spec['decoder'], **decoder},
    )


@contextmanager
def official_modules(version: str) -> Iterator[SimpleNamespace]:
    """The modules of RT-DETR, without importing what its packages import.

    Skips the test where there is no checkout of https://github.com/lyuwenyu/RT-DETR
    at $MMB_REFERENCE_DIR/RT-DETR.
    """
    name = dict(v1='rtdetr_pytorch', v2='rtdetrv2_pytorch')[version]
    source = checkout('RT-DETR', name, 'src')
    root = dict(v1='src', v2='src_v2')[version]  # v1 names it, v2 is free of names
    zoo = ('hybrid_encoder', 'denoising', 'matcher', 'utils')
    last = dict(
        v1=('rtdetr_decoder', 'rtdetr_criterion'),
        v2=('rtdetrv2_decoder', 'rtdetrv2_criterion'),
    )[version]
    packages = ('nn', 'nn.backbone', 'zoo', 'zoo.rtdetr')
    with official_packages(root, source, *packages) as load:
        found = {name: load(f'zoo.rtdetr.{name}') for name in (*zoo, *last)}
        found['presnet'] = load('nn.backbone.presnet')
        if version == 'v2':
            found['hgnetv2'] = load('nn.backbone.hgnetv2')
        found['decoder'], found['criterion'] = found[last[0]], found[last[1]]
        yield SimpleNamespace(**found)


def build_official(
    official: SimpleNamespace, version: str, spec: dict, **decoder: object
) -> tuple[nn.Module, nn.Module]:
    """Their encoder and decoder of an entry of `TOYS`."""
    enc, dec = spec['encoder'], spec['decoder']
    encoder = official.hybrid_encoder.HybridEncoder(
        in_channels=list(spec['in_channels']),
        feat_strides=list(spec['in_strides']),
        hidden_dim=enc['hidden_dim'],
        dim_feedforward=enc['feedforward_channels'],
        num_encoder_layers=enc.get('num_encoder_layers', 1),
        expansion=enc.get('expansion', 1.0),
        eval_spatial_size=list(dec['eval_size_hw']),
    )
    if version == 'v1':
        options = decoder_options(spec)
        options['num_decoder_layers'] = options.pop('num_layers')
        return encoder, official.decoder.RTDETRTransformer(**options)
    options = decoder_options(spec, **{'num_points': [4, 4, 4], **decoder})
    return encoder, official.decoder.RTDETRTransformerv2(**options)
