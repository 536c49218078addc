"""One object that predicts: any model of ours, any runtime, any source of images.

from mmbackbones.apis.inferencer import Inferencer

model = Inferencer('dfine_hgnetv2_b4_coco', 'dfine_l_coco.pth')
for result in model.predict('photos/', batch_size=8, stream=True):
    print(result.name, result.to_coco())
"""

import contextlib
import difflib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import print_log

from mmbackbones.apis.config import is_segmentor
from mmbackbones.inference.backends import Backend, TorchBackend
from mmbackbones.inference.metadata import ModelInfo
from mmbackbones.inference.prefetch import map_ahead
from mmbackbones.inference.results import NO_CLASS, Detections, LabelMap, Result
from mmbackbones.inference.runtimes import open_exported, runtime_of
from mmbackbones.inference.sources import Frame, Source, open_source
from mmbackbones.inference.tiling import Boxes, Window, cut, merge_boxes, merge_maps

__all__ = ['Inferencer', 'find_config']

_DEFAULT_CONF = 0.4
_MAX_WORKERS = 4  # decoding for one model keeps no more of them busy


def find_config(name: str) -> str:
    """Path of a config: of a file, or of one in `configs/` by its stem.

    Raises:
        ValueError: there is none, with similar names.
    """
    if name.endswith('.py'):
        if Path(name).is_file():
            return name
        raise ValueError(f'config file {name!r} does not exist; see configs/')
    folder = Path(__file__).parents[2] / 'configs'
    shipped = {path.stem: path for path in folder.glob('*.py')}
    if name in shipped:
        return str(shipped[name])
    similar = difflib.get_close_matches(name, shipped, n=3, cutoff=0.4)
    raise ValueError(
        f'{name!r} is no config file (.py), no exported file (.onnx, .xml, .engine) '
        f'and no name of a config in {str(folder)!r}'
        + (f'; similar ones are {", ".join(similar)}' if similar else '')
    )


@dataclass(frozen=True)
class _Options:
    """Of one call of `predict`."""

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


