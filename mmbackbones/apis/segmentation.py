"""From a config and a checkpoint to a segmentor that predicts."""

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from mmseg.datasets.transforms import PackSegInputs
from torch import nn

from mmbackbones.data.seg_transforms import LoadLabelMap, LoadSegImage
from mmbackbones.engine.load_report import fit_state_dict

__all__ = ['PLAIN_PIPELINE', 'build_segmentor']

PLAIN_PIPELINE = (
    dict(type=LoadSegImage),
    dict(type=LoadLabelMap),
    dict(type=PackSegInputs, meta_keys=('img_path',)),
)
"""Images and label maps as they are on disk."""

_CLASS_ROWS = 'decode_head.conv_seg.weight'


def build_segmentor(
    cfg: Config, checkpoint: str, device: str | torch.device | None = None
) -> nn.Module:
    """The segmentor of a config in evaluation mode, with a checkpoint's weights.

    The number of classes is the checkpoint's. `dataset_meta` of the model holds
    `classes`, `palette` and `category_ids`, the ids of the label maps it was
    trained on.

    Args:
        cfg: from `load_config`.
        checkpoint: file of weights.
        device: a GPU where there is one, by default.

    Raises:
        ValueError: the checkpoint is unreadable, or of another model.
    """
    loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    rows = loaded['state_dict'].get(_CLASS_ROWS)
    if rows is None:
        raise ValueError(
            f'checkpoint {checkpoint!r} is of no segmentor: it lacks {_CLASS_ROWS}'
        )
    cfg.model.num_classes = len(rows)
    cfg.model.backbone.init_cfg = None
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    model = MODELS.build(cfg.model)
    state_dict, report = fit_state_dict(model, loaded)
    model.load_state_dict(state_dict, strict=False)
    print(report)
    model.dataset_meta = _dataset_meta(loaded.get('meta') or {}, len(rows))
    return model.to(device or get_device()).eval()


def _dataset_meta(meta: dict, num_classes: int) -> dict:
    """The checkpoint's; numbers for names, and labels for ids, where it has none."""
    found = dict(meta.get('dataset_meta') or {})
    if len(found.get('classes') or ()) != num_classes:
        found = dict(classes=tuple(f'class {i}' for i in range(num_classes)))
    found.setdefault('category_ids', tuple(range(num_classes)))
    if len(found.get('palette') or ()) != num_classes:
        colours = np.random.default_rng(0).integers(0, 256, (num_classes, 3))
        found['palette'] = colours.tolist()
    return found
