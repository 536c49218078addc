"""The published training augmentation with one resampling of the image.

SSD: Single Shot MultiBox Detector, arXiv 1512.02325 (zoom-out, crop).
Upstream: https://github.com/pytorch/vision torchvision/transforms/v2 (BSD-3-Clause),
as composed in https://github.com/Peterande/D-FINE
configs/dfine/include/dataloader.yml (Apache-2.0).
Departs from the source:
- what moves pixels only moves a window over the decoded image, the last step resamples
  what is seen through it; the originals copy the image at each step.

Each transform here stands in for one of `det_transforms` or of mmdet, at the same
place of a pipeline, and draws the same numbers from the same generators: with the
same seed boxes are equal, and pixels differ as their filters do.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import torch
from mmdet.datasets.transforms import PackDetInputs, RandomFlip, Resize
from mmdet.structures.bbox import autocast_box_type
from mmengine.fileio import get
from PIL import Image

from mmbackbones.data.det_transforms import (
    LoadImage,
    PhotometricDistort,
    RandomIoUCrop,
    RandomZoomOut,
)
from mmbackbones.data.window import Window
from mmbackbones.registry import TRANSFORMS

__all__ = [
    'FastLoadImage',
    'PackPlanes',
    'WindowDistort',
    'WindowFlip',
    'WindowIoUCrop',
    'WindowResize',
    'WindowZoomOut',
    'check_windows',
]

_JPEG_END = b'\xff\xd9'


@TRANSFORMS.register_module()
class FastLoadImage(LoadImage):
    """`LoadImage`, with ordinary JPEGs decoded by OpenCV: the same pixels, sooner.

    Ordinary is a grey or RGB JPEG that is whole and whose stored size is the annotated
    one. Anything else (turned by EXIF, CMYK, another format, cut off) is left to
    `LoadImage`. OpenCV fills up a truncated JPEG without an error, so the file has to
    end as a JPEG does.
    """

    def transform(self, results: dict) -> dict:
        """Add `img` `(H, W, 3)`, `img_shape` and `ori_shape` (H, W)."""
        image = self._decode(results)
        if image is None:
            return super().transform(results)
        results['img'] = image
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        return results

    def _decode(self, results: dict) -> np.ndarray | None:
        """Pixels of an ordinary JPEG, None for anything else."""
        try:
            data = get(results['img_path'], backend_args=self.backend_args)
            with Image.open(io.BytesIO(data)) as header:  # decodes nothing
                ordinary = (
                    header.format == 'JPEG'
                    and header.mode in ('L', 'RGB')
                    and header.size == (results.get('width'), results.get('height'))
                    and data.endswith(_JPEG_END)
                )
        except (OSError, SyntaxError, Image.DecompressionBombError):
            return None
        if not ordinary:
            return None
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)


@TRANSFORMS.register_module()
class WindowDistort(PhotometricDistort):
    """`PhotometricDistort` of what will be seen through the window alone.

    The mean grey that contrast turns about is that of every fourth pixel of every
    fourth row.
    """

    def transform(self, results: dict) -> dict:
        """Note the distortion of `img` `(H, W, 3)`, uint8 BGR."""
        window = Window.take(results)
        self._check(window.image)
        steps = self._draw()
        for i, step in enumerate(steps):
            if step.func == self._scale_contrast:
                seen = _in_turn(steps[:i], window.image[::4, ::4])
                steps[i] = partial(step, mean=self._mean_grey(seen))
        colour = partial(_in_turn, steps) if steps else None
        results['window'] = replace(window, colour=colour)
        return results


def _in_turn(steps: list[partial], image: np.ndarray) -> np.ndarray:
    for step in steps:
        image = step(image)
    return image


@TRANSFORMS.register_module()
class WindowZoomOut(RandomZoomOut):
    """`RandomZoomOut` that only moves the window."""

    def _enlarge(
        self, results: dict, canvas_hw: tuple[int, int], left: int, top: int
    ) -> None:
        height, width = canvas_hw
        results['window'] = Window.take(results).part(
            -left, -top, width - left, height - top
        )


@TRANSFORMS.register_module()
class WindowIoUCrop(RandomIoUCrop):
    """`RandomIoUCrop` that only moves the window."""

    def _cut(self, results: dict, left: int, top: int, right: int, bottom: int) -> None:
        results['window'] = Window.take(results).part(left, top, right, bottom)


@TRANSFORMS.register_module()
class WindowFlip(RandomFlip):
    """mmdet's `RandomFlip` that only moves the window; no homography is recorded."""

    @autocast_box_type()
    def _flip(self, results: dict) -> None:
        direction = results['flip_direction']
        results['window'] = Window.take(results).mirrored(direction)
        if 'gt_bboxes' in results:
            results['gt_bboxes'].flip_(results['img_shape'], direction)
        if 'gt_masks' in results:
            results['gt_masks'] = results['gt_masks'].flip(direction)


@TRANSFORMS.register_module()
class WindowResize(Resize):
    """Stretches what is seen through the window to a size, and ends the window.

    Bilinear; where it reduces, after smoothing by the triangle of an antialiased
    filter.

    Args:
        scale: (width, height) of the output.
        **kwargs: as mmdet's `Resize` has them; the filter is not to be chosen.

    Raises:
        ValueError: `keep_ratio`, which is not stretched.
    """

    def __init__(self, scale: tuple[int, int], **kwargs: object) -> None:
        if kwargs.get('keep_ratio'):
            raise ValueError('keep_ratio is set; WindowResize only stretches')
        super().__init__(scale=scale, **kwargs)

    def _resize_img(self, results: dict) -> None:
        window = Window.take(results)
        results.pop('window', None)
        width, height = results['scale']
        before_height, before_width = results['img_shape']
        results['img'] = window.render(width, height)
        results['img_shape'] = (height, width)
        results['scale_factor'] = (width / before_width, height / before_height)
        results['keep_ratio'] = False

    def _record_homography_matrix(self, results: dict) -> None:
        """Nothing: what came before recorded none."""


@TRANSFORMS.register_module()
class PackPlanes(PackDetInputs):
    """`PackDetInputs` whose channels are taken apart by OpenCV, which is faster.

    Raises:
        ValueError: a window was moved and no `WindowResize` followed.
    """

    def transform(self, results: dict) -> dict:
        """Pack `img` `(H, W, C)` as `inputs` `(C, H, W)`, and the annotations."""
        if 'window' in results:
            raise ValueError(
                'a window was moved over the image but nothing was resampled; put '
                'WindowResize before PackPlanes'
            )
        image = results.pop('img')
        planes = np.empty((image.shape[2], *image.shape[:2]), image.dtype)
        cv2.split(image, list(planes))
        packed = super().transform(results)
        return dict(inputs=torch.from_numpy(planes), **packed)


def check_windows(steps: Sequence[Callable]) -> None:
    """See that what moves a window is followed by what resamples through it.

    Transforms of mmdet in between would find no image, and pass over that in silence.

    Args:
        steps: transforms of a pipeline; those nested in others are left alone.

    Raises:
        ValueError: one is not.
    """
    movers = (WindowDistort, WindowZoomOut, WindowIoUCrop, WindowFlip)
    mover = None
    for step in steps:
        if isinstance(step, WindowResize):
            mover = None
        elif isinstance(step, movers):
            mover = type(step)
    if mover:
        raise ValueError(
            f'{mover.__name__} only moves a window over the image, and no WindowResize '
            'follows in the pipeline; put one in the place of Resize, or take the '
            f'plain step ({mover.__base__.__name__}) instead'
        )
