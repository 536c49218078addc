"""What the results of all tasks have in common."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np

from mmbackbones.inference.drawing import hue_palette
from mmbackbones.inference.metadata import ModelInfo
from mmbackbones.inference.sources import read_image

__all__ = ['Result', 'need_package', 'write_picture']

_LABELME_VERSION = '5.5.0'  # the first with all the fields that are written


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the results of both tasks have in common.

    Attributes:
        info: names and ids of the classes.
        index: of the image in its source, from 0; `image_id` in COCO's form.
        name: file name of the image; a numbered one where there is no file.
        path: of the file, or None.
        shape_hw: of the image in pixels.
        held_image: the pixels, where they are kept in memory.
    """

    FORMATS: ClassVar[dict[str, str]] = {}

    info: ModelInfo
    index: int
    name: str
    path: str | None
    shape_hw: tuple[int, int]
    held_image: np.ndarray | None = None

    @property
    def image(self) -> np.ndarray:
        """`(H, W, 3)` uint8 BGR, as OpenCV has it; read again where it was not kept."""
        return self.held_image if self.held_image is not None else read_image(self.path)

    @property
    def _palette(self) -> Sequence[Sequence[int]]:
        return self.info.palette or hue_palette(len(self.info.classes))

    def save(self, path: str | Path, *, format: str | None = None) -> None:
        """Write the result to a file.

        Args:
            path: of the file; folders are made.
            format: a key of `FORMATS`; by default the first with the file's suffix.

        Raises:
            ValueError: neither names a format; the file cannot be written.
        """
        path = Path(path)
        if format is None:
            suffix = path.suffix.lower()
            fits = (f for f, s in self.FORMATS.items() if suffix in s.split())
            format = next(fits, None)
        if format not in self.FORMATS:
            what = (
                'its suffix says no format'
                if format is None
                else f'format is {format!r}'
            )
            raise ValueError(
                f'{str(path)!r} cannot be saved, {what}; choose one of '
                + ', '.join(f'{f} ({s})' for f, s in self.FORMATS.items())
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            getattr(self, f'_save_{format}')(path)
        except (OSError, cv2.error) as error:
            raise ValueError(f'{str(path)!r} cannot be written: {error}') from error

    def _save_picture(self, path: Path) -> None:
        write_picture(path, self.plot())

    def _save_coco(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_coco()))

    def _save_labelme(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_labelme(), indent=2))

    def _save_csv(self, path: Path) -> None:
        self.to_dataframe().to_csv(path, index=False)

    def _labelme(self, shapes: list[dict]) -> dict:
        height, width = self.shape_hw
        return dict(
            version=_LABELME_VERSION,
            flags={},
            shapes=shapes,
            imagePath=self.name,
            imageData=None,
            imageHeight=height,
            imageWidth=width,
        )


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write an image by its suffix.

    Raises:
        OSError: it cannot be written.
    """
    if not cv2.haveImageWriter(str(path)):
        raise OSError(
            f'no pictures end in {path.suffix!r}; take .jpg, .jpeg, .png, .bmp or .webp'
        )
    if not cv2.imwrite(str(path), picture):
        raise OSError('OpenCV refuses')


def need_package(package: str) -> Any:
    """Import an optional package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(f'this needs {package}: pip install {package}') from error
