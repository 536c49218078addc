from mmbackbones.data.batch_augments import MultiScaleResize
from mmbackbones.data.classes import resolve_classes
from mmbackbones.data.coco import CocoDetection
from mmbackbones.data.det_transforms import (
    DropSmallBoxes,
    LoadImage,
    PhotometricDistort,
    RandomIoUCrop,
    RandomZoomOut,
)
from mmbackbones.data.synthetic import draw_detection_set

__all__ = [
    'CocoDetection',
    'DropSmallBoxes',
    'LoadImage',
    'MultiScaleResize',
    'PhotometricDistort',
    'RandomIoUCrop',
    'RandomZoomOut',
    'draw_detection_set',
    'resolve_classes',
]
