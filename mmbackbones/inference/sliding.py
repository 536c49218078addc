"""Windows that slide over an image, as mmseg's segmentors are tested.

Upstream: https://github.com/open-mmlab/mmsegmentation
mmseg/models/segmentors/encoder_decoder.py: slide_inference (Apache-2.0).
Departs from the source:
- an image below the size of a window is filled up, since the input of an exported file
  is fixed; upstream the model then sees a smaller window.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmbackbones.inference.tiling import Window

__all__ = ['LogitMean', 'slide']


def slide(
    image_hw: tuple[int, int], crop_hw: tuple[int, int], stride_hw: tuple[int, int]
) -> list[Window]:
    """Windows that cover an image, row by row; the last ones end at its edges.

    Args:
        image_hw: height and width in pixels.
        crop_hw: of a window; cut down to the image where that is smaller.
        stride_hw: from one window to the next.
    """
    (tops, height), (lefts, width) = (
        _starts(*sides) for sides in zip(image_hw, crop_hw, stride_hw, strict=True)
    )
    return [Window(x, y, x + width, y + height) for y in tops for x in lefts]


def _starts(length: int, crop: int, stride: int) -> tuple[list[int], int]:
    crop = min(crop, length)
    count = -(-(length - crop) // stride) + 1
    return [min(i * stride, length - crop) for i in range(count)], crop


class LogitMean:
    """Logits of windows, averaged where they overlap.

    Args:
        image_hw: of the image that was cut, in pixels.
        crop_hw: of a window as the file takes it.
        align_corners: how logits are resized.
    """

    def __init__(
        self, image_hw: tuple[int, int], crop_hw: tuple[int, int], align_corners: bool
    ) -> None:
        self._crop_hw, self._align_corners = crop_hw, align_corners
        self._sum: Tensor | None = None
        self._count = torch.zeros(image_hw)

    def add(self, window: Window, logits: np.ndarray) -> None:
        """Add `(C, h, w)` logits of a window, at any resolution."""
        part = self._resize(torch.from_numpy(logits.astype(np.float32)), self._crop_hw)
        if self._sum is None:
            self._sum = part.new_zeros(len(part), *self._count.shape)
        here = (slice(window.y1, window.y2), slice(window.x1, window.x2))
        height, width = window.y2 - window.y1, window.x2 - window.x1
        self._sum[(slice(None), *here)] += part[:, :height, :width]
        self._count[here] += 1

    def labels(self, size_hw: tuple[int, int]) -> np.ndarray:
        """The best class of each pixel, `(H, W)` int32, at the size of the image."""
        mean = self._resize(self._sum / self._count, size_hw)
        return mean.argmax(0).numpy().astype(np.int32)

    def _resize(self, logits: Tensor, size_hw: tuple[int, int]) -> Tensor:
        return F.interpolate(
            logits[None], size_hw, mode='bilinear', align_corners=self._align_corners
        )[0]
