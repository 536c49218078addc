"""Image loading and the augmentation that D-FINE was published with.

SSD: Single Shot MultiBox Detector, arXiv 1512.02325 (distortion, zoom-out, crop).
Upstream: https://github.com/pytorch/vision torchvision/transforms/v2 (BSD-3-Clause),
as composed in https://github.com/Peterande/D-FINE
configs/dfine/include/dataloader.yml (Apache-2.0).
Departs from the source:
- works on mmdet's results dict (BGR uint8 arrays, boxes in pixels, xyxy);
- brightness, contrast and saturation round to the nearest grey level (PIL cuts off);
- hue turns on 256 steps with OpenCV's conversion.

mmdet's `RandomFlip` and `Resize(backend='pillow')` draw as upstream does and are
used as they are. Its other counterparts do not: `MinIoURandomCrop` asks of *every*
box what upstream asks of one, `PhotoMetricDistortion` has other ranges,
`FilterAnnotations` drops an image without boxes by default; `Expand` draws alike but
takes longer than decoding the image.
"""

import io
import random
from functools import partial

import cv2
import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmdet.structures.bbox import autocast_box_type
from mmengine.fileio import get
from PIL import Image, ImageOps

from mmbackbones.registry import TRANSFORMS

__all__ = [
    'DropSmallBoxes',
    'LoadImage',
    'PhotometricDistort',
    'RandomIoUCrop',
    'RandomZoomOut',
]

# ITU-R 601 luma of B, G, R, as PIL and OpenCV compute grey.
_LUMA_BGR = np.array((0.114, 0.587, 0.299))


@TRANSFORMS.register_module()
class LoadImage(LoadImageFromFile):
    """Reads an image file of any kind as 8-bit BGR.

    Pillow decodes, as for the published weights: the pixels of a JPEG equal those
    of OpenCV, and a truncated file is an error with every version. Grey, palette,
    CMYK and 1-bit images become colour, alpha is left out, and 16-bit grey keeps its
    high byte (Pillow alone would turn it white).

    EXIF orientation: where the annotation file states the image's size (`width` and
    `height` of the results), boxes were drawn either on the stored pixels or on the
    upright image, and the size says which; where both fit, the stored pixels are
    kept, as upstream does. Without annotations the image is turned upright, as
    viewers show it.

    Args:
        backend_args: mmengine's, for files that are not local.

    Raises:
        ValueError: the file is missing, truncated or no image, or its size is not
            the annotated one.
    """

    def __init__(self, *, backend_args: dict | None = None) -> None:
        super().__init__(backend_args=backend_args)

    def transform(self, results: dict) -> dict:
        """Add `img` `(H, W, 3)`, `img_shape` and `ori_shape` (H, W)."""
        path = results['img_path']
        try:
            data = get(path, backend_args=self.backend_args)
            with Image.open(io.BytesIO(data)) as image:
                image = self._orient(image, results)
                pixels = self._to_rgb(image)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f'image {path!r} cannot be read: {error}') from error
        results['img'] = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
        return results

    @staticmethod
    def _orient(image: Image.Image, results: dict) -> Image.Image:
        if 'width' not in results or 'height' not in results:
            return ImageOps.exif_transpose(image)
        annotated = (results['width'], results['height'])
        if image.size == annotated:
            return image
        upright = ImageOps.exif_transpose(image)
        if upright.size == annotated:
            return upright
        raise ValueError(
            f'image {results["img_path"]!r} is {image.width} x {image.height} pixels, '
            f'but the annotation file says {annotated[0]} x {annotated[1]}'
        )

    @staticmethod
    def _to_rgb(image: Image.Image) -> np.ndarray:
        if image.mode.startswith('I'):  # 16 bits, whatever the byte order
            high_byte = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
            return np.repeat(high_byte.astype(np.uint8)[..., None], 3, axis=-1)
        return np.asarray(image.convert('RGB'))


def _keep_boxes(results: dict, keep: np.ndarray) -> None:
    """Reduce everything that is listed per box to those where `keep` `(n,)` is True."""
    if keep.all():
        return
    for key in ('gt_bboxes', 'gt_bboxes_labels', 'gt_ignore_flags', 'gt_masks'):
        if key in results:
            results[key] = results[key][keep]


