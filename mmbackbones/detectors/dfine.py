"""D-FINE as an mmdet detector.

D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution
Refinement, arXiv 2410.13842.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/dfine.py (Apache-2.0).
Departs from the source: as `RTDETR`.
"""

from mmbackbones.detectors.rtdetr import RTDETR
from mmbackbones.registry import MODELS

__all__ = ['DFINE']


@MODELS.register_module()
class DFINE(RTDETR):
    """The name that configs give a detector with `DFINEDecoder`."""
