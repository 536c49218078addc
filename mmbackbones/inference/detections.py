"""Boxes of one image, and the forms in which others take them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmbackbones.inference.drawing import draw_boxes
from mmbackbones.inference.result import Result, need_package

__all__ = ['Detections']


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
        return need_package('supervision').Detections(
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

        Boxes are clipped to the image, and within it as they are written, too; one
        that lies outside of it has no line.

        Args:
            with_scores: whether a line ends with the score.
        """
        height, width = self.shape_hw
        boxes = self.clipped_xyxy / np.array((width, height, width, height), float)
        # Even millionths: centre and size have six digits, and are not rounded apart.
        boxes = 2 * np.round(boxes / 2, 6)
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
        return need_package('pandas').DataFrame(
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
