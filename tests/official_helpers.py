"""Official repositories under $MMB_REFERENCE_DIR: their modules, arguments, outputs."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mmbackbones.ops.predictions import BoxTargets, DecoderOutput, QueryPredictions

Loader = Callable[[str], ModuleType]


def checkout(name: str, *inside: str) -> Path:
    """A folder of the checkout `name`; skips the test where there is none."""
    root = os.environ.get('MMB_REFERENCE_DIR')
    if root is None:
        pytest.skip('MMB_REFERENCE_DIR is not set')
    folder = Path(root, name, *inside)
    if not folder.is_dir():
        pytest.skip(f'{folder} does not exist')
    return folder


@contextmanager
def official_packages(root: str, source: Path, *names: str) -> Iterator[Loader]:
    """An importer of official files, without what their packages import.

    Args:
        root: the name that `source` has meanwhile; must differ between checkouts that
            are open at the same time.
        source: the folder of the outermost package.
        names: the packages in it whose files are wanted, with dots, outer ones first.
    """
    folders = {root: source}
    folders |= {f'{root}.{name}': source.joinpath(*name.split('.')) for name in names}
    empty = [f'{root}.{n}' for n in ('core', 'misc', 'misc.dist', 'misc.dist_utils')]
    empty += ['torchvision', 'torchvision.ops', 'torchvision.ops.boxes']
    modules = {name: ModuleType(name) for name in (*folders, *empty)}
    for name, module in modules.items():
        module.__path__ = [str(folders[name])] if name in folders else []
    modules[f'{root}.core'].register = _register
    for name in ('dist', 'dist_utils'):
        modules[f'{root}.misc.{name}'].get_world_size = lambda: 1
        modules[f'{root}.misc.{name}'].is_dist_available_and_initialized = lambda: False
    modules['torchvision'].ops = modules['torchvision.ops']
    modules['torchvision.ops'].box_convert = _box_convert
    modules['torchvision.ops.boxes'].box_area = _box_area
    # Not `mock.patch.dict`, which would forget all that is imported meanwhile.
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield lambda name: importlib.import_module(f'{root}.{name}')
        for name in [n for n in sys.modules if n.startswith(f'{root}.')]:
            del sys.modules[name]


def _register(cls: type | None = None, **_: object) -> object:
    """Upstream's registries, with and without parentheses."""
    return (lambda c: c) if cls is None else cls


def _box_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _box_convert(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
    assert (in_fmt, out_fmt) == ('cxcywh', 'xyxy')
    x, y, w, h = boxes.unbind(-1)
    return torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), -1)


def decoder_options(spec: dict, **options: object) -> dict:
    """An entry of a `TOYS` in the arguments of official decoders, and `options`."""
    encoder, decoder = spec['encoder'], spec['decoder']
    return dict(
        num_classes=80,
        hidden_dim=decoder['hidden_dim'],
        num_queries=decoder['num_queries'],
        feat_channels=[encoder['hidden_dim']] * len(spec['in_channels']),
        feat_strides=list(spec['in_strides']),
        num_levels=len(spec['in_channels']),
        nhead=decoder.get('num_heads', 8),
        num_layers=decoder['num_layers'],
        dim_feedforward=decoder['feedforward_channels'],
        num_denoising=decoder['num_denoising'],
        eval_spatial_size=list(decoder['eval_size_hw']),
        eval_idx=decoder.get('eval_layer', -1),
    ) | dict(options)


def official_targets(flat: BoxTargets) -> list[dict[str, Tensor]]:
    labels, boxes = flat.labels.split(flat.sizes), flat.boxes.split(flat.sizes)
    return [
        dict(labels=label, boxes=box) for label, box in zip(labels, boxes, strict=True)
    ]


def stacked(layers: list[dict], pre: dict | None = None) -> QueryPredictions:
    """Official dictionaries of a decoder's layers, and of what it began with."""
    corners = [layer['pred_corners'] for layer in layers if 'pred_corners' in layer]
    return QueryPredictions(
        torch.stack([layer['pred_logits'] for layer in layers]),
        torch.stack([layer['pred_boxes'] for layer in layers]),
        torch.stack(corners) if corners else None,
        layers[-1].get('ref_points'),
        pre and pre['pred_logits'],
        pre and pre['pred_boxes'],
    )


def as_ours(out: dict) -> DecoderOutput:
    """D-FINE's and DEIM's output dictionary as our dataclass, but for the pairs."""
    (enc,) = out.get('enc_aux_outputs', [{}])
    groups = out.get('dn_meta', {}).get('dn_num_group', 0)
    dn = out['dn_outputs'] if groups else None
    return DecoderOutput(
        stacked([*out.get('aux_outputs', []), out], out.get('pre_outputs')),
        dn and stacked(dn, out.get('dn_pre_outputs')),
        enc_logits=enc.get('pred_logits'),
        enc_boxes=enc.get('pred_boxes'),
    )
