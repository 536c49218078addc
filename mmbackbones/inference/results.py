"""What was predicted on one image, and the forms in which others take it."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np

from mmbackbones.inference.drawing import draw_boxes, hue_palette
from mmbackbones.inference.metadata import ModelInfo
from mmbackbones.inference.sources import read_image

__all__ = ['NO_CLASS', 'Detections', 'LabelMap', 'Result']

NO_CLASS = -1
"""Label of a pixel that none of the wanted classes has."""

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
            fits = (f for f, s in self.FORMATS.items() if path.suffix.lower() in s)
            format = next(fits, None)
        if format not in self.FORMATS:
            raise ValueError(
                f'{str(path)!r} cannot be saved in format {format!r}; choose one of '
                + ', '.join(f'{f} ({s.split()[0]})' for f, s in self.FORMATS.items())
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            getattr(self, f'_save_{format}')(path)
        except (OSError, cv2.error) as error:
            raise ValueError(f'{str(path)!r} cannot be written: {error}') from error

    def _save_picture(self, path: Path) -> None:
        _write_picture(path, self.plot())

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


@dataclass(frozen=True, kw_only=True)
class Detections(Result):
    """Boxes of one image, best first.

    Attributes:
        xyxy: `(K, 4)` float32 in pixels of the image, not clipped to it.
        scores: `(K,)` float32 in [0, 1].
        labels: `(K,)` int64, an index into `info.classes`.
    """

    FORMATS = dict(
        picture='.jpg .jpeg .png .bmp .webp',
        coco='.json',
        labelme='.json',
        yolo='.txt',
        csv='.csv',
    )

    xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """Number of boxes."""
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """Class names by box."""
        return [self.info.classes[label] for label in self.labels]

    @property
    def category_ids(self) -> list[int]:
        """Ids of the training data by box."""
        return [self.info.category_ids[label] for label in self.labels]

    @property
    def clipped_xyxy(self) -> np.ndarray:
        """`xyxy` within the image."""
        height, width = self.shape_hw
        return self.xyxy.clip(0, np.array((width, height, width, height), np.float32))

    def to_coco(self, image_id: int | None = None) -> list[dict]:
        """COCO results: boxes as x, y, width, height in pixels; original category ids.

        Args:
            image_id: of the annotation file; by default `index`.
        """
        return [
            dict(
                image_id=self.index if image_id is None else image_id,
                file_name=self.name,
                category_id=category,
                category_name=name,
                bbox=[x1, y1, x2 - x1, y2 - y1],
                score=score,
            )
            for (x1, y1, x2, y2), score, category, name in zip(
                self.xyxy.tolist(),
                self.scores.tolist(),
                self.category_ids,
                self.names,
                strict=True,
            )
        ]

    def to_supervision(self) -> Any:
        """`supervision.Detections`, class names under `data['class_name']`.

        Raises:
            ValueError: the package is missing.
        """
        return _need('supervision').Detections(
            xyxy=self.xyxy,
            confidence=self.scores,
            class_id=self.labels,
            data=dict(class_name=np.array(self.names, dtype=str)),
        )

    def to_labelme(self) -> dict:
        """Content of a labelme file of rectangles, clipped to the image."""
        return self._labelme(
            [
                dict(
                    label=name,
                    points=[[x1, y1], [x2, y2]],
                    group_id=None,
                    description='',
                    shape_type='rectangle',
                    flags={},
                    score=score,
                )
                for (x1, y1, x2, y2), name, score in zip(
                    self.clipped_xyxy.tolist(),
                    self.names,
                    self.scores.tolist(),
                    strict=True,
                )
            ]
        )

    def to_yolo(self, *, with_scores: bool = False) -> str:
        """Lines `label cx cy w h`, fractions of the image; labels count from 0.

        Boxes are clipped to the image; one that lies outside of it has no line.

        Args:
            with_scores: whether a line ends with the score.
        """
        height, width = self.shape_hw
        boxes = self.clipped_xyxy / (width, height, width, height)
        lines = []
        for (x1, y1, x2, y2), label, score in zip(
            boxes.tolist(), self.labels.tolist(), self.scores.tolist(), strict=True
        ):
            if x1 < x2 and y1 < y2:
                numbers = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
                numbers += [score] * with_scores
                lines.append(' '.join([str(label), *(f'{n:.6f}' for n in numbers)]))
        return ''.join(f'{line}\n' for line in lines)

    def to_dataframe(self) -> Any:
        """`pandas.DataFrame`, a row per box.

        Raises:
            ValueError: pandas is missing.
        """
        table = dict(zip(('x1', 'y1', 'x2', 'y2'), self.xyxy.T, strict=True))
        return _need('pandas').DataFrame(
            dict(
                image_id=self.index,
                file_name=self.name,
                **table,
                score=self.scores,
                label=self.labels,
                category_id=self.category_ids,
                category_name=self.names,
            )
        )

    def plot(self) -> np.ndarray:
        """The image with boxes, names and scores, `(H, W, 3)` uint8 BGR."""
        return draw_boxes(
            self.image,
            self.xyxy,
            self.labels,
            [f'{n} {s:.2f}' for n, s in zip(self.names, self.scores, strict=True)],
            self._palette,
        )

    def _save_yolo(self, path: Path) -> None:
        path.write_text(self.to_yolo())


@dataclass(frozen=True, kw_only=True)
class LabelMap(Result):
    """Classes of the pixels of one image.

    Attributes:
        labels: `(H, W)` integers, an index into `info.classes`, or `NO_CLASS`.
    """

    FORMATS = dict(
        picture='.jpg .jpeg .png .bmp .webp',
        id_map='.png',
        coco='.json',
        labelme='.json',
        csv='.csv',
    )

    labels: np.ndarray

    @cached_property
    def present(self) -> list[int]:
        """Labels that occur, rising."""
        return [label for label in np.unique(self.labels).tolist() if label != NO_CLASS]

    def id_map(self) -> np.ndarray:
        """`(H, W)` ids of the training data's label maps, uint8 or uint16.

        A pixel without a class has an id that no class has: 0, else 255, else 65535.
        """
        ids = [*self.info.category_ids]
        void = next(i for i in (0, 255, 65535) if i not in ids)
        # `NO_CLASS` is -1: it picks the last entry.
        table = np.array([*ids, void if (self.labels == NO_CLASS).any() else ids[0]])
        table = table.astype(np.uint8 if table.max() < 256 else np.uint16)
        return table[self.labels]

    def to_coco(self, image_id: int | None = None) -> list[dict]:
        """COCO stuff results: per class that occurs, its pixels run-length encoded.

        Args:
            image_id: of the annotation file; by default `index`.
        """
        from pycocotools import mask as coco_mask

        entries = []
        for label in self.present:
            rle = coco_mask.encode(np.asfortranarray(self.labels == label, np.uint8))
            entries.append(
                dict(
                    image_id=self.index if image_id is None else image_id,
                    file_name=self.name,
                    category_id=self.info.category_ids[label],
                    category_name=self.info.classes[label],
                    segmentation=dict(size=rle['size'], counts=rle['counts'].decode()),
                    area=int(coco_mask.area(rle)),
                    bbox=coco_mask.toBbox(rle).tolist(),
                )
            )
        return entries

    def to_supervision(self) -> Any:
        """`supervision.Detections` with a mask per class that occurs.

        Raises:
            ValueError: the package is missing.
        """
        supervision = _need('supervision')
        if not self.present:
            return supervision.Detections.empty()
        masks = np.stack([self.labels == label for label in self.present])
        return supervision.Detections(
            xyxy=np.array([_extent(mask) for mask in masks], np.float32),
            mask=masks,
            class_id=np.array(self.present),
            data=dict(
                class_name=np.array([self.info.classes[i] for i in self.present])
            ),
        )

    def to_labelme(self) -> dict:
        """Content of a labelme file with a mask per class that occurs.

        Masks, not polygons: these would lose the holes.
        """
        shapes = []
        for label in self.present:
            mask = self.labels == label
            x1, y1, x2, y2 = _extent(mask)
            _, png = cv2.imencode('.png', mask[y1:y2, x1:x2].astype(np.uint8))
            shapes.append(
                dict(
                    label=self.info.classes[label],
                    points=[[x1, y1], [x2 - 1, y2 - 1]],  # labelme counts both ends
                    group_id=None,
                    description='',
                    shape_type='mask',
                    flags={},
                    mask=base64.b64encode(png).decode(),
                )
            )
        return self._labelme(shapes)

    def to_yolo(self) -> str:
        """There is no such form of a label map.

        Raises:
            ValueError: always, with what to use.
        """
        raise ValueError(
            'YOLO labels are objects with one outline each; a label map has none. Use '
            'id_map(), to_coco() or to_labelme()'
        )

    def to_dataframe(self) -> Any:
        """`pandas.DataFrame`, a row per class that occurs, with its area.

        Raises:
            ValueError: pandas is missing.
        """
        pixels = [int((self.labels == label).sum()) for label in self.present]
        return _need('pandas').DataFrame(
            dict(
                image_id=self.index,
                file_name=self.name,
                label=self.present,
                category_id=[self.info.category_ids[i] for i in self.present],
                category_name=[self.info.classes[i] for i in self.present],
                pixels=pixels,
                share=[count / self.labels.size for count in pixels],
            )
        )

    def plot(self) -> np.ndarray:
        """The image coloured by class, with names, `(H, W, 3)` uint8 BGR."""
        from mmbackbones.evaluation.seg_pictures import draw_label_map

        rgb = self.image[..., ::-1]
        drawn = draw_label_map(rgb, self.labels, self.info.classes, self._palette)
        return np.ascontiguousarray(drawn[..., ::-1])

    def _save_id_map(self, path: Path) -> None:
        _write_picture(path, self.id_map())


def _write_picture(path: Path, picture: np.ndarray) -> None:
    if not cv2.imwrite(str(path), picture):
        raise OSError('OpenCV refuses')


def _extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of what is True; the last two are one beyond."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _need(package: str) -> Any:
    try:
        return __import__(package)
    except ModuleNotFoundError as error:
        raise ValueError(f'this needs {package}: pip install {package}') from error
