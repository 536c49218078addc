"""Models for tests of prediction that need no training."""

from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmbackbones.apis.inferencer import Inferencer
from mmbackbones.apis.named_files import find_config
from mmbackbones.inference.exported import ExportedBackend
from mmbackbones.inference.metadata import ExportInfo

MIN_SIDE = 8  # pixels of the network's input, below which the stub sees nothing


def export_info(**changes: object) -> ExportInfo:
    """Metadata of a detector of two classes at 96 x 96."""
    values = dict(
        task='detection',
        classes=('dark', 'bright'),
        category_ids=(7, 9),
        input_size_hw=(96, 96),
        dynamic_batch=True,
        resize='stretch',
        mean=(0.0, 0.0, 0.0),
        std=(255.0, 255.0, 255.0),
        licence='Apache-2.0',
    )
    return ExportInfo(**{**values, **changes})


class BlobSession:
    """Finds bright rectangles on black, unless they are small: red or green ones."""

    name = 'stub'
    fixed_batch = None

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        num, room = len(images), 100
        boxes = np.zeros((num, room, 4), np.float32)
        scores = np.zeros((num, room), np.float32)
        labels = np.zeros((num, room), np.int64)
        for i, image in enumerate(images):
            k = 0
            for label in (0, 1):
                mask = (image[label] > 0.5).astype(np.uint8)
                count, _, stats, _ = cv2.connectedComponentsWithStats(mask)
                for x, y, w, h, _ in stats[1:count]:
                    if min(w, h) >= MIN_SIDE:
                        boxes[i, k], scores[i, k] = (x, y, x + w, y + h), 0.9
                        labels[i, k] = label
                        k += 1
        return dict(boxes=boxes, scores=scores, labels=labels)


def stub_inferencer(**changes: object) -> Inferencer:
    """The object around `BlobSession`."""
    inferencer = Inferencer.__new__(Inferencer)
    inferencer.backend = ExportedBackend(BlobSession(), export_info(**changes))
    return inferencer


def toy_detector(folder: Path) -> tuple[Config, str]:
    """The demo's config at toy width and a checkpoint of random weights."""
    cfg = Config.fromfile(find_config('dfine_demo'))
    cfg.model.neck.hidden_dim = cfg.model.decoder.hidden_dim = 32
    cfg.model.decoder.num_layers = 1
    cfg.model.decoder.num_classes = 3
    cfg.model.test_cfg.max_per_img = 180  # all pairs: random weights favour one class
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    meta = dict(classes=('cat', 'dog', 'bird'), category_ids=(17, 18, 16))
    path = folder / 'toy.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta)), path)
    return cfg, str(path)
