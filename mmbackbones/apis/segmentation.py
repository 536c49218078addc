"""From a config and a checkpoint to a segmentor that predicts."""

import inspect

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmseg.datasets.transforms import PackSegInputs
from torch import nn

from mmbackbones.apis.named_files import read_checkpoint
from mmbackbones.data.seg_classes import LabelTable, class_file_path
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
    loaded = read_checkpoint(checkpoint)
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
    model.dataset_meta = _dataset_meta(cfg, loaded.get('meta') or {}, len(rows))
    return model.to(device or get_device()).eval()


def _dataset_meta(cfg: Config, meta: dict, num_classes: int) -> dict:
    """The checkpoint's, else the data set's; numbers for names where neither fits."""
    found = dict(meta.get('dataset_meta') or {})
    if 'classes' not in found:
        found = _of_data_set((cfg.get('test_dataloader') or {}).get('dataset') or {})
    if len(found.get('classes') or ()) != num_classes:  # nor ids and colours
        found = dict(classes=tuple(f'class {i}' for i in range(num_classes)))
    found.setdefault('category_ids', tuple(range(num_classes)))
    if len(found.get('palette') or ()) != num_classes:
        colours = np.random.default_rng(0).integers(0, 256, (num_classes, 3))
        found['palette'] = colours.tolist()
    return found


def _of_data_set(dataset: dict) -> dict:
    """Classes of a data set's config, none of whose images are needed."""
    kind = dataset.get('type')
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    if kind is None:
        return {}
    known = getattr(kind, 'METAINFO', None) or {}
    default = inspect.signature(kind).parameters.get('reduce_zero_label')
    try:
        table = LabelTable.of(
            classes=(dataset.get('metainfo') or {}).get('classes'),
            known=known.get('classes'),
            class_file=class_file_path(
                dataset.get('class_file'), dataset.get('data_root')
            ),
            reduce_zero_label=dataset.get(
                'reduce_zero_label', default is not None and default.default is True
            ),
        )
    except ValueError:  # no names, or a class file that is not on this machine
        return {}
    found = dict(classes=table.classes, category_ids=table.category_ids)
    if table.classes == tuple(known.get('classes') or ()):
        found['palette'] = known.get('palette')
    return found
