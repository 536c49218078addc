"""The way of images through a model: read, cut, prepared, run in batches, joined."""

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

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
    """An image on its way: prepared windows, then what was found in them."""

    index: int
    frame: Frame
    shape_hw: tuple[int, int] = (0, 0)
    image: np.ndarray | None = None
    windows: list[Window] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    found: list[Boxes | np.ndarray] = field(default_factory=list)
    unreadable: str | None = None


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
        batch: list[_Job] = []  # whose next window is in the batch; twice if two are
        unreadable: list[str] = []

        def finished() -> Iterator[Result]:
            while waiting and len(waiting[0].found) == len(waiting[0].windows):
                job = waiting.popleft()
                if job.unreadable:
                    unreadable.append(job.unreadable)
                else:
                    yield self._result(job)

        jobs = map_ahead(
            self._prepare,
            enumerate(images),
            num_workers=num_workers,
            num_ahead=2 * batch_size + num_workers,
        )
        with contextlib.closing(jobs):  # ends its threads when nobody asks for more
            for job in jobs:
                waiting.append(job)
                for _ in job.windows:
                    batch.append(job)
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

    def _prepare(self, item: tuple[int, Frame]) -> _Job:
        """Read an image and make its windows inputs; called in threads."""
        job = _Job(*item)
        try:
            self._fill(job)
        except ValueError as error:
            if not self._options.skip_unreadable:
                raise
            job.windows, job.unreadable = [], str(error)
        return job

    def _fill(self, job: _Job) -> None:
        image = job.frame.image
        if image is None:
            image = self._backend.read(job.frame.path)
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
        crops = (image[w.y1 : w.y2, w.x1 : w.x2] for w in job.windows)
        try:
            job.inputs = [
                self._backend.prepare(np.ascontiguousarray(crop), job.frame.name)
                for crop in crops
            ]
        except cv2.error as error:  # as of a side that rounds to no pixel
            raise ValueError(
                f'{job.frame.path or job.frame.name!r} of {width} x {height} pixels '
                f'cannot be brought to the size of the model: {error}'
            ) from error

    def _predict(self, batch: list[_Job]) -> None:
        """Run the next window of each job; a job that is listed twice gives two."""
        inputs = [job.inputs.pop(0) for job in batch]
        for job, found in zip(batch, self._backend.predict(inputs), strict=True):
            job.found.append(found)

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
