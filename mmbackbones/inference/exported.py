"""Exported files behind the face that `backends` describes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from mmcv import imrescale
from PIL import Image

from mmbackbones.inference.metadata import ExportInfo
from mmbackbones.inference.sliding import LogitMean, slide
from mmbackbones.inference.sources import read_image
from mmbackbones.inference.tiling import Boxes, Window

__all__ = [
    'ExportedBackend',
    'Prepared',
    'Session',
    'prepare_image',
    'resize_as_stated',
]


class Session(Protocol):
    """A file that was loaded by a runtime.

    Attributes:
        name: of the runtime.
        fixed_batch: number of images that it takes, or None for any.
    """

    name: str
    fixed_batch: int | None

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name, of `(N, 3, H, W)` float32."""


class Prepared(NamedTuple):
    """An image as a file takes it.

    Attributes:
        inputs: `(3, H, W)` float32, RGB in [0, 1]; one, or one by window.
        windows: of the inputs within the resized image.
        inner_hw: of the resized image in pixels, without filling.
        outer_hw: of the image itself.
    """

    inputs: list[np.ndarray]
    windows: list[Window]
    inner_hw: tuple[int, int]
    outer_hw: tuple[int, int]


def prepare_image(image: np.ndarray, info: ExportInfo) -> Prepared:
    """Resize an image as a file states, and cut it where windows slide.

    Args:
        image: `(H, W, 3)` uint8 BGR.
        info: of the file.
    """
    if info.slide is None:
        resized, inner_hw = resize_as_stated(image, info)
        height, width = inner_hw
        whole = Window(0, 0, width, height)
        return Prepared([_as_input(resized)], [whole], inner_hw, image.shape[:2])
    resized = _resize_for_windows(image, info)
    windows = slide(resized.shape[:2], info.input_size_hw, info.slide.stride_hw)
    crops = (resized[w.y1 : w.y2, w.x1 : w.x2] for w in windows)
    inputs = [_as_input(_fill_up(crop, info)) for crop in crops]
    return Prepared(inputs, windows, resized.shape[:2], image.shape[:2])


def _as_input(image: np.ndarray) -> np.ndarray:
    rgb = np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))
    return rgb.astype(np.float32) / 255


