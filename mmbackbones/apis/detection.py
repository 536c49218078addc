"""From a config and a checkpoint to a detector that predicts."""

import re

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmbackbones.apis.named_files import read_checkpoint
from mmbackbones.convert.objects365 import COCO_CLASSES, OBJECTS365_CLASSES
from mmbackbones.convert.sources import to_ours
from mmbackbones.engine.load_report import fit_state_dict

__all__ = ['build_detector']

# Not of the encoder, which may score its tokens without classes.
_ROWS = re.compile(r'decoder\.dec_score_head\.\d+\.weight$')
# Releases carry no names; their number of rows says which list they have.
_UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_RELEASED = {
    80: dict(
        classes=COCO_CLASSES,
        category_ids=tuple(i for i in range(1, 91) if i not in _UNUSED_COCO_IDS),
    ),
    366: dict(
        classes=('unused 0', *OBJECTS365_CLASSES), category_ids=tuple(range(366))
    ),
}


def build_detector(
    cfg: Config, checkpoint: str, device: str | torch.device | None = None
) -> nn.Module:
    """The detector of a config in evaluation mode, with a checkpoint's weights.

    The number of classes is the checkpoint's. `dataset_meta` of the model holds
    the class names and, where known, the original category ids.

    Args:
        cfg: from `load_config`.
        checkpoint: ours, or an official release.
        device: a GPU where there is one, by default.

    Raises:
        ValueError: the checkpoint is unreadable, or of another model.
    """
    loaded = read_checkpoint(checkpoint)
    loaded['state_dict'], _ = to_ours(loaded['state_dict'])
    rows = [value for key, value in loaded['state_dict'].items() if _ROWS.match(key)]
    if not rows:
        raise ValueError(
            f'checkpoint {checkpoint!r} is not that of a detector: it has no '
            'decoder.dec_score_head'
        )
    num_classes = len(rows[0])
    cfg.model.decoder.num_classes = num_classes
    cfg.model.backbone.init_cfg = None
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    model = MODELS.build(cfg.model)
    state_dict, report = fit_state_dict(model, loaded)
    model.load_state_dict(state_dict, strict=False)
    print(report)
    model.dataset_meta = _dataset_meta(cfg, loaded.get('meta', {}), num_classes)
    return model.to(device or get_device()).eval()


def _dataset_meta(cfg: Config, meta: dict, num_classes: int) -> dict:
    """Class names: the checkpoint's, the config's, those of a release, or numbers."""
    found = dict(meta.get('dataset_meta') or {})
    if 'classes' not in found:
        dataset = cfg.get('test_dataloader', {}).get('dataset', {})
        found = dict(dataset.get('metainfo') or _RELEASED.get(num_classes) or {})
    if len(found.get('classes', ())) != num_classes:
        found = dict(classes=tuple(f'class {i}' for i in range(num_classes)))
    return found
