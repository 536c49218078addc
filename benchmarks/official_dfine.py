"""The official D-FINE, built from its own files, and ours with the same weights.

A checkout of https://github.com/Peterande/D-FINE is found as `D-FINE/` in the folder
that MMB_REFERENCE_DIR names.
"""

import contextlib
import importlib
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

import mmbackbones.detectors  # noqa: F401

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'

# What configs/dfine/dfine_hgnetv2_{n,l}_coco.yml change of the classes' defaults.
_SIZES = {
    'N': dict(
        config='dfine_nano_hgnetv2_b0_coco.py',
        backbone=dict(name='B0', use_lab=True, return_idx=[2, 3], freeze_at=-1),
        freeze_norm=False,
        encoder=dict(
            in_channels=[512, 1024],
            feat_strides=[16, 32],
            hidden_dim=128,
            use_encoder_idx=[1],
            dim_feedforward=512,
            expansion=0.34,
            depth_mult=0.5,
        ),
        decoder=dict(
            feat_channels=[128, 128],
            feat_strides=[16, 32],
            hidden_dim=128,
            dim_feedforward=512,
            num_levels=2,
            num_layers=3,
            num_points=[6, 6],
        ),
    ),
    'L': dict(
        config='dfine_hgnetv2_b4_coco.py',
        backbone=dict(name='B4', use_lab=False, return_idx=[1, 2, 3], freeze_at=0),
        freeze_norm=True,
        encoder=dict(
            in_channels=[512, 1024, 2048],
            feat_strides=[8, 16, 32],
            hidden_dim=256,
            use_encoder_idx=[2],
            dim_feedforward=1024,
            expansion=1.0,
            depth_mult=1,
        ),
        decoder=dict(
            feat_channels=[256] * 3,
            feat_strides=[8, 16, 32],
            hidden_dim=256,
            dim_feedforward=1024,
            num_levels=3,
            num_layers=6,
            num_points=[3, 6, 3],
        ),
    ),
}


def _box_convert(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
    """What torchvision's function of that name does for these two formats."""
    if (in_fmt, out_fmt) != ('cxcywh', 'xyxy'):
        raise NotImplementedError(f'{in_fmt} to {out_fmt}')
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h), dim=-1)


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Give the official files what they import besides torch, while they load."""
    if 'MMB_REFERENCE_DIR' not in os.environ:
        raise ValueError(
            'MMB_REFERENCE_DIR is not set; it is the folder of a checkout D-FINE/'
        )
    root = Path(os.environ['MMB_REFERENCE_DIR'], 'D-FINE', 'src')
    packages = {
        'official': root,
        'official.core': None,
        'official.nn': root / 'nn',
        'official.nn.backbone': root / 'nn' / 'backbone',
        'official.zoo': root / 'zoo',
        'official.zoo.dfine': root / 'zoo' / 'dfine',
        'torchvision': None,
        'torchvision.ops': None,
        'torchvision.ops.boxes': None,
    }
    modules = {name: types.ModuleType(name) for name in packages}
    for name, path in packages.items():
        modules[name].__path__ = [] if path is None else [str(path)]
    modules['official.core'].register = lambda: lambda cls: cls
    modules['torchvision'].ops = modules['torchvision.ops']
    modules['torchvision.ops'].box_convert = _box_convert
    modules['torchvision.ops.boxes'].box_area = None
    with mock.patch.dict(sys.modules, modules):
        yield


class OfficialExport(nn.Module):
    """Model and postprocessor as tools/deployment/export_onnx.py puts them."""

    def __init__(self, model: nn.Module, postprocessor: nn.Module) -> None:
        super().__init__()
        self.model, self.postprocessor = model, postprocessor

    def forward(self, images: Tensor, orig_target_sizes: Tensor) -> tuple:
        """Labels, boxes and scores."""
        return self.postprocessor(self.model(images), orig_target_sizes)


def build_ours(size: str) -> nn.Module:
    """Our model with random weights whose maps vary and stay finite."""
    cfg = Config.fromfile(CONFIGS / _SIZES[size]['config'])
    cfg.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope('mmdet'):
        ours = MODELS.build(cfg.model)
    _randomise(ours)
    return ours


def build_official(size: str, ours: nn.Module) -> nn.Module:
    """The official model, in training form, with the weights of ours."""
    spec = _SIZES[size]
    with _stand_ins():
        network = importlib.import_module('official.zoo.dfine.dfine')
        backbone = importlib.import_module('official.nn.backbone.hgnetv2')
        encoder = importlib.import_module('official.zoo.dfine.hybrid_encoder')
        decoder = importlib.import_module('official.zoo.dfine.dfine_decoder')
    official = network.DFINE(
        backbone.HGNetv2(
            pretrained=False, freeze_norm=spec['freeze_norm'], **spec['backbone']
        ),
        encoder.HybridEncoder(eval_spatial_size=[640, 640], **spec['encoder']),
        decoder.DFINETransformer(
            num_classes=80, eval_spatial_size=[640, 640], **spec['decoder']
        ),
    )
    state = ours.state_dict()
    wanted = official.state_dict()
    official.load_state_dict(
        {
            name: wanted[name]
            if name in ('decoder.anchors', 'decoder.valid_mask')
            else state.get(name, value).to(value.dtype)
            for name, value in wanted.items()
        }
    )
    return official


def build_pair(size: str, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Ours, and the official model in deploy form, with the same random weights.

    Args:
        size: N or L.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    ours = build_ours(size)
    official = build_official(size, ours)
    with _stand_ins():
        post = importlib.import_module('official.zoo.dfine.postprocessor')
    with contextlib.redirect_stdout(None):
        deployed = OfficialExport(
            official.deploy(), post.DFINEPostProcessor(num_classes=80).deploy()
        )
    return ours.eval(), deployed.eval()


def _randomise(model: nn.Module) -> None:
    """Weights whose maps vary with position and neither vanish nor explode."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.requires_grad and param.ndim > 1:
                param.normal_(std=param[0].numel() ** -0.5)
            elif name.endswith(('lab.scale', 'lab.bias')):
                param.add_(0.1 * torch.randn(1))
    images = torch.rand(2, 3, 256, 256)
    handles = [
        module.register_forward_pre_hook(_take_statistics)
        for module in model.modules()
        if isinstance(getattr(module, 'running_mean', None), Tensor)
    ]
    with torch.no_grad():
        model.eval()(images, mode='tensor')
    for handle in handles:
        handle.remove()


def _take_statistics(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
    norm.running_var.copy_(inputs[0].var((0, 2, 3)).clamp(min=1e-3))