class Inferencer:
    """Predicts on images with a checkpoint or an exported file.

    Preprocessing is the test pipeline of the config, or what the exported file
    states. Class names and category ids are those of the checkpoint.

    Args:
        config_or_name: path of a config, its name in `configs/` without suffix, a
            loaded config, or an exported file (`.onnx`, OpenVINO's `.xml`,
            TensorRT's `.engine`).
        weights: checkpoint, ours or an official release; not with an exported file.
        device: 'cpu', 'cuda', 'cuda:1'; a GPU where there is one, by default.
        backend: 'pytorch', 'onnxruntime', 'openvino' or 'tensorrt'; by default the
            file's suffix says it.

    Raises:
        ValueError: no such config or file; weights are missing, unreadable or of
            another model; the backend does not read the file, or is not installed.
    """

    def __init__(
        self,
        config_or_name: str | Path | Config,
        weights: str | Path | None = None,
        device: str | None = None,
        backend: str | None = None,
    ) -> None:
        is_config = isinstance(config_or_name, Config)
        name = 'config' if is_config else str(config_or_name)
        runtime = runtime_of(name, backend)
        if runtime is not None:
            if weights is not None:
                raise ValueError(
                    f'{name!r} holds its weights; leave out {str(weights)!r}'
                )
            self.backend: Backend = open_exported(name, runtime, device)
        else:
            cfg = config_or_name if is_config else Config.fromfile(find_config(name))
            self.backend = _open_checkpoint(cfg, weights, device)

    @property
    def info(self) -> ModelInfo:
        """Task and classes of the model."""
        return self.backend.info

    def predict(
        self,
        source: Any,
        *,
        batch_size: int = 1,
        conf: float | None = None,
        classes: Sequence[str] | None = None,
        tile: int | tuple[int, int] | None = None,
        overlap: float = 0.25,
        half: bool = False,
        compile: bool = False,
        stream: bool = False,
        skip_unreadable: bool = False,
        num_workers: int | None = None,
    ) -> list[Result] | Iterator[Result]:
        """Predict on images; the next ones are read and resized while the model runs.

        Args:
            source: path, folder, glob pattern, array (BGR, as OpenCV reads), Pillow
                image, video file, index of a camera, or a list of these; see
                `open_source`.
            batch_size: images, or tiles, at once.
            conf: lowest score of a detection (0.4); not for segmentation.
            classes: names of those to keep; pixels of other classes get `NO_CLASS`.
            tile: side in pixels, or (height, width), of the windows that large images
                are cut into; the whole image is looked at, too, for what no window
                shows whole.
            overlap: least share of a tile's side that it has in common with the next;
                objects up to that size are whole in some tile.
            half: PyTorch in half precision: float16 on a GPU, bfloat16 elsewhere.
            compile: PyTorch compiles the model; from then on it stays compiled.
            stream: gives a generator, which holds a few images at a time, in place of
                a list. Needed for a camera.
            skip_unreadable: leave out images that cannot be read, and say so at the
                end; the `index` of the others stays.
            num_workers: threads that read and resize; 0 does it in turns with the
                model. By default one per processor, at most 4.

        Returns:
            `Detections` or `LabelMap` by image, in the order of the source.

        Raises:
            ValueError: a source, class or option that is none; an image that cannot
                be read (in a generator, when its turn comes).
        """
        if batch_size < 1:
            raise ValueError(f'batch_size is {batch_size}; give 1 or more')
        options = _Options(
            conf=self._checked_conf(conf),
            labels=self.info.labels_of(classes),
            tile_hw=_tile_hw(tile),
            overlap=overlap,
            keep_images=stream,
            skip_unreadable=skip_unreadable,
        )
        if options.tile_hw is not None:
            cut((1, 1), options.tile_hw, overlap)  # a wrong value shows here, at once
        self.backend.set_options(half=half, compile=compile)
        images = open_source(source)
        if images.endless and not stream:
            raise ValueError('a camera never ends; call predict with stream=True')
        if num_workers is None:
            num_workers = min(_MAX_WORKERS, os.cpu_count() or 1)
        if images.num_frames == 1:
            num_workers = 0  # nothing to be ahead of
        results = self._run(images, batch_size, num_workers, options)
        return results if stream else list(results)

    def _checked_conf(self, conf: float | None) -> float:
        if conf is None:
            return _DEFAULT_CONF
        if self.info.task != 'detection':
            raise ValueError(f'conf is {conf}; it is for detection, leave it out')
        if not 0 <= conf <= 1:
            raise ValueError(f'conf is {conf}; give a score between 0 and 1')
        return conf

    def _run(
        self, images: Source, batch_size: int, num_workers: int, options: _Options
    ) -> Iterator[Result]:
        waiting: deque[_Job] = deque()
        batch: list[_Job] = []  # whose next window is in the batch; twice if two are
        unreadable: list[str] = []

        def finished() -> Iterator[Result]:
            while waiting and len(waiting[0].found) == len(waiting[0].windows):
                job = waiting.popleft()
                if job.unreadable:
                    unreadable.append(job.unreadable)
                else:
                    yield self._result(job, options)

        jobs = map_ahead(
            partial(self._prepare, options=options),
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

    def _prepare(self, item: tuple[int, Frame], options: _Options) -> _Job:
        """Read an image and make its windows inputs; called in threads."""
        job = _Job(*item)
        image = job.frame.image
        if image is None:
            try:
                image = self.backend.read(job.frame.path)
            except ValueError as error:
                if not options.skip_unreadable:
                    raise
                job.unreadable = str(error)
                return job
        if options.keep_images or job.frame.path is None:
            job.image = image
        job.shape_hw = height, width = image.shape[:2]
        job.windows = [Window(0, 0, width, height)]
        if options.tile_hw is not None:
            tiles = cut((height, width), options.tile_hw, options.overlap)
            if self.info.task == 'segmentation':  # every pixel is in some tile
                job.windows = tiles
            elif len(tiles) > 1:
                job.windows += tiles
        job.inputs = [
            self.backend.prepare(
                np.ascontiguousarray(image[w.y1 : w.y2, w.x1 : w.x2]), job.frame.name
            )
            for w in job.windows
        ]
        return job

    def _predict(self, batch: list[_Job]) -> None:
        """Run the next window of each job; a job that is listed twice gives two."""
        inputs = [job.inputs.pop(0) for job in batch]
        for job, found in zip(batch, self.backend.predict(inputs), strict=True):
            job.found.append(found)

    def _result(self, job: _Job, options: _Options) -> Result:
        common = dict(
            info=self.info,
            index=job.index,
            name=job.frame.name,
            path=job.frame.path,
            shape_hw=job.shape_hw,
            held_image=job.image,
        )
        if self.info.task == 'segmentation':
            labels = merge_maps(job.found, job.windows, job.shape_hw)
            if options.labels is not None:
                labels[~np.isin(labels, options.labels)] = NO_CLASS
            return LabelMap(labels=labels, **common)
        found = [
            _kept(boxes, window, options)
            for boxes, window in zip(job.found, job.windows, strict=True)
        ]
        boxes = found[0]
        if len(found) > 1:
            boxes = merge_boxes(found, job.windows, job.shape_hw)
        return Detections(**boxes._asdict(), **common)


def _kept(boxes: Boxes, window: Window, options: _Options) -> Boxes:
    """The wanted boxes of a window, in pixels of the whole image."""
    keep = boxes.scores >= options.conf
    if options.labels is not None:
        keep &= np.isin(boxes.labels, options.labels)
    shift = np.array([window.x1, window.y1] * 2, np.float32)
    return boxes._replace(xyxy=boxes.xyxy + shift).pick(keep)


def _tile_hw(tile: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if tile is None or isinstance(tile, int):
        return None if tile is None else (tile, tile)
    if len(tile) != 2:
        raise ValueError(f'tile is {tile}; give a side, or height and width')
    return tuple(tile)


def _open_checkpoint(
    cfg: Config, weights: str | Path | None, device: str | torch.device | None
) -> TorchBackend:
    """Build the model of a config and load it."""
    if weights is None:
        raise ValueError('a config needs weights; give a checkpoint as second argument')
    if is_segmentor(cfg):
        from mmbackbones.apis.segmentation import build_segmentor as build

        task = 'segmentation'
    else:
        from mmbackbones.apis.detection import build_detector as build

        task = 'detection'
    model = build(cfg, str(weights), device)
    info = ModelInfo.from_dataset_meta(task, model.dataset_meta)
    return TorchBackend(model, cfg.test_dataloader.dataset.pipeline, info)
