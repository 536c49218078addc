from mmbackbones import decoders, losses  # noqa: F401  (a config names their parts)

from .dfine import DFINE
from .rtdetr import RTDETR

__all__ = ['DFINE', 'RTDETR']
