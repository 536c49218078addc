"""From a config and a checkpoint to label maps of files."""

from collections.abc import Sequence
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.registry import MODELS, VISUALIZERS, init_default_scope
from mmengine.runner import CheckpointLoader
from mmengine.utils import ProgressBar
from mmseg.datasets.transforms import PackSegInputs
from PIL import Image
from torch import nn

from mmbackbones.data.seg_transforms import (
    LoadLabelMap,
    LoadSegImage,
    with_checked_loading,
)
from mmbackbones.engine.load_report import fit_state_dict

__all__ = ['PLAIN_PIPELINE', 'build_segmentor', 'segment_files']

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


def segment_files(
    cfg: Config,
    checkpoint: str,
    files: Sequence[str],
    *,
    out_dir: str,
    device: str | None = None,
    pictures: bool = True,
) -> None:
    """Write a map of ids and a coloured picture of each file.

    `<out_dir>/id_maps/<stem>.png` holds the ids of the label maps that were trained
    on (8 or 16 bits); `<out_dir>/pictures/<name>` is the image, coloured.

    Args:
        cfg: from `load_config`.
        checkpoint: see `build_segmentor`.
        files: images.
        out_dir: folder to write.
        device: see `build_segmentor`.
        pictures: False writes the maps only.

    Raises:
        ValueError: two files would have one map; a file cannot be read.
    """
    stems = [Path(name).stem for name in files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise ValueError(
            f'{len(twice)} names occur with several suffixes, but have one id map '
            f'each: {twice[0]!r} is one; rename them'
        )
    model = build_segmentor(cfg, checkpoint, device)
    pipeline = with_checked_loading(
        Compose(
            [
                step
                for step in cfg.test_dataloader.dataset.pipeline
                if not any(name in str(step['type']) for name in _LABEL_LOADERS)
            ]
        )
    )
    visualizer = VISUALIZERS.build(dict(cfg.visualizer, vis_backends=None))
    visualizer.dataset_meta = model.dataset_meta
    ids = np.asarray(model.dataset_meta['category_ids'])
    ids = ids.astype(np.uint8 if ids.max() < 256 else np.uint16)
    maps, drawn = Path(out_dir, 'id_maps'), Path(out_dir, 'pictures')
    maps.mkdir(parents=True, exist_ok=True)
    progress = ProgressBar(len(files))
    for name, stem in zip(files, stems, strict=True):
        batch = pseudo_collate([pipeline(dict(img_path=name))])
        with torch.no_grad():
            sample = model.test_step(batch)[0]
        labels = sample.pred_sem_seg.data[0].cpu().numpy()
        Image.fromarray(ids[labels]).save(maps / f'{stem}.png')
        if pictures:
            visualizer.add_datasample(
                stem,
                mmcv.imread(name, channel_order='rgb'),
                sample,
                draw_gt=False,
                out_file=str(drawn / Path(name).name),
            )
        progress.update()
    print(f'\n{len(files)} maps of ids in {maps}' + f', {drawn}' * pictures)


_LABEL_LOADERS = ('LoadAnnotations', 'LoadLabelMap')
