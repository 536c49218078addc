"""From a config and a checkpoint to detections on files."""

import glob
import json
from collections.abc import Sequence
from pathlib import Path

import mmcv
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.registry import MODELS, VISUALIZERS, init_default_scope
from mmengine.runner import CheckpointLoader
from mmengine.utils import ProgressBar
from torch import nn

from mmbackbones.convert.objects365 import COCO_CLASSES, OBJECTS365_CLASSES
from mmbackbones.convert.sources import to_ours
from mmbackbones.engine.load_report import fit_state_dict

__all__ = ['build_detector', 'detect_files', 'find_images']

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')


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


def find_images(source: str) -> list[str]:
    """Image files of a path, a folder (not its sub-folders) or a glob pattern.

    Raises:
        ValueError: nothing there, with what was looked for.
    """
    path = Path(source)
    if path.is_dir():
        candidates = sorted(str(child) for child in path.iterdir())
    elif path.is_file():
        return [source]
    else:
        candidates = sorted(glob.glob(source))
    files = [name for name in candidates if name.lower().endswith(IMAGE_SUFFIXES)]
    if not files:
        raise ValueError(
            f'no images in {source!r}: give an image, a folder or a quoted pattern '
            f'with files ending in {", ".join(IMAGE_SUFFIXES)}'
        )
    return files


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
    loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    loaded['state_dict'], _ = to_ours(loaded['state_dict'])
    rows = loaded['state_dict'].get('decoder.enc_score_head.weight')
    if rows is None:
        raise ValueError(
            f'checkpoint {checkpoint!r} is not that of a detector: it has no '
            'decoder.enc_score_head.weight'
        )
    cfg.model.decoder.num_classes = len(rows)
    cfg.model.backbone.init_cfg = None
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    model = MODELS.build(cfg.model)
    state_dict, report = fit_state_dict(model, loaded)
    model.load_state_dict(state_dict, strict=False)
    print(report)
    model.dataset_meta = _dataset_meta(cfg, loaded.get('meta', {}), len(rows))
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


def detect_files(
    cfg: Config,
    checkpoint: str,
    files: Sequence[str],
    *,
    out_dir: str,
    conf: float = 0.4,
    batch_size: int = 1,
    device: str | None = None,
    pictures: bool = True,
) -> list[dict]:
    """Write an annotated picture of each file and one `detections.json`.

    Args:
        cfg: from `load_config`.
        checkpoint: see `build_detector`.
        files: images.
        out_dir: folder; pictures keep their file names.
        conf: lowest score that is drawn and written.
        batch_size: images at once.
        device: see `build_detector`.
        pictures: False writes the json only.

    Returns:
        What the json holds: COCO results (`image_id` counts the files from 0,
        `file_name`, `category_id` as in the training data where the checkpoint
        knows it, `category_name`, `bbox` as x, y, width, height in pixels, `score`).

    Raises:
        ValueError: `conf` is not in [0, 1], or a file cannot be read.
    """
    if not 0 <= conf <= 1:
        raise ValueError(f'conf is {conf}; give a score between 0 and 1')
    model = build_detector(cfg, checkpoint, device)
    pipeline = Compose(
        [
            step
            for step in cfg.test_dataloader.dataset.pipeline
            if 'LoadAnnotations' not in str(step['type'])
        ]
    )
    visualizer = VISUALIZERS.build(dict(cfg.visualizer, vis_backends=None))
    visualizer.dataset_meta = model.dataset_meta
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict] = []
    progress = ProgressBar(len(files))
    for start in range(0, len(files), batch_size):
        batch = pseudo_collate(
            [
                pipeline(dict(img_path=name, img_id=start + i))
                for i, name in enumerate(files[start : start + batch_size])
            ]
        )
        with torch.no_grad():
            samples = model.test_step(batch)
        for sample in samples:
            results += _to_coco(sample, model.dataset_meta, conf)
            if pictures:
                _draw(visualizer, sample, conf, out)
            progress.update()
    (out / 'detections.json').write_text(json.dumps(results))
    print(f'\n{len(results)} detections on {len(files)} images, written to {out}')
    return results


def _to_coco(sample: DetDataSample, dataset_meta: dict, conf: float) -> list[dict]:
    classes = dataset_meta['classes']
    ids = dataset_meta.get('category_ids') or range(len(classes))
    found = sample.pred_instances
    found = found[found.scores >= conf].cpu()
    return [
        dict(
            image_id=sample.img_id,
            file_name=Path(sample.img_path).name,
            category_id=ids[label],
            category_name=classes[label],
            bbox=[x1, y1, x2 - x1, y2 - y1],
            score=score,
        )
        for (x1, y1, x2, y2), score, label in zip(
            found.bboxes.tolist(),
            found.scores.tolist(),
            found.labels.tolist(),
            strict=True,
        )
    ]


def _draw(visualizer: object, sample: DetDataSample, conf: float, out: Path) -> None:
    name = Path(sample.img_path).name
    visualizer.add_datasample(
        name,
        mmcv.imread(sample.img_path, channel_order='rgb'),
        sample.cpu(),
        draw_gt=False,
        pred_score_thr=conf,
        out_file=str(out / name),
    )
