from mmbackbones.data.batch_augments import MultiScaleResize
from mmbackbones.data.batch_mixing import CopyBlend, MixUp
from mmbackbones.data.classes import resolve_classes
from mmbackbones.data.coco import CocoDetection
from mmbackbones.data.det_transforms import (
    DropSmallBoxes,
    LoadImage,
    PhotometricDistort,
    RandomIoUCrop,
    RandomZoomOut,
)
from mmbackbones.data.fast_transforms import (
    FastLoadImage,
    PackPlanes,
    WindowDistort,
    WindowFlip,
    WindowIoUCrop,
    WindowResize,
    WindowZoomOut,
)
from mmbackbones.data.mosaic import CentredAffine, WholeMosaic
from mmbackbones.data.synthetic import draw_detection_set

__all__ = [
    'CentredAffine',
    'CocoDetection',
    'CopyBlend',
    'DropSmallBoxes',
    'FastLoadImage',
    'LoadImage',
    'MixUp',
    'MultiScaleResize',
    'PackPlanes',
    'PhotometricDistort',
    'RandomIoUCrop',
    'RandomZoomOut',
    'WholeMosaic',
    'WindowDistort',
    'WindowFlip',
    'WindowIoUCrop',
    'WindowResize',
    'WindowZoomOut',
    'draw_detection_set',
    'resolve_classes',
]
