"""Classes of the pixels of one image, and the forms in which others take them."""

import base64
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmbackbones.inference.result import Result, need_package, write_picture

__all__ = ['NO_CLASS', 'LabelMap']

NO_CLASS = -1
"""Label of a pixel that none of the wanted classes has."""


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
        supervision = need_package('supervision')
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
        return need_package('pandas').DataFrame(
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
        write_picture(path, self.id_map())


def _extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of what is True; the last two are one beyond."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
