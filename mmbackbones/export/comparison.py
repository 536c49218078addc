"""How far the outputs of two forms of one model lie apart.

Detections come by falling score, and scores that are nearly equal may change places,
so they are matched without regard to order. At the end of the list a detection may be
on one side only, since another has just been better: that is no difference.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

__all__ = ['Comparison', 'compare_outputs']

_APART = 0.1
"""Pairs of which score, or box as a share of the input, differ by more are none."""

_SLACK = 0.01
"""How far above the other side's lowest score a detection cannot just have dropped."""


@dataclass
class Comparison:
    """Largest differences over images; what a task does not have stays empty.

    Attributes:
        num_images: compared.
        score: of detections.
        box: of their corners, as a share of the input's longer side.
        box_pixels: the same in pixels of the input.
        num_detections: matched.
        num_unmatched: detections of either side that the other does not have although
            their score is above its lowest one by more than `_SLACK`.
        pixels: share of pixels with another label.
        features: of maps and logits, relative to the largest value of a map.
    """

    num_images: int = 0
    score: float = 0.0
    box: float = 0.0
    box_pixels: float = 0.0
    num_detections: int = 0
    num_unmatched: int = 0
    pixels: float = 0.0
    features: float = 0.0

    def exceeds(self, tolerance: float) -> bool:
        """Whether anything differs by more than that, NaN included."""
        found = (self.score, self.box, self.pixels, self.features)
        return self.num_unmatched > 0 or not np.max(found) <= tolerance

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def compare_outputs(
    task: str,
    pairs: Iterable[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]],
    size_hw: tuple[int, int],
) -> Comparison:
    """Compare outputs batch by batch.

    Args:
        task: 'detection', 'segmentation' or 'backbone'.
        pairs: outputs by name of both sides for the same images.
        size_hw: of the input in pixels.
    """
    total = Comparison()
    for ours, theirs in pairs:
        first = next(iter(ours.values()))
        total.num_images += len(first)
        if task == 'detection':
            for i in range(len(first)):
                _add_detections(
                    total,
                    {name: value[i] for name, value in ours.items()},
                    {name: value[i] for name, value in theirs.items()},
                    max(size_hw),
                )
            continue
        if task == 'segmentation':
            mine, other = (_labels(side) for side in (ours, theirs))
            total.pixels = _larger(total.pixels, float((mine != other).mean()))
        for name in ours.keys() - {'labels'}:
            total.features = _larger(total.features, _gap(ours[name], theirs[name]))
    return total


def _gap(value: np.ndarray, other: np.ndarray) -> float:
    """Largest difference relative to the largest value; NaN where either has one."""
    if not (np.isfinite(value).all() and np.isfinite(other).all()):
        return float('nan')
    gap = np.abs(value - other).max()
    return float(gap / np.abs(value).max()) if gap else 0.0


def _labels(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of a segmentor, which gives logits where windows slide."""
    if 'labels' in outputs:
        return outputs['labels']
    return outputs['logits'].argmax(1)


def _larger(a: float, b: float) -> float:
    """The maximum; NaN wins."""
    return float(np.maximum(a, b))


def _add_detections(total: Comparison, ours: dict, theirs: dict, side: int) -> None:
    for one in (ours, theirs):
        if not all(np.isfinite(one[name]).all() for name in ('boxes', 'scores')):
            total.score = total.box = float('nan')
            return
    score = np.abs(ours['scores'][:, None] - theirs['scores'][None])
    box = np.abs(ours['boxes'][:, None] - theirs['boxes'][None]).max(-1) / side
    apart = np.maximum(score, box)
    apart = np.where(ours['labels'][:, None] == theirs['labels'][None], apart, 1e3)
    rows, columns = linear_sum_assignment(np.minimum(apart, 1e3))
    same = apart[rows, columns] <= _APART
    rows, columns = rows[same], columns[same]
    total.num_detections += len(rows)
    if len(rows):
        total.score = _larger(total.score, score[rows, columns].max())
        total.box = _larger(total.box, box[rows, columns].max())
        total.box_pixels = total.box * side
    for one, matched, other in ((ours, rows, theirs), (theirs, columns, ours)):
        alone = np.delete(one['scores'], matched)
        total.num_unmatched += int((alone > other['scores'].min() + _SLACK).sum())
