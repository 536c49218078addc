"""One object that predicts: any model of ours, any runtime, any source of images.

from mmbackbones.apis.inferencer import Inferencer

model = Inferencer('dfine_hgnetv2_b4_coco', 'dfine_l_coco.pth')
for result in model.predict('photos/', batch_size=8, stream=True):
    print(result.name, result.to_coco())
"""

import os
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmbackbones.apis.checkpoint import open_checkpoint
from mmbackbones.apis.named_files import find_config
from mmbackbones.inference.backends import Backend
from mmbackbones.inference.metadata import ModelInfo
from mmbackbones.inference.prediction import Prediction, PredictOptions
from mmbackbones.inference.results import Result
from mmbackbones.inference.runtimes import open_exported, runtime_of
from mmbackbones.inference.sources import open_source
from mmbackbones.inference.tiling import cut

__all__ = ['Inferencer']

_DEFAULT_CONF = 0.4
_MAX_WORKERS = 4  # decoding for one model keeps no more of them busy


class Inferencer:
    """Predicts on images with a checkpoint or an exported file.

    Preprocessing is the test pipeline of the config, or what the exported file
    states. Class names and category ids are those of the checkpoint.

    Args:
        config_or_name: path of a config, its name in `configs/` without suffix, a
            loaded config, or an exported file (`.onnx`, OpenVINO's `.xml`, `.pt2`,
            TensorRT's `.engine`).
        weights: checkpoint, ours or an official release; not with an exported file.
        device: 'cpu', 'cuda', 'cuda:1'; a GPU where there is one, by default.
        backend: 'pytorch', 'onnxruntime', 'openvino', 'tensorrt' or 'torch_export'; by
            default the file's suffix says it.

    Raises:
        ValueError: no such config or file; weights are missing, unreadable or of
            another model; the backend does not read the file, or is not installed; a
            device that is not there.
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
            self.backend = open_checkpoint(cfg, weights, device)

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
            tile: side in pixels, or (height, width), from 32 up, of the windows that
                large images are cut into; the whole image is looked at, too, for
                what no window shows whole.
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
        options = PredictOptions(
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
        results = Prediction(self.backend, options).run(images, batch_size, num_workers)
        return results if stream else list(results)

    def _checked_conf(self, conf: float | None) -> float:
        if conf is None:
            return _DEFAULT_CONF
        if self.info.task != 'detection':
            raise ValueError(f'conf is {conf}; it is for detection, leave it out')
        if not isinstance(conf, Real) or not 0 <= conf <= 1:
            raise ValueError(f'conf is {conf!r}; give a score between 0 and 1')
        return conf


def _tile_hw(tile: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if tile is None:
        return None
    sides = tuple(tile) if isinstance(tile, list | tuple) else (tile, tile)
    # True is an integer, too: of 1 pixel.
    whole = all(isinstance(s, Integral) and not isinstance(s, bool) for s in sides)
    if len(sides) != 2 or not whole:
        raise ValueError(
            f'tile is {tile!r}; give a side in pixels, or height and width'
        )
    return sides
