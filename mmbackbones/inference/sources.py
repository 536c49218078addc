"""Images to predict on: files, folders, patterns, arrays, videos, cameras.

Everything becomes 8-bit BGR arrays, as OpenCV has them. Files and Pillow images are
read as in training (`LoadImage`) and turned upright by their EXIF orientation.
"""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.logging import print_log
from PIL import Image, ImageOps, UnidentifiedImageError

from mmbackbones.data.det_transforms import LoadImage

__all__ = [
    'IMAGE_SUFFIXES',
    'VIDEO_SUFFIXES',
    'Frame',
    'Source',
    'find_images',
    'open_source',
    'read_image',
]

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')
VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg')


@dataclass(frozen=True)
class Frame:
    """One image of a source.

    Attributes:
        name: file name; a numbered one for what is not a file.
        path: of the file, or None.
        image: `(H, W, 3)` uint8 BGR; None for a file that is not read yet.
    """

    name: str
    path: str | None = None
    image: np.ndarray | None = None


class _Reader(LoadImage):
    """`LoadImage` without annotations, for open Pillow images also."""

    def read(self, path: str) -> np.ndarray:
        return self.transform(dict(img_path=path))['img']

    def convert(self, image: Image.Image) -> np.ndarray:
        upright = ImageOps.exif_transpose(image)
        return cv2.cvtColor(self._to_rgb(upright), cv2.COLOR_RGB2BGR)


def read_image(path: str) -> np.ndarray:
    """An image file as `(H, W, 3)` uint8 BGR, upright.

    Raises:
        ValueError: the file is missing, truncated or no image.
    """
    try:
        return _Reader().read(path)
    except ValueError as error:
        if not isinstance(error.__cause__, UnidentifiedImageError):
            raise
        raise ValueError(
            f'image {path!r} cannot be read: no known image format was recognised in it'
        ) from error


def find_images(source: str) -> list[str]:
    """Image files of a path, a folder (not its sub-folders) or a glob pattern.

    Raises:
        ValueError: nothing there, with what was looked for.
    """
    path = Path(source)
    if path.is_dir():
        candidates = sorted(str(child) for child in path.iterdir())
    elif path.is_file():
        return [source]
    else:
        candidates = sorted(glob.glob(source))
    files = [name for name in candidates if name.lower().endswith(IMAGE_SUFFIXES)]
    if not files:
        raise ValueError(
            f'no images in {source!r}: give an image, a folder or a quoted pattern '
            f'with files ending in {", ".join(IMAGE_SUFFIXES)}, or a video'
        )
    return files


class _Video:
    """Frames of a video file (str) or a camera (int), opened at once.

    Raises:
        ValueError: it cannot be opened, or not a single frame can be decoded.
    """

    def __init__(self, address: str | int) -> None:
        self.is_camera = isinstance(address, int)
        self._what = f'camera {address}' if self.is_camera else f'video {address!r}'
        self._stem = f'camera{address}' if self.is_camera else Path(address).stem
        self._capture = cv2.VideoCapture(address)
        if not self._capture.isOpened():
            raise ValueError(
                f'{self._what} cannot be opened; OpenCV finds no such device, or no '
                'decoder for such a file'
            )
        # 0 or less in files that do not say; of a camera it means nothing.
        stated = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.num_frames = stated if stated > 0 and not self.is_camera else None

    def __iter__(self) -> Iterator[Frame]:
        count = 0
        try:
            while (decoded := self._capture.read())[0]:
                yield Frame(f'{self._stem}_{count:06d}.jpg', image=decoded[1])
                count += 1
        finally:
            self._capture.release()
        if not count:
            raise ValueError(f'no frame of {self._what} can be decoded')
        if self.num_frames and count < self.num_frames:
            print_log(
                f'{self._what} says that it has {self.num_frames} frames; {count} '
                'could be decoded',
                logger='current',
                level=30,
            )


@dataclass(frozen=True)
class Source:
    """Images in their order; can be gone through once where videos are among them.

    Attributes:
        parts: lists of frames, and videos.
    """

    parts: tuple[list[Frame] | _Video, ...]

    def __iter__(self) -> Iterator[Frame]:
        """Frames, read as far as they are no files."""
        for part in self.parts:
            yield from part

    @property
    def num_frames(self) -> int | None:
        """How many there are; None where a video or camera does not say."""
        counts = [p.num_frames if isinstance(p, _Video) else len(p) for p in self.parts]
        return None if None in counts else sum(counts)

    @property
    def names(self) -> list[str]:
        """Names of all frames that are not of a video."""
        return [f.name for p in self.parts if isinstance(p, list) for f in p]

    @property
    def paths(self) -> list[str]:
        """Of the image files."""
        frames = (f for p in self.parts if isinstance(p, list) for f in p)
        return [frame.path for frame in frames if frame.path is not None]

    @property
    def endless(self) -> bool:
        """Whether a camera is among the parts."""
        return any(isinstance(p, _Video) and p.is_camera for p in self.parts)


def open_source(source: Any) -> Source:
    """Find what is to be predicted on, without reading image files.

    Args:
        source: path of an image or a video, folder, glob pattern; array `(H, W, 3)`
            BGR, `(H, W, 4)` BGRA (alpha is left out) or `(H, W)` grey, uint8; Pillow
            image; index of a camera; list of these; or a `Source`.

    Raises:
        ValueError: nothing there, an empty list, or none of these things.
    """
    if isinstance(source, Source):
        return source
    parts: list[list[Frame] | _Video] = []
    items = source if isinstance(source, list | tuple) else [source]
    if not items:
        raise ValueError('source is an empty list; give at least one image')
    for item in items:
        number = sum(len(part) for part in parts if isinstance(part, list))
        part = _open_one(item, number)
        if isinstance(part, list) and parts and isinstance(parts[-1], list):
            parts[-1].extend(part)
        else:
            parts.append(part)
    return Source(tuple(parts))


def _open_one(item: Any, number: int) -> list[Frame] | _Video:
    if isinstance(item, str | Path):
        text = str(item)
        if text.lower().endswith(VIDEO_SUFFIXES) and Path(text).is_file():
            return _Video(text)
        return [Frame(Path(name).name, path=name) for name in find_images(text)]
    if isinstance(item, int) and not isinstance(item, bool):
        return _Video(item)
    name = f'image_{number:06d}.jpg'
    if isinstance(item, np.ndarray):
        return [Frame(name, image=_checked_array(item))]
    if isinstance(item, Image.Image):
        return [Frame(name, image=_Reader().convert(item))]
    raise ValueError(
        f'source holds {type(item).__name__!r}; give a path, folder, pattern, array, '
        'Pillow image, video, camera index, or a list of these'
    )


def _checked_array(array: np.ndarray) -> np.ndarray:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ValueError(
            f'source holds an array of shape {array.shape} and type {array.dtype}; an '
            'image is (H, W, 3) in BGR, (H, W, 4) in BGRA or (H, W), of uint8'
        )
    if not array.size:
        raise ValueError(f'source holds an array without pixels: shape {array.shape}')
    if channels == 1:
        return cv2.cvtColor(array, cv2.COLOR_GRAY2BGR)
    return np.ascontiguousarray(array[..., :3])
