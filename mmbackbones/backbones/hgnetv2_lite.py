"""HGNetV2-B0 cut short for DEIMv2's smallest sizes: Atto, Femto, Pico.

Real-Time Object Detection Meets DINOv3, arXiv 2509.20787.
Upstream: https://github.com/Intellindust-AI-Lab/DEIMv2 engine/backbone/hgnetv2.py
(Apache-2.0).
Departs from the source: as `HGNetV2`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmbackbones.backbones.hgnetv2 import ArchSpec, HGNetV2
from mmbackbones.registry import MODELS

__all__ = ['HGNetV2Lite']

_B0 = HGNetV2.arch_settings['b0']


def _arch(**last: int) -> ArchSpec:
    """Stem and stages 1 and 2 of B0, and its stage 3 with changes."""
    first, second, third, _ = _B0.stages
    return replace(_B0, stages=(first, second, replace(third, **last)))


@MODELS.register_module()
class HGNetV2Lite(HGNetV2):
    """Three stages, down to stride 16.

    Weights of B0 give what has its name and shape here; the report of loading
    counts and names the rest.

    Args:
        arch: `'atto'`, `'femto'` or `'pico'` in either case.
        out_indices: stages whose maps come out, see `BaseBackbone`.
        **kwargs: as `HGNetV2`.

    Attributes:
        must_load: beginnings of the names that any weights have to fill.
    """

    arch_settings = {
        'atto': _arch(out_channels=256, num_blocks=1, kernel_size=3),
        'femto': _arch(num_blocks=1),
        'pico': _arch(),
    }
    must_load = ('stem.', 'stages.0.', 'stages.1.')

    def __init__(
        self,
        arch: str | Mapping = 'atto',
        *,
        out_indices: int | Sequence[int] = (2,),
        **kwargs: Any,
    ) -> None:
        super().__init__(arch, out_indices=out_indices, **kwargs)