class ExportedBackend:
    """An exported file; its metadata state the preprocessing.

    Args:
        session: that runs it.
        info: its metadata.
    """

    def __init__(self, session: Session, info: ExportInfo) -> None:
        self.info = info
        self.name = session.name
        self._session = session

    @property
    def max_batch(self) -> int | None:
        """Images at once; None for any, as where their windows share batches."""
        return self._session.fixed_batch if self.info.slide is None else None

    def read(self, path: str) -> np.ndarray:
        """An image file as `(H, W, 3)` uint8 BGR."""
        return read_image(path)

    def prepare(self, image: np.ndarray, name: str) -> Prepared:
        """The input of one image, from `(H, W, 3)` uint8 BGR."""
        return prepare_image(image, self.info)

    def set_options(self, *, half: bool, compile: bool) -> None:
        """Both are settled when the file is made.

        Raises:
            ValueError: one of them is wanted.
        """
        for wanted, option in ((half, 'half'), (compile, 'compile')):
            if wanted:
                raise ValueError(
                    f'{option} is for PyTorch checkpoints; the precision and the graph '
                    f'of a file that {self.name} runs are settled by tools/export.py'
                )

    def predict(self, inputs: Sequence[Prepared]) -> list[Boxes] | list[np.ndarray]:
        """What the graph finds, led back to the images.

        Raises:
            ValueError: more images than a file of a fixed batch takes.
        """
        if self.max_batch is not None and len(inputs) > self.max_batch:
            raise ValueError(
                f'batch_size is {len(inputs)}, but the file takes {self.max_batch}; '
                'lower it, or export with a dynamic batch'
            )
        if self.info.slide is not None:
            fixed = self._session.fixed_batch
            return list(self._slide(inputs, fixed or len(inputs)))
        outputs = self._run([one.inputs[0] for one in inputs])
        lead_back = self._map if self.info.task == 'segmentation' else self._boxes
        return [lead_back(outputs, i, one) for i, one in enumerate(inputs)]

    def _run(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of some images; a fixed batch is filled up with zeros."""
        batch, fixed = np.stack(images), self._session.fixed_batch
        if fixed is not None and len(batch) < fixed:
            rest = np.zeros((fixed - len(batch), *batch.shape[1:]), batch.dtype)
            batch = np.concatenate((batch, rest))
        return self._session.run(batch)

    def _slide(self, images: Sequence[Prepared], at_once: int) -> Iterator[np.ndarray]:
        """Maps of images, whose windows share batches."""
        info = self.info
        todo = [(i, k) for i, one in enumerate(images) for k in range(len(one.windows))]
        means: dict[int, LogitMean] = {}
        for start in range(0, len(todo), at_once):
            group = todo[start : start + at_once]
            outputs = self._run([images[i].inputs[k] for i, k in group])
            for row, (i, k) in enumerate(group):
                one = images[i]
                if i not in means:
                    means[i] = LogitMean(
                        one.inner_hw, info.input_size_hw, info.slide.align_corners
                    )
                means[i].add(one.windows[k], outputs['logits'][row])
                if k + 1 == len(one.windows):
                    yield means.pop(i).labels(one.outer_hw)

    @staticmethod
    def _boxes(outputs: dict, i: int, image: Prepared) -> Boxes:
        (height, width), inner = image.outer_hw, image.inner_hw
        scale = np.array([width / inner[1], height / inner[0]] * 2, np.float32)
        return Boxes(
            outputs['boxes'][i].astype(np.float32) * scale,
            outputs['scores'][i].astype(np.float32),
            outputs['labels'][i].astype(np.int64),
        )

    @staticmethod
    def _map(outputs: dict, i: int, image: Prepared) -> np.ndarray:
        height, width = image.inner_hw
        labels = outputs['labels'][i][:height, :width].astype(np.int32)
        size_wh = image.outer_hw[::-1]
        return cv2.resize(labels, size_wh, interpolation=cv2.INTER_NEAREST_EXACT)


def resize_as_stated(
    image: np.ndarray, info: ExportInfo
) -> tuple[np.ndarray, tuple[int, int]]:
    """An image at the size of an exported model's input.

    Detectors are trained with Pillow's antialiased bilinear filter, segmentors with
    OpenCV's; so are images resized here.

    Args:
        image: `(H, W, 3)` uint8 BGR.
        info: of the file.

    Returns:
        `(h, w, 3)` uint8 BGR, and the size (height, width) of the image within it.
    """
    height, width = info.input_size_hw
    if info.resize == 'keep_ratio_pad':
        scale = min(height / image.shape[0], width / image.shape[1])
        inner = tuple(max(1, int(side * scale + 0.5)) for side in image.shape[:2])
    else:
        inner = (height, width)
    if info.task == 'detection':
        picture = Image.fromarray(image).resize(inner[::-1], Image.Resampling.BILINEAR)
        resized = np.asarray(picture)
    else:
        resized = cv2.resize(image, inner[::-1], interpolation=cv2.INTER_LINEAR)
    return _fill_up(resized, info), inner


def _resize_for_windows(image: np.ndarray, info: ExportInfo) -> np.ndarray:
    scale = info.slide.scale_wh
    if scale is None:
        return image
    if info.resize == 'keep_ratio':
        return imrescale(image, scale)  # what mmcv's Resize calls
    return cv2.resize(image, scale, interpolation=cv2.INTER_LINEAR)


def _fill_up(image: np.ndarray, info: ExportInfo) -> np.ndarray:
    """An image at the upper left of the input, the rest of it the mean.

    The graph turns that into zeros, as the preprocessors of mmdet and mmseg pad.
    """
    height, width = image.shape[:2]
    if (height, width) == tuple(info.input_size_hw):
        return image
    canvas = np.empty((*info.input_size_hw, 3), np.uint8)
    canvas[:] = np.round(info.mean[::-1]).astype(np.uint8)
    canvas[:height, :width] = image
    return canvas
