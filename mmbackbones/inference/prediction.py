"""The way of images through a model: read, cut, prepared, run in batches, joined."""

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
from mmengine.logging import print_log

from mmbackbones.inference.backends import Backend
from mmbackbones.inference.prefetch import map_ahead
from mmbackbones.inference.results import NO_CLASS, Detections, LabelMap, Result
from mmbackbones.inference.sources import Frame, Source
from mmbackbones.inference.tiling import Boxes, Window, cut, merge_boxes, merge_maps

__all__ = ['PredictOptions', 'Prediction']


@dataclass(frozen=True)
class PredictOptions:
    """Of one call of `Inferencer.predict`.

    Attributes:
        conf: lowest score of a detection.
        labels: of the classes to keep; None keeps all.
        tile_hw: of the windows that images are cut into, in pixels, or None.
        overlap: least share that a tile has in common with the next.
        keep_images: hold the pixels in the results.
        skip_unreadable: leave out images that cannot be read.
    """

    conf: float
    labels: tuple[int, ...] | None
    tile_hw: tuple[int, int] | None
    overlap: float
    keep_images: bool
    skip_unreadable: bool


@dataclass
class _Job:
    """An image on its way: its windows, and what was found in them so far."""

    index: int
    frame: Frame
    shape_hw: tuple[int, int] = (0, 0)
    image: np.ndarray | None = None
    windows: list[Window] = field(default_factory=list)
    found: list[Boxes | np.ndarray] = field(default_factory=list)
    unreadable: str | None = None

    @property
    def is_done(self) -> bool:
        """Whether nothing more comes."""
        return bool(self.unreadable) or len(self.found) == len(self.windows)


class _Part(NamedTuple):
    """A window of an image, or an image that has none since it cannot be read.

    Attributes:
        job: of the image.
        is_first: of its windows.
        pixels: of the window, a view of the image's.
    """

    job: _Job
    is_first: bool
    pixels: np.ndarray | None


class Prediction:
    """One pass over images.

    Args:
        backend: that predicts.
        options: of the call.
    """

    def __init__(self, backend: Backend, options: PredictOptions) -> None:
        self._backend, self._options = backend, options

    def run(
        self, images: Source, batch_size: int, num_workers: int
    ) -> Iterator[Result]:
        """Results in the order of the images.

        Args:
            images: to go through once.
            batch_size: windows at once.
            num_workers: threads that read and resize; 0 does it in turns.
        """
        waiting: deque[_Job] = deque()
        batch: list[tuple[_Job, Any]] = []  # with inputs; of an image, maybe several
        unreadable: list[str] = []

        def finished() -> Iterator[Result]:
            while waiting and waiting[0].is_done:
                job = waiting.popleft()
                if job.unreadable:
                    unreadable.append(job.unreadable)
                else:
                    yield self._result(job)

        # Images are cut into views; inputs are made of a few windows at a time.
        ahead = partial(map_ahead, num_workers=num_workers)
        images = ahead(self._read, enumerate(images), num_ahead=max(1, num_workers))
        prepared = ahead(
            self._prepare, self._cut(images), num_ahead=2 * batch_size + num_workers
        )
        with contextlib.closing(prepared):  # ends its threads when nobody asks for more
            for part, value in prepared:
                if part.is_first:
                    waiting.append(part.job)
                if not part.job.unreadable:
                    batch.append((part.job, value))
                if len(batch) == batch_size:
                    self._predict(batch)
                    batch = []
                yield from finished()
        if batch:
            self._predict(batch)
        yield from finished()
        if unreadable:
            print_log(
                f'{len(unreadable)} images left out: {"; ".join(unreadable)}',
                logger='current',
                level=30,
            )

    def _read(self, item: tuple[int, Frame]) -> tuple[_Job, np.ndarray | None]:
        """Read an image and choose its windows; called in threads."""
        job = _Job(*item)
        image = job.frame.image
        if image is None:
            try:
                image = self._backend.read(job.frame.path)
            except ValueError as error:
                if not self._options.skip_unreadable:
                    raise
                job.unreadable = str(error)
                return job, None
        if self._options.keep_images or job.frame.path is None:
            job.image = image
        job.shape_hw = height, width = image.shape[:2]
        job.windows = [Window(0, 0, width, height)]
        if self._options.tile_hw is not None:
            tiles = cut((height, width), self._options.tile_hw, self._options.overlap)
            if self._backend.info.task == 'segmentation':  # every pixel is in some tile
                job.windows = tiles
            elif len(tiles) > 1:
                job.windows += tiles
        return job, image

    @staticmethod
    def _cut(images: Iterator[tuple[_Job, np.ndarray | None]]) -> Iterator[_Part]:
        with contextlib.closing(images):
            for job, image in images:
                if job.unreadable:
                    yield _Part(job, True, None)
                for i, w in enumerate(job.windows):
                    yield _Part(job, i == 0, image[w.y1 : w.y2, w.x1 : w.x2])

    def _prepare(self, part: _Part) -> tuple[_Part, Any]:
        """Make a window an input; called in threads."""
        value = None
        try:
            if not part.job.unreadable:
                value = self._input(part)
        except ValueError as error:
            if not self._options.skip_unreadable:
                raise
            part.job.unreadable = str(error)
        # Without the pixels: an image that was read is let go of.
        return part._replace(pixels=None), value

    def _input(self, part: _Part) -> Any:
        frame, (height, width) = part.job.frame, part.job.shape_hw
        try:
            return self._backend.prepare(np.ascontiguousarray(part.pixels), frame.name)
        except cv2.error as error:  # as of a side that rounds to no pixel
            raise ValueError(
                f'{frame.path or frame.name!r} of {width} x {height} pixels '
                f'cannot be brought to the size of the model: {error}'
            ) from error

    def _predict(self, batch: list[tuple[_Job, Any]]) -> None:
        """Run windows; results of a job come in the order of its windows."""
        found = self._backend.predict([value for _, value in batch])
        for (job, _), one in zip(batch, found, strict=True):
            job.found.append(one)

    def _result(self, job: _Job) -> Result:
        common = dict(
            info=self._backend.info,
            index=job.index,
            name=job.frame.name,
            path=job.frame.path,
            shape_hw=job.shape_hw,
            held_image=job.image,
        )
        if self._backend.info.task == 'segmentation':
            labels = merge_maps(job.found, job.windows, job.shape_hw)
            if self._options.labels is not None:
                labels[~np.isin(labels, self._options.labels)] = NO_CLASS
            return LabelMap(labels=labels, **common)
        found = [
            _kept(boxes, window, self._options)
            for boxes, window in zip(job.found, job.windows, strict=True)
        ]
        boxes = found[0]
        if len(found) > 1:
            boxes = merge_boxes(found, job.windows, job.shape_hw)
        return Detections(**boxes._asdict(), **common)


def _kept(boxes: Boxes, window: Window, options: PredictOptions) -> Boxes:
    """The wanted boxes of a window, in pixels of the whole image."""
    keep = boxes.scores >= options.conf
    if options.labels is not None:
        keep &= np.isin(boxes.labels, options.labels)
    shift = np.array([window.x1, window.y1] * 2, np.float32)
    return boxes._replace(xyxy=boxes.xyxy + shift).pick(keep)
