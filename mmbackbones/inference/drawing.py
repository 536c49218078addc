"""Boxes on images, in about a millisecond: videos are drawn as they run."""

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np

__all__ = ['draw_boxes', 'hue_palette']

_GOLDEN = 0.618034  # turns of the colour circle: neighbours differ, none repeats


def draw_boxes(
    image: np.ndarray,
    xyxy: np.ndarray,
    labels: np.ndarray,
    texts: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> np.ndarray:
    """Draw boxes with their captions, the best, which come first, on top.

    Args:
        image: `(H, W, 3)` uint8 BGR; it is not changed.
        xyxy: `(K, 4)` pixels.
        labels: `(K,)`, which choose the colours.
        texts: one per box.
        palette: RGB by label.

    Returns:
        A new picture, `(H, W, 3)` uint8 BGR.
    """
    picture = np.ascontiguousarray(image).copy()
    thickness = max(1, round(min(picture.shape[:2]) / 300))
    limit = 2 * max(picture.shape[:2])  # far beyond, OpenCV's integers overflow
    corners = np.nan_to_num(xyxy).clip(-limit, limit).round().astype(int)
    for i in reversed(range(len(texts))):
        x1, y1, x2, y2 = corners[i].tolist()
        colour = tuple(palette[labels[i]])[::-1]
        cv2.rectangle(picture, (x1, y1), (x2, y2), colour, thickness)
        _caption(picture, texts[i], (x1, y1), colour)
    return picture


def hue_palette(num_classes: int) -> list[tuple[int, ...]]:
    """RGB by label: hues that are far apart for neighbouring labels."""
    hues = [colorsys.hsv_to_rgb(i * _GOLDEN % 1, 0.8, 0.95) for i in range(num_classes)]
    return [tuple(round(255 * part) for part in colour) for colour in hues]


def _caption(
    picture: np.ndarray, text: str, corner: tuple[int, int], colour: tuple[int, ...]
) -> None:
    """Text on a plate of the box's colour: above the corner, or within the image."""
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, min(picture.shape[:2]) / 1000
    scale = min(max(scale, 0.35), 0.7)  # many objects share a large image
    (width, height), descent = cv2.getTextSize(text, font, scale, 1)
    left = min(max(corner[0], 0), max(picture.shape[1] - width, 0))
    bottom = max(corner[1] - descent, height)
    plate = ((left, bottom - height), (left + width, bottom + descent))
    cv2.rectangle(picture, *plate, colour, cv2.FILLED)
    ink = (0, 0, 0) if sum(colour) > 380 else (255, 255, 255)
    cv2.putText(picture, text, (left, bottom), font, scale, ink, 1, cv2.LINE_AA)
