"""What single entries of a COCO file have to be, and what its boxes must not be."""

import math
from typing import Any

import numpy as np

__all__ = ['check_id', 'check_image', 'clamp_box', 'is_clipped', 'mistaken_boxes']

_EDGE = 1.0  # pixels that a box may reach beyond its image by rounding
_FEW = 10  # boxes that are too few to tell a mistake from chance
_SHARE_BEYOND = 0.2  # of boxes beyond their image, more than sloppy drawing gives


def check_id(entry: dict, key: str, file: str) -> None:
    """An id is a number or a text.

    Raises:
        ValueError: it is a list or a dictionary.
    """
    if isinstance(entry[key], (list, dict)):
        raise ValueError(f'{file} has an entry whose {key} is {entry[key]!r}: {entry}')


def check_image(image: dict, file: str) -> None:
    """What an annotation file says about an image is of the right kind.

    Raises:
        ValueError: it is not.
    """
    check_id(image, 'id', file)
    sides = image['width'], image['height']
    if not all(isinstance(side, (int, float)) and side > 0 for side in sides):
        raise ValueError(
            f'{file} gives the image {image["file_name"]!r} (id {image["id"]}) the '
            f'width {sides[0]!r} and the height {sides[1]!r}; they are numbers above 0'
        )
    if not isinstance(image['file_name'], str):
        raise ValueError(
            f'{file} gives the image with id {image["id"]} the file_name '
            f'{image["file_name"]!r}; it is a text'
        )


def clamp_box(bbox: Any, width: int, height: int) -> tuple[list[float], str]:
    """An xywh box as xyxy within the image, and why it is unusable, '' if it is not."""
    numbers = _four_numbers(bbox)
    if numbers is None:
        return [], 'not four numbers'
    x, y, w, h = numbers
    if not all(map(math.isfinite, numbers)):
        return [], 'NaN or infinite'
    if w < 0 or h < 0:
        return [], 'inverted'
    if w == 0 or h == 0:
        return [], 'zero-area'
    box = [max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)]
    return box, '' if box[0] < box[2] and box[1] < box[3] else 'outside the image'


def is_clipped(bbox: Any, box: list[float]) -> bool:
    """Whether `clamp_box` made `box` smaller than `bbox` by more than rounding."""
    x, y, w, h = map(float, bbox)
    whole = x, y, x + w, y + h
    return any(abs(a - b) > _EDGE for a, b in zip(whole, box, strict=True))


def mistaken_boxes(coco: dict) -> str:
    """In what other convention the boxes of a file seem to be, '' for none.

    Few boxes tell nothing; and a mistake is told only where nearly all boxes have it,
    since boxes that are right may look like it here and there.

    Args:
        coco: content of the file, with ids that were checked.
    """
    sizes = {image['id']: (image['width'], image['height']) for image in coco['images']}
    rows = [
        (*numbers, *sizes[annotation['image_id']])
        for annotation in coco['annotations']
        if annotation['image_id'] in sizes
        and not annotation.get('iscrowd')
        and (numbers := _four_numbers(annotation['bbox'])) is not None
    ]
    if len(rows) < _FEW:
        return ''
    x, y, w, h, width, height = np.array(rows, np.float64).T
    total = len(rows)
    of_one = (np.maximum(x + w, y + h) <= 1 + 1e-3) & (np.minimum(w, h) > 0)
    if of_one.mean() > 0.9:
        return (
            f'{of_one.sum()} of {total} boxes lie between 0 and 1, as if they were '
            'shares of the image'
        )
    beyond = (x + w > width + _EDGE) | (y + h > height + _EDGE)
    as_corners = (w > x) & (h > y) & (w <= width + _EDGE) & (h <= height + _EDGE)
    if beyond.mean() > _SHARE_BEYOND and as_corners.mean() > 0.99:
        return (
            f'{beyond.sum()} of {total} boxes reach beyond their image, and '
            f'{as_corners.sum()} would be right as [x1, y1, x2, y2]'
        )
    return ''


def _four_numbers(bbox: Any) -> tuple[float, ...] | None:
    try:
        x, y, w, h = (float(value) for value in bbox)
    except (TypeError, ValueError):
        return None
    return x, y, w, h