@TRANSFORMS.register_module()
class PhotometricDistort(BaseTransform):
    """Brightness, contrast, saturation, hue and order of channels, each at random.

    Contrast comes before saturation and hue or after them, at even odds. Factors are
    uniform in their ranges. A hue that does not turn still costs a level or two of
    rounding on the way there and back, as it does upstream.

    Args:
        brightness: range of the factor on pixel values.
        contrast: of the factor on the difference to the mean grey of the image.
        saturation: of the factor on the difference to the grey of the pixel.
        hue: range of the shift, in turns of the colour circle.
        prob: probability of each of the five, drawn independently.
    """

    def __init__(
        self,
        brightness: tuple[float, float] = (0.875, 1.125),
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: tuple[float, float] = (-0.05, 0.05),
        prob: float = 0.5,
    ) -> None:
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue
        self.prob = prob

    def transform(self, results: dict) -> dict:
        """Distort `img` `(H, W, 3)`, uint8 BGR."""
        image = results['img']
        self._check(image)
        for step in self._draw():
            image = step(image)
        results['img'] = image
        return results

    @staticmethod
    def _check(image: np.ndarray) -> None:
        if image.dtype != np.uint8:
            raise ValueError(
                f'PhotometricDistort takes 8-bit images, not {image.dtype}; put it '
                'before what makes them float'
            )

    def _draw(self) -> list[partial]:
        """Steps on an image, in order, with what they drew."""
        kinds = [
            (self._scale_brightness, self.brightness),
            (self._scale_saturation, self.saturation),
            (self._shift_hue, self.hue),
        ]
        contrast_first = random.random() < 0.5
        kinds.insert(1 if contrast_first else 3, (self._scale_contrast, self.contrast))
        steps = [
            partial(step, factor=random.uniform(*limits))
            for step, limits in kinds
            if random.random() < self.prob
        ]
        if random.random() < self.prob:
            steps.append(partial(self._reorder, channels=random.sample(range(3), 3)))
        return steps

    @staticmethod
    def _look_up(image: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Replace grey level i by `values[i]`, rounded and saturated."""
        return cv2.LUT(image, np.clip(np.rint(values), 0, 255).astype(np.uint8))

    def _scale_brightness(self, image: np.ndarray, factor: float) -> np.ndarray:
        return self._look_up(image, np.arange(256) * factor)

    def _scale_contrast(
        self, image: np.ndarray, factor: float, mean: float | None = None
    ) -> np.ndarray:
        mean = self._mean_grey(image) if mean is None else mean
        return self._look_up(image, mean + (np.arange(256) - mean) * factor)

    @staticmethod
    def _mean_grey(image: np.ndarray) -> float:
        return np.rint(_LUMA_BGR @ cv2.mean(image)[:3])

    @staticmethod
    def _scale_saturation(image: np.ndarray, factor: float) -> np.ndarray:
        return cv2.transform(image, factor * np.eye(3) + (1 - factor) * _LUMA_BGR)

    @staticmethod
    def _shift_hue(image: np.ndarray, factor: float) -> np.ndarray:
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV_FULL)
        hsv[..., 0] += np.uint8(round(factor * 256) % 256)  # wraps around
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR_FULL)

    @staticmethod
    def _reorder(image: np.ndarray, channels: list[int]) -> np.ndarray:
        planes = cv2.split(image)
        return cv2.merge([planes[i] for i in channels])


@TRANSFORMS.register_module()
class RandomZoomOut(BaseTransform):
    """Puts the image somewhere on a larger black canvas.

    Args:
        side_range: range of the canvas' side over the image's; both sides share it.
        prob: probability of doing so.

    Raises:
        ValueError: `side_range` starts below 1 or is not a range.
    """

    def __init__(
        self, side_range: tuple[float, float] = (1.0, 4.0), prob: float = 0.5
    ) -> None:
        if not 1 <= side_range[0] <= side_range[1]:
            raise ValueError(
                f'side_range is {tuple(side_range)}; give (low, high) with '
                '1 <= low <= high'
            )
        self.side_range = side_range
        self.prob = prob

    @autocast_box_type()
    def transform(self, results: dict) -> dict:
        """Enlarge `img` and move `gt_bboxes`."""
        if random.random() >= self.prob:
            return results
        height, width = results['img_shape']
        ratio = random.uniform(*self.side_range)
        canvas_hw = int(height * ratio), int(width * ratio)
        left = int((canvas_hw[1] - width) * random.random())
        top = int((canvas_hw[0] - height) * random.random())
        self._enlarge(results, canvas_hw, left, top)
        results['img_shape'] = canvas_hw
        if 'gt_bboxes' in results:
            results['gt_bboxes'].translate_([left, top])
        if 'gt_masks' in results:
            results['gt_masks'] = results['gt_masks'].expand(*canvas_hw, top, left)
        return results

    def _enlarge(
        self, results: dict, canvas_hw: tuple[int, int], left: int, top: int
    ) -> None:
        image = results['img']
        canvas = np.zeros((*canvas_hw, *image.shape[2:]), image.dtype)
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
        results['img'] = canvas


@TRANSFORMS.register_module()
class RandomIoUCrop(BaseTransform):
    """Crops a part that overlaps at least one box well enough, as SSD does.

    An overlap is drawn from `options`. Up to `trials` times a crop is drawn (sides
    and place independently); it is taken if its aspect is allowed, the centre of a
    box lies in it, and a box whose centre does has at least that IoU with the crop.
    Otherwise another overlap is drawn; one of 1 or more leaves the image as it is.
    Boxes whose centre is cut off are dropped, the others clipped. An image without
    boxes stays whole.

    Args:
        scale: range of each side of the crop over the image's.
        aspect: range of width over height of the crop, in pixels.
        options: least IoU, one of them drawn evenly; one must be 1 or more, so that
            the drawing ends.
        trials: crops tried for one of them.
        prob: probability of doing any of this.

    Raises:
        ValueError: no entry of `options` is 1 or more.
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.3, 1.0),
        aspect: tuple[float, float] = (0.5, 2.0),
        options: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
        trials: int = 40,
        prob: float = 0.8,
    ) -> None:
        if max(options, default=0) < 1:
            raise ValueError(
                f'options is {tuple(options)}; one entry must be 1, the whole image'
            )
        self.scale = scale
        self.aspect = aspect
        self.options = options
        self.trials = trials
        self.prob = prob

    @autocast_box_type()
    def transform(self, results: dict) -> dict:
        """Crop `img` and what belongs to its boxes."""
        if random.random() >= self.prob or not len(results.get('gt_bboxes', ())):
            return results
        boxes = results['gt_bboxes'].tensor.numpy()
        height, width = results['img_shape']
        crop = None
        while crop is None:
            min_iou = random.choice(self.options)
            if min_iou >= 1:
                return results
            crop = self._find_crop(boxes, width, height, min_iou)
        left, top, right, bottom = (int(edge) for edge in crop)
        self._cut(results, left, top, right, bottom)
        results['img_shape'] = (bottom - top, right - left)
        _keep_boxes(results, _centres_inside(boxes, crop[None])[0])
        results['gt_bboxes'].translate_([-left, -top])
        results['gt_bboxes'].clip_(results['img_shape'])
        if 'gt_masks' in results:
            results['gt_masks'] = results['gt_masks'].crop(crop)
        return results

    def _cut(self, results: dict, left: int, top: int, right: int, bottom: int) -> None:
        results['img'] = results['img'][top:bottom, left:right]

    def _find_crop(
        self, boxes: np.ndarray, width: int, height: int, min_iou: float
    ) -> np.ndarray | None:
        """The first of `trials` crops that will do, `(4,)` xyxy, or None."""
        draws = np.array([random.random() for _ in range(4 * self.trials)])
        draws = draws.reshape(self.trials, 2, 2)  # (trial, size or place, x or y)
        image = np.array((width, height))
        low, high = self.scale
        sizes = (image * (low + (high - low) * draws[:, 0])).astype(int)
        places = ((image - sizes) * draws[:, 1]).astype(int)
        crops = np.concatenate((places, places + sizes), axis=1)  # (T, 4)
        # Multiplied out, a side of no pixels needs no care.
        fits = (sizes[:, 0] >= self.aspect[0] * sizes[:, 1]) & (
            sizes[:, 0] <= self.aspect[1] * sizes[:, 1]
        )
        crops = crops[fits]
        inside = _centres_inside(boxes, crops)  # (T, n)
        overlaps = np.where(inside, _pairwise_iou(crops, boxes), -1.0)
        enough = overlaps.max(axis=1, initial=-1.0) >= min_iou
        return crops[enough.argmax()] if enough.any() else None


