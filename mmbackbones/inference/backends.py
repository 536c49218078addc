"""What runs a model, behind one face; here PyTorch, the files in `exported`.

`prepare` makes an image the input of the model and may be called from threads;
`predict` runs prepared images and gives `Boxes`, or a map of labels, in pixels of the
images that were prepared.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from torch import nn

from mmbackbones.inference.metadata import ModelInfo
from mmbackbones.inference.sources import read_image
from mmbackbones.inference.tiling import Boxes

__all__ = ['Backend', 'TorchBackend']


class Backend(Protocol):
    """A model that is ready to predict.

    Attributes:
        info: its task and classes.
        name: of the runtime.
        max_batch: inputs that it takes at once, or None for any number.
    """

    info: ModelInfo
    name: str
    max_batch: int | None

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
    max_batch = None

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
