"""A view of an image that moves without touching pixels, resampled once at the end.

Upstream: none; the filters are OpenCV's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

import cv2
import numpy as np

__all__ = ['Window']


@dataclass(frozen=True)
class Window:
    """A rectangle seen of an image, which may reach beyond it; outside is black.

    Attributes:
        image: `(H, W, C)`, uint8.
        x: of the window's left and right edge, in pixels of the image, at integers;
            the greater one first where it is mirrored.
        y: of its upper and lower edge, likewise.
        colour: what happens to each pixel that is seen, before it is resampled.
    """

    image: np.ndarray
    x: tuple[int, int]
    y: tuple[int, int]
    colour: Callable[[np.ndarray], np.ndarray] | None = None

    @classmethod
    def take(cls, results: dict) -> 'Window':
        """The window of a sample; one over the whole image where there is none yet.

        `img` is taken out, so that a transform which is to see pixels fails here
        rather than on pixels that its boxes are not on.
        """
        if 'window' in results:
            return results['window']
        image = results.pop('img')
        height, width = image.shape[:2]
        return cls(image, (0, width), (0, height))

    def part(self, left: int, top: int, right: int, bottom: int) -> 'Window':
        """The window at these edges, in pixels from the upper left of this one."""
        return replace(
            self, x=_sub_range(self.x, left, right), y=_sub_range(self.y, top, bottom)
        )

    def mirrored(self, direction: str) -> 'Window':
        """The same seen in a mirror: horizontal, vertical or diagonal (both)."""
        x = self.x if direction == 'vertical' else self.x[::-1]
        y = self.y if direction == 'horizontal' else self.y[::-1]
        return replace(self, x=x, y=y)

    def render(self, width: int, height: int) -> np.ndarray:
        """What is seen, stretched to `(height, width, C)`."""
        available_y, available_x = self.image.shape[:2]
        inside = _covers(available_x, self.x) and _covers(available_y, self.y)
        # Interpolation at an edge that cuts the image looks beyond it.
        rows = _Axis(self.y, available_y, height, with_margin=not inside)
        columns = _Axis(self.x, available_x, width, with_margin=not inside)
        pixels = self.image[rows.first : rows.last, columns.first : columns.last]
        if self.colour and pixels.size:
            pixels = self.colour(pixels)
        flips = (columns.mirrored, rows.mirrored)
        if any(flips) and pixels.size:
            pixels = cv2.flip(pixels, {(1, 0): 1, (0, 1): 0, (1, 1): -1}[flips])
        if not inside:
            return _place(pixels, rows, columns)
        pixels = _smooth(pixels, rows, columns, cv2.BORDER_REPLICATE)
        return _resize(pixels, width, height)


def _sub_range(edges: tuple[int, int], low: int, high: int) -> tuple[int, int]:
    sign = 1 if edges[0] <= edges[1] else -1
    return edges[0] + sign * low, edges[0] + sign * high


def _covers(available: int, edges: tuple[int, int]) -> bool:
    return min(edges) >= 0 and max(edges) <= available


class _Axis:
    """How one axis of a window is resampled.

    Attributes:
        mirrored: whether pixels are to be turned round first.
        length: of the output.
        scale: length of a pixel of the image in the output.
        first: pixel of the image that is needed first.
        last: pixel after the last one.
        start: where they begin in the output, once turned round.
    """

    def __init__(
        self,
        edges: tuple[int, int],
        available: int,
        length: int,
        *,
        with_margin: bool = False,
    ) -> None:
        low, high = sorted(edges)
        self.length = length
        self.scale = length / (high - low)
        margin = 1 + int(1 / self.scale) if with_margin else 0
        self.first = min(max(low - margin, 0), available)
        self.last = max(min(high + margin, available), self.first)
        self.mirrored = edges[0] > edges[1]
        before = high - self.last if self.mirrored else self.first - low
        self.start = before * self.scale

    @property
    def kernel(self) -> np.ndarray:
        """Weights `(2n + 1,)` of the pixels that an output pixel is made of.

        The triangle of an antialiased filter; interpolation adds what is between.
        """
        reach = max(1 / self.scale, 1.0)
        weights = 1 - np.abs(np.arange(1 - ceil(reach), ceil(reach))) / reach
        return weights / weights.sum()


def _resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    if pixels.shape[:2] == (height, width):
        return pixels
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)


def _smooth(pixels: np.ndarray, rows: _Axis, columns: _Axis, border: int) -> np.ndarray:
    """Average over what an output pixel covers, so that nothing aliases."""
    kernels = columns.kernel, rows.kernel
    if all(len(kernel) == 1 for kernel in kernels):
        return pixels
    return cv2.sepFilter2D(pixels, -1, *kernels, borderType=border)


def _place(pixels: np.ndarray, rows: _Axis, columns: _Axis) -> np.ndarray:
    """Resample where the image is, and leave the rest black."""
    output = np.zeros((rows.length, columns.length, *pixels.shape[2:]), pixels.dtype)
    if not pixels.size:
        return output
    matrix = np.zeros((2, 3))
    ranges = []
    for i, axis in enumerate((columns, rows)):
        begin = max(int(axis.start) - 1, 0)
        length = (axis.last - axis.first) * axis.scale
        ranges.append((begin, min(int(axis.start + length) + 2, axis.length)))
        # From centres of output pixels to centres of pixels.
        matrix[i, i] = 1 / axis.scale
        matrix[i, 2] = (begin + 0.5 - axis.start) / axis.scale - 0.5
    (left, right), (top, bottom) = ranges
    output[top:bottom, left:right] = cv2.warpAffine(
        _smooth(pixels, rows, columns, cv2.BORDER_CONSTANT),
        matrix,
        (right - left, bottom - top),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=0,
    )
    return output
