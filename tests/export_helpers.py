"""Checkpoints of random weights under which exports can be compared."""

from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from test_segmentation import BACKBONES
from test_segmentation import config as toy_segmentor
from torch import nn

from mmbackbones.apis.config import is_segmentor


@torch.no_grad()
def spread(model: nn.Module) -> nn.Module:
    """Random weights that keep the size of maps, so that queries and pixels differ.

    As they are initialised, heads answer everything alike: nothing would be compared.
    """
    for name, param in model.named_parameters():
        if name.endswith('lab.bias'):
            param.normal_(std=0.3)
        elif param.requires_grad and param.ndim > 1:
            param.normal_(std=param[0].numel() ** -0.5)
    return model.eval()


def random_checkpoint(cfg: Config, path: Path) -> str:
    """Save random weights of a config's model; returns the path."""
    scope = 'mmseg' if is_segmentor(cfg) else 'mmdet'
    model_cfg = cfg.model.copy()
    model_cfg.backbone.init_cfg = None
    if scope == 'mmseg':
        model_cfg.num_classes = model_cfg.get('num_classes') or 150
    torch.manual_seed(0)
    init_default_scope(scope)
    with DefaultScope.overwrite_default_scope(scope):
        model = spread(MODELS.build(model_cfg))
    torch.save(dict(state_dict=model.state_dict()), path)
    return str(path)


def segmentor_config(
    work_dir: Path,
    family: str,
    *,
    mode: str = 'slide',
    crop_hw: tuple[int, int] = (64, 64),
) -> Config:
    """UPerNet at toy width, tested at the side of its window."""
    model = toy_segmentor(backbone=BACKBONES[family][0])
    stride = tuple(side * 2 // 3 for side in crop_hw)
    model.test_cfg = dict(mode=mode, crop_size=crop_hw, stride=stride)
    # Statistics by which a rounded mean shows.
    model.data_preprocessor.update(mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4])
    scale = (4 * max(crop_hw), min(crop_hw))
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=scale, keep_ratio=True),
        dict(type='LoadAnnotations'),
        dict(type='PackSegInputs'),
    ]
    return Config(
        dict(
            model=model,
            work_dir=str(work_dir),
            default_scope='mmseg',
            visualizer=dict(type='SegLocalVisualizer', name='visualizer'),
            test_dataloader=dict(dataset=dict(type='ADE20K', pipeline=pipeline)),
        )
    )


def smooth_image(height: int, width: int) -> np.ndarray:
    """Coloured waves, `(height, width, 3)` uint8."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (7 + c)) * np.cos(y / (11 - 2 * c)) for c in range(3)]
    return np.uint8(127 * (1 + np.stack(waves, -1)))