def _centres_inside(boxes: np.ndarray, crops: np.ndarray) -> np.ndarray:
    """Whether `(T, 4)` crops hold the centres of `(n, 4)` boxes: `(T, n)`."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((crops[:, None, :2] < centres) & (centres < crops[:, None, 2:])).all(-1)


def _pairwise_iou(crops: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of `(T, 4)` crops with `(n, 4)` boxes, xyxy: `(T, n)`; 0 without area."""
    sides = np.minimum(crops[:, None, 2:], boxes[:, 2:]) - np.maximum(
        crops[:, None, :2], boxes[:, :2]
    )
    shared = sides.clip(min=0).prod(-1)
    areas = [(corners[:, 2:] - corners[:, :2]).prod(-1) for corners in (crops, boxes)]
    union = areas[0][:, None] + areas[1] - shared
    return shared / np.maximum(union, np.finfo(float).tiny)


@TRANSFORMS.register_module()
class DropSmallBoxes(BaseTransform):
    """Drops boxes that are too small to learn from; the image stays, even empty.

    Args:
        min_size: least width and height in pixels of the image as it is here.
    """

    def __init__(self, min_size: float = 1.0) -> None:
        self.min_size = min_size

    @autocast_box_type()
    def transform(self, results: dict) -> dict:
        """Reduce `gt_bboxes` and what is listed with them."""
        boxes = results['gt_bboxes'].tensor.numpy()
        sides = boxes[:, 2:] - boxes[:, :2]
        _keep_boxes(results, (sides >= self.min_size).all(1))
        return results
