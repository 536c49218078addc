"""Sizes and official modules for tests of RT-DETR's encoder and decoders."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from torch import Tensor, nn

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
        decoder=dict(
            hidden_dim=32,
            num_queries=30,
            num_layers=3,
            feedforward_channels=40,
            num_denoising=10,
            eval_size_hw=(128, 128),
        ),
    ),
    H=dict(
        in_channels=(12, 20, 28),
        in_strides=STRIDES,
        encoder=dict(hidden_dim=48, feedforward_channels=80, num_encoder_layers=2),
        decoder=dict(
            hidden_dim=32,
            num_queries=30,
            num_layers=4,
            feedforward_channels=40,
            num_denoising=10,
            eval_layer=2,
            eval_size_hw=(128, 128),
        ),
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


def _register(cls: type | None = None) -> object:
    """Upstream's registry, with and without parentheses."""
    return (lambda c: c) if cls is None else cls


@contextmanager
def official_modules(version: str) -> Iterator[SimpleNamespace]:
    """The modules of RT-DETR, without importing what its packages import.

    Skips the test where there is no checkout of https://github.com/lyuwenyu/RT-DETR
    at $MMB_REFERENCE_DIR/RT-DETR.
    """
    root = os.environ.get('MMB_REFERENCE_DIR')
    if root is None:
        pytest.skip('MMB_REFERENCE_DIR is not set')
    name = dict(v1='rtdetr_pytorch', v2='rtdetrv2_pytorch')[version]
    source = Path(root, 'RT-DETR', name, 'src')
    if not source.is_dir():
        pytest.skip(f'{source} does not exist')
    src = dict(v1='src', v2='src_v2')[version]  # v1 names it, v2 is free of names
    folders = {
        src: source,
        f'{src}.core': None,
        f'{src}.misc': None,
        f'{src}.misc.dist': None,
        f'{src}.misc.dist_utils': None,
        f'{src}.nn': source / 'nn',
        f'{src}.nn.backbone': source / 'nn' / 'backbone',
        f'{src}.zoo': source / 'zoo',
        f'{src}.zoo.rtdetr': source / 'zoo' / 'rtdetr',
        'torchvision': None,
        'torchvision.ops': None,
        'torchvision.ops.boxes': None,
    }
    modules = {name: ModuleType(name) for name in folders}
    for name, folder in folders.items():
        modules[name].__path__ = [] if folder is None else [str(folder)]
    modules[f'{src}.core'].register = _register
    for name in (f'{src}.misc.dist', f'{src}.misc.dist_utils'):
        modules[name].get_world_size = lambda: 1
        modules[name].is_dist_available_and_initialized = lambda: False
    modules['torchvision.ops.boxes'].box_area = _box_area
    zoo = ('hybrid_encoder', 'denoising', 'matcher', 'utils')
    last = dict(
        v1=('rtdetr_decoder', 'rtdetr_criterion'),
        v2=('rtdetrv2_decoder', 'rtdetrv2_criterion'),
    )[version]
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        found = {
            name: importlib.import_module(f'{src}.zoo.rtdetr.{name}')
            for name in (*zoo, *last)
        }
        found['presnet'] = importlib.import_module(f'{src}.nn.backbone.presnet')
        if version == 'v2':
            found['hgnetv2'] = importlib.import_module(f'{src}.nn.backbone.hgnetv2')
        found['decoder'], found['criterion'] = found[last[0]], found[last[1]]
        yield SimpleNamespace(**found)


def _box_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def build_official(
    official: SimpleNamespace, version: str, spec: dict, **decoder: object
) -> tuple[nn.Module, nn.Module]:
    """Their encoder and decoder of an entry of `TOYS`."""
    enc, dec = spec['encoder'], spec['decoder']
    eval_size = list(dec['eval_size_hw'])
    encoder = official.hybrid_encoder.HybridEncoder(
        in_channels=list(spec['in_channels']),
        feat_strides=list(spec['in_strides']),
        hidden_dim=enc['hidden_dim'],
        dim_feedforward=enc['feedforward_channels'],
        num_encoder_layers=enc.get('num_encoder_layers', 1),
        expansion=enc.get('expansion', 1.0),
        eval_spatial_size=eval_size,
    )
    options = dict(
        num_classes=80,
        hidden_dim=dec['hidden_dim'],
        num_queries=dec['num_queries'],
        feat_channels=[enc['hidden_dim']] * 3,
        feat_strides=list(spec['in_strides']),
        dim_feedforward=dec['feedforward_channels'],
        num_denoising=dec['num_denoising'],
        eval_spatial_size=eval_size,
        eval_idx=dec.get('eval_layer', -1),
    )
    if version == 'v1':
        options['num_decoder_layers'] = dec['num_layers']
        return encoder, official.decoder.RTDETRTransformer(**options)
    options['num_layers'] = dec['num_layers']
    return encoder, official.decoder.RTDETRTransformerv2(
        **{**options, 'num_points': [4, 4, 4], **decoder}
    )
