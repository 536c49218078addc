"""Cutting large images into overlapping windows and joining what was found in them.

Slicing Aided Hyper Inference, arXiv 2202.06934.
Upstream: none; the idea of windows plus the whole image is the paper's.
Departs from the source:
- no suppression of overlapping boxes. A DETR reports each object once, so two boxes of
  one window are two objects, however much they overlap, and both stay. Only boxes of
  different windows can be one object, and of each window at most one box is;
- a box that ends at an inner edge of its window is a fragment. An object no larger than
  the overlap is whole in another window, a very large one in the whole image, so
  fragments give way to whole boxes. Where there are none, fragments of two windows that
  agree on what both show are joined; one alone does not tell where its object ends.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

__all__ = ['Boxes', 'Window', 'cut', 'merge_boxes', 'merge_maps']

_SAME = 0.5  # least IoU, within the common part, of one object seen twice
_EDGE = 0.02  # of a window's side: a box that ends so close to its edge may be cut
_COVERED = 0.5  # least share of the smaller box, of an object that was found whole
_EPS = 1e-9
_LEAST_SIDE = 32  # pixels of a tile; smaller ones are a slip, and many


class Boxes(NamedTuple):
    """Detections of one image.

    Attributes:
        xyxy: `(K, 4)` float32, pixels.
        scores: `(K,)` float32 in [0, 1].
        labels: `(K,)` int64, from 0.
    """

    xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def pick(self, index: np.ndarray) -> 'Boxes':
        """Those of an index or of a mask."""
        return Boxes(*(values[index] for values in self))


class Window(NamedTuple):
    """Part of an image in pixels; the right and lower edges are not part of it."""

    x1: int
    y1: int
    x2: int
    y2: int


def cut(image_hw: tuple[int, int], tile_hw: tuple[int, int], overlap: float) -> list:
    """Windows that cover an image, evenly spread.

    Args:
        image_hw: height and width in pixels.
        tile_hw: of a window; a side that the image does not reach is cut down to it.
        overlap: least share of a window's side that it has in common with the next.

    Returns:
        Windows row by row; a single one where the image is no larger than a tile.

    Raises:
        ValueError: a side of the tile is below 32, or `overlap` is not in [0, 0.9].
    """
    if min(tile_hw) < _LEAST_SIDE:
        raise ValueError(
            f'tile is {tile_hw}; give sides of {_LEAST_SIDE} pixels or more'
        )
    if not 0 <= overlap <= 0.9:
        raise ValueError(f'overlap is {overlap}; give a share from 0 to 0.9')
    height, width = (min(pair) for pair in zip(image_hw, tile_hw, strict=True))
    return [
        Window(x, y, x + width, y + height)
        for y in _starts(image_hw[0], height, overlap)
        for x in _starts(image_hw[1], width, overlap)
    ]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    step = max(1, int(side * (1 - overlap)))
    count = 1 + -(-(length - side) // step)
    return np.linspace(0, length - side, count).astype(int).tolist()


def merge_boxes(
    found: Sequence[Boxes], windows: Sequence[Window], image_hw: tuple[int, int]
) -> Boxes:
    """Join the detections of several windows; what several see counts once.

    Args:
        found: detections by window, in pixels of the whole image.
        windows: in pixels; the whole image may be one of them.
        image_hw: height and width of the image.

    Returns:
        Detections by falling score. An object that several windows show whole has the
        box and the score of the best of them; one that is in fragments everywhere has
        the hull of these.
    """
    cuts = [
        _ends_at_edge(boxes.xyxy, window, image_hw)
        for boxes, window in zip(found, windows, strict=True)
    ]
    whole = _join(
        [boxes.pick(~cut) for boxes, cut in zip(found, cuts, strict=True)], windows
    )
    best = [group.pick([group.scores.argmax()]) for group in whole]
    fragments = _join(
        [boxes.pick(cut) for boxes, cut in zip(found, cuts, strict=True)], windows
    )
    hulls = [_hull(group) for group in fragments if len(group.scores) > 1]
    empty = found[0].pick(slice(0))
    objects = _stack([empty, *best])
    hull = _stack([empty, *hulls])
    merged = _stack([objects, hull.pick(~_covered(hull, objects))])
    return merged.pick(np.argsort(-merged.scores, kind='stable'))


def _stack(parts: Sequence[Boxes]) -> Boxes:
    return Boxes(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _join(found: Sequence[Boxes], windows: Sequence[Window]) -> list[Boxes]:
    """Group boxes by object: of one class, and at most one box of each window.

    Pairs are joined by falling agreement.
    """
    boxes = _stack(found)
    ends = np.cumsum([0, *(len(part.scores) for part in found)])
    owner = np.repeat(np.arange(len(windows)), np.diff(ends)).tolist()
    members = {i: [i] for i in range(len(owner))}
    group_of = list(members)
    for _, i, j in sorted(_pairs(found, windows, ends), reverse=True):
        a, b = group_of[i], group_of[j]
        if {owner[k] for k in members[a]} & {owner[k] for k in members[b]}:
            continue  # also where a is b
        for k in members[b]:
            group_of[k] = a
        members[a] += members.pop(b)
    return [boxes.pick(group) for group in members.values()]


def _pairs(
    found: Sequence[Boxes], windows: Sequence[Window], starts: np.ndarray
) -> list[tuple[float, int, int]]:
    """Agreement and positions of boxes of two windows that may be one object.

    Compared is what lies in the part that both windows show.
    """
    pairs = []
    for a, b in combinations(range(len(windows)), 2):
        low = np.maximum(windows[a][:2], windows[b][:2])
        high = np.minimum(windows[a][2:], windows[b][2:])
        if (high <= low).any():
            continue
        common = np.concatenate((low, high))
        iou = _iou(_clip(found[a].xyxy, common), _clip(found[b].xyxy, common))
        same = (iou >= _SAME) & (found[a].labels[:, None] == found[b].labels)
        pairs += [
            (float(iou[i, j]), int(starts[a] + i), int(starts[b] + j))
            for i, j in np.argwhere(same)
        ]
    return pairs


def _clip(xyxy: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Boxes within a part; those outside of it have no area."""
    return np.clip(xyxy, np.tile(to[:2], 2), np.tile(to[2:], 2))


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`(n, 4)` and `(m, 4)` to `(n, m)`; 0 without area."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    shared = sides.clip(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b)]
    return shared / np.maximum(areas[0][:, None] + areas[1] - shared, _EPS)


