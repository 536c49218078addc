"""What runs a model: PyTorch, ONNX Runtime, OpenVINO, TensorRT, behind one face.

`prepare` makes an image the input of the model and may be called from threads;
`predict` runs prepared images and gives `Boxes`, or a map of labels, in pixels of the
images that were prepared.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from PIL import Image
from torch import nn

from mmbackbones.inference.metadata import ExportInfo, ModelInfo
from mmbackbones.inference.sources import read_image
from mmbackbones.inference.tiling import Boxes

__all__ = ['Backend', 'ExportedBackend', 'Session', 'TorchBackend', 'resize_as_stated']


class Backend(Protocol):
    """A model that is ready to predict.

    Attributes:
        info: its task and classes.
        name: of the runtime.
    """

    info: ModelInfo
    name: str

    def read(self, path: str) -> np.ndarray:
        """An image file as `(H, W, 3)` uint8 BGR."""

    def prepare(self, image: np.ndarray, name: str) -> Any:
        """The input of one image, from `(H, W, 3)` uint8 BGR."""

    def predict(self, inputs: Sequence[Any]) -> list[Boxes] | list[np.ndarray]:
        """What is in prepared images."""

    def set_options(self, *, half: bool, compile: bool) -> None:
        """How the next `predict` runs."""


class TorchBackend:
    """A model of mmdet or mmseg with the test pipeline of its config.

    Args:
        model: in evaluation mode on its device.
        pipeline: `test_dataloader.dataset.pipeline` of the config. Steps that load
            annotations are left out. The step that loads the image is kept for files
            if it has settings of its own; else images are read by `LoadImage`, as our
            data sets do.
        info: of the model.

    Raises:
        ValueError: the pipeline has no step that loads an image.
    """

    name = 'pytorch'

    def __init__(
        self, model: nn.Module, pipeline: Sequence[ConfigDict], info: ModelInfo
    ) -> None:
        steps = Compose(
            [step for step in pipeline if not _loads(step, 'Annotations', 'LabelMap')]
        ).transforms
        loaders = [step for step in steps if _loads(step, 'Image')]
        if len(loaders) != 1 or steps[0] is not loaders[0]:
            raise ValueError(
                'test_dataloader.dataset.pipeline has to begin with the one step that '
                f'loads the image; it is {[type(step).__name__ for step in steps]}'
            )
        self.info = info
        self.model = model
        self._loader = loaders[0]
        self._transforms = Compose(steps[1:])
        self._half = self._is_compiled = False

    def read(self, path: str) -> np.ndarray:
        """An image file as `(H, W, 3)` uint8 BGR."""
        loader = self._loader
        own_settings = type(loader) is LoadImageFromFile and (
            vars(loader) != vars(LoadImageFromFile())
        )
        return loader(dict(img_path=path))['img'] if own_settings else read_image(path)

    def prepare(self, image: np.ndarray, name: str) -> dict:
        """A packed sample: input tensor and what leads back to the image."""
        shape = image.shape[:2]
        return self._transforms(
            dict(img=image, img_shape=shape, ori_shape=shape, img_path=name, img_id=0)
        )

    def set_options(self, *, half: bool, compile: bool) -> None:
        """Half precision is float16 on a GPU, bfloat16 elsewhere; compiled stays so."""
        self._half = half
        if compile and not self._is_compiled:
            for name, part in self.model.named_children():
                if name != 'data_preprocessor':
                    part.compile()
            self._is_compiled = True

    @torch.no_grad()
    def predict(self, inputs: Sequence[dict]) -> list[Boxes] | list[np.ndarray]:
        """What `test_step` of the model finds."""
        found: list = [None] * len(inputs)
        for group in _by_shape(inputs):
            with self._precision():
                samples = self.model.test_step(
                    pseudo_collate([inputs[i] for i in group])
                )
            for i, sample in zip(group, samples, strict=True):
                found[i] = self._unpack(sample)
        return found

    def _precision(self) -> contextlib.AbstractContextManager:
        if not self._half:
            return contextlib.nullcontext()
        device = next(self.model.parameters()).device.type
        return torch.autocast(
            device, torch.bfloat16 if device == 'cpu' else torch.float16
        )

    def _unpack(self, sample: Any) -> Boxes | np.ndarray:
        if self.info.task == 'segmentation':
            return sample.pred_sem_seg.data[0].cpu().numpy().astype(np.int32)
        found = sample.pred_instances.cpu()
        return Boxes(
            found.bboxes.float().numpy(),
            found.scores.float().numpy(),
            found.labels.numpy(),
        )


def _loads(step: Any, *what: str) -> bool:
    """Whether a step of a pipeline, or its config, is a loader of these things."""
    kind = step['type'] if isinstance(step, dict) else type(step)
    name = kind if isinstance(kind, str) else kind.__name__
    name = name.rpartition('.')[2]
    return name.startswith('Load') and any(part in name for part in what)


def _by_shape(inputs: Sequence[dict]) -> Iterator[list[int]]:
    """Positions of samples of one size; mmseg takes no others together."""
    groups: dict[tuple, list[int]] = {}
    for i, packed in enumerate(inputs):
        groups.setdefault(tuple(packed['inputs'].shape), []).append(i)
    yield from groups.values()


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

    def read(self, path: str) -> np.ndarray:
        """An image file as `(H, W, 3)` uint8 BGR."""
        return read_image(path)

    def prepare(
        self, image: np.ndarray, name: str
    ) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
        """Input `(3, H, W)` RGB in [0, 1], size of the image in it, and of itself."""
        resized, inner_hw = resize_as_stated(image, self.info)
        rgb = np.ascontiguousarray(resized[..., ::-1].transpose(2, 0, 1))
        return rgb.astype(np.float32) / 255, inner_hw, image.shape[:2]

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

    def predict(self, inputs: Sequence[tuple]) -> list[Boxes] | list[np.ndarray]:
        """What the graph finds, led back to the images.

        Raises:
            ValueError: more images than a file of a fixed batch takes.
        """
        images, inner, outer = zip(*inputs, strict=True)
        batch, fixed = np.stack(images), self._session.fixed_batch
        if fixed is not None and len(batch) > fixed:
            raise ValueError(
                f'batch_size is {len(batch)}, but the file takes {fixed}; lower it, or '
                'export with a dynamic batch'
            )
        if fixed is not None and len(batch) < fixed:
            rest = np.zeros((fixed - len(batch), *batch.shape[1:]), batch.dtype)
            batch = np.concatenate((batch, rest))
        outputs = self._session.run(batch)
        lead_back = self._map if self.info.task == 'segmentation' else self._boxes
        return [lead_back(outputs, i, inner[i], outer[i]) for i in range(len(inputs))]

    @staticmethod
    def _boxes(outputs: dict, i: int, inner: tuple, outer: tuple) -> Boxes:
        scale = np.array([outer[1] / inner[1], outer[0] / inner[0]] * 2, np.float32)
        return Boxes(
            outputs['boxes'][i].astype(np.float32) * scale,
            outputs['scores'][i].astype(np.float32),
            outputs['labels'][i].astype(np.int64),
        )

    @staticmethod
    def _map(outputs: dict, i: int, inner: tuple, outer: tuple) -> np.ndarray:
        labels = outputs['labels'][i][: inner[0], : inner[1]].astype(np.int32)
        return cv2.resize(labels, outer[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


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
    if inner == (height, width):
        return resized, inner
    # What the graph turns into zeros, as the preprocessors of mmdet and mmseg pad.
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = np.round(info.mean[::-1]).astype(np.uint8)
    canvas[: inner[0], : inner[1]] = resized
    return canvas, inner
