"""Label maps drawn over their images.

Upstream: https://github.com/open-mmlab/mmsegmentation
mmseg/visualization/local_visualizer.py, engine/hooks/visualization_hook.py
(Apache-2.0).
Departs from the source:
- names stand where a region is widest, and are found in a tenth of the time;
- what is ignored shows the image, not black;
- pictures of a test go to a folder that is named, under the names of the images.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import mmcv
import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer

from mmbackbones.registry import HOOKS

__all__ = ['SegPictureHook', 'SegVisualizer', 'draw_label_map']

_MIN_SHARE = 0.004  # of the image, for a region that is named


def draw_label_map(
    image: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    *,
    alpha: float = 0.6,
    with_names: bool = True,
) -> np.ndarray:
    """Colour what belongs to a class.

    Args:
        image: `(H, W, 3)` uint8 RGB.
        labels: `(H, W)` integers; those without a class stay uncoloured.
        classes: names by label.
        palette: RGB by label.
        alpha: weight of the colours against the image.
        with_names: whether to write names on regions that are large enough.

    Returns:
        A new picture, `(H, W, 3)` uint8.
    """
    picture = image.copy()
    known = (labels >= 0) & (labels < len(classes))
    colours = np.asarray(palette, np.float32)[labels[known]]
    picture[known] = (image[known] * (1 - alpha) + colours * alpha).round()
    if with_names:
        for label in np.unique(labels[known]).tolist():
            region = labels == label
            if region.mean() >= _MIN_SHARE:
                _write(picture, classes[label].strip(), _widest_point(region))
    return picture


def _widest_point(region: np.ndarray) -> tuple[int, int]:
    """Column and row of the pixel that is farthest from the region's edge."""
    framed = np.pad(region, 1).astype(np.uint8)
    distance = cv2.distanceTransform(framed, cv2.DIST_L2, 3)
    row, column = np.unravel_index(distance.argmax(), distance.shape)
    return int(column) - 1, int(row) - 1


def _write(picture: np.ndarray, text: str, centre: tuple[int, int]) -> None:
    """White letters with a dark rim around `centre`, within the picture."""
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, max(min(picture.shape[:2]) / 900, 0.35)
    (width, height), _ = cv2.getTextSize(text, font, scale, 1)
    left = min(max(centre[0] - width // 2, 0), max(picture.shape[1] - width, 0))
    bottom = min(max(centre[1] + height // 2, height), picture.shape[0] - 1)
    # Shifted copies: a thicker line would be a wider text with some fonts.
    for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)):
        colour = (0, 0, 0) if dx or dy else (255, 255, 255)
        place = (left + dx, bottom + dy)
        cv2.putText(picture, text, place, font, scale, colour, 1, cv2.LINE_AA)


class SegVisualizer(SegLocalVisualizer):
    """mmseg's visualizer with the drawing above; `alpha` is the weight of colours."""

    def _draw_sem_seg(
        self,
        image: np.ndarray,
        sem_seg: PixelData,
        classes: Sequence[str],
        palette: Sequence[Sequence[int]],
        with_labels: bool = True,
    ) -> np.ndarray:
        picture = draw_label_map(
            image,
            sem_seg.cpu().numpy().data[0],
            classes,
            palette,
            alpha=self.alpha,
            with_names=with_labels,
        )
        self._picture = picture
        return picture

    def get_image(self) -> np.ndarray:
        """The last drawing, `(H, W, 3)` uint8 RGB."""
        return self._picture


@HOOKS.register_module()
class SegPictureHook(Hook):
    """Writes ground truth (left) and prediction (right) of every tested image.

    Fires after each step of a test, not of a validation. Reads the image from its
    file; draws with the visualizer of the run. Keeps no state.

    Args:
        draw: whether to do anything.
        test_out_dir: folder for the pictures.

    Raises:
        ValueError: `draw` without a folder.
    """

    def __init__(self, draw: bool = False, test_out_dir: str | None = None) -> None:
        if draw and not test_out_dir:
            raise ValueError('draw is True but test_out_dir is not set')
        self.draw = draw
        self.test_out_dir = test_out_dir

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: Sequence[SegDataSample] | None = None,
    ) -> None:
        """Draw the images of a step."""
        if not self.draw:
            return
        for sample in outputs:
            name = Path(sample.img_path).name
            runner.visualizer.add_datasample(
                name,
                mmcv.imread(sample.img_path, channel_order='rgb'),
                sample,
                out_file=str(Path(self.test_out_dir, name)),
            )