def _ends_at_edge(
    xyxy: np.ndarray, window: Window, image_hw: tuple[int, int]
) -> np.ndarray:
    """Whether `(K, 4)` boxes end at an edge of their window that is not the image's."""
    margin = _EDGE * np.array((window.x2 - window.x1, window.y2 - window.y1))
    low = xyxy[:, :2] <= np.array(window[:2]) + margin
    high = xyxy[:, 2:] >= np.array(window[2:]) - margin
    return (low & (np.array(window[:2]) > 0)).any(1) | (
        high & (np.array(window[2:]) < image_hw[::-1])
    ).any(1)


def _hull(group: Boxes) -> Boxes:
    corners = np.concatenate((group.xyxy[:, :2].min(0), group.xyxy[:, 2:].max(0)))
    return Boxes(corners[None], group.scores.max(keepdims=True), group.labels[:1])


def _covered(boxes: Boxes, by: Boxes) -> np.ndarray:
    """Whether one of `by` of the same class has half of the smaller of the two."""
    low = np.maximum(boxes.xyxy[:, None, :2], by.xyxy[:, :2])
    high = np.minimum(boxes.xyxy[:, None, 2:], by.xyxy[:, 2:])
    shared = (high - low).clip(min=0).prod(-1)
    areas = [(part.xyxy[:, 2:] - part.xyxy[:, :2]).prod(-1) for part in (boxes, by)]
    half = _COVERED * np.minimum(areas[0][:, None], areas[1])
    return ((shared >= half) & (boxes.labels[:, None] == by.labels)).any(1)


def merge_maps(
    found: Sequence[np.ndarray], windows: Sequence[Window], image_hw: tuple[int, int]
) -> np.ndarray:
    """Join label maps of windows; each pixel is taken where it lies deepest inside.

    Args:
        found: `(h, w)` maps by window.
        windows: that cover the image.
        image_hw: height and width of the image.

    Returns:
        `(H, W)`, of the type of the maps.
    """
    merged = np.zeros(image_hw, found[0].dtype)
    depth = np.full(image_hw, -1.0, np.float32)
    for labels, window in zip(found, windows, strict=True):
        here = (slice(window.y1, window.y2), slice(window.x1, window.x2))
        inside = np.minimum.outer(
            _depth(window.y1, window.y2, image_hw[0]),
            _depth(window.x1, window.x2, image_hw[1]),
        )
        deeper = inside > depth[here]
        merged[here][deeper] = labels[deeper]
        depth[here][deeper] = inside[deeper]
    return merged


def _depth(start: int, stop: int, length: int) -> np.ndarray:
    """Distance of each pixel to the nearer edge that is not the image's."""
    places = np.arange(start, stop, dtype=np.float32)
    to_start = places - start + 1 if start else np.full(places.shape, np.inf)
    to_stop = stop - places if stop < length else np.full(places.shape, np.inf)
    return np.minimum(to_start, to_stop).astype(np.float32)
