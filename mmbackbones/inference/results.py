"""What was predicted on one image."""

from mmbackbones.inference.detections import Detections
from mmbackbones.inference.label_map import NO_CLASS, LabelMap
from mmbackbones.inference.result import Result

__all__ = ['NO_CLASS', 'Detections', 'LabelMap', 'Result']
