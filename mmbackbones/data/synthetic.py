"""Detection and segmentation sets of drawn objects: made in seconds, always the same.

It serves demos and tests. Five classes of shapes with one to many objects an image,
sizes from a fifth to half of the image, turned and overlapping, before plain, graded,
striped or clouded backgrounds, with noise. Colour says nothing about the class, so a
model has to learn form. Some images have no objects.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

__all__ = [
    'SEGMENTS',
    'SHAPES',
    'Scene',
    'draw_detection_set',
    'draw_scene',
    'draw_segmentation_set',
]

SHAPES = ('disc', 'ring', 'square', 'triangle', 'star')
SEGMENTS = ('background', *SHAPES)

_VERSION = 2  # raise it when drawings change: older folders are then drawn anew
_ZOOM = 2  # drawn at twice the size: smooth edges, extents to half a pixel
_SHIFT = 4  # OpenCV takes polygons in sixteenths of a pixel
_EMPTY_EVERY = 16
_FOLDERS = (
    *('train', 'val', 'images/training', 'images/validation'),
    *('annotations/training', 'annotations/validation'),
)
_MIN_VISIBLE = 0.6  # share of a shape that edges and other shapes must leave


@dataclass(frozen=True)
class Scene:
    """A drawing and what is where in it.

    Attributes:
        image: `(H, W, 3)` uint8, BGR.
        owner: `(2 H, 2 W)` int16, which object shows at each half pixel, counted
            from 0; -1 is background.
        labels: class of each object, an index into `SHAPES`.
    """

    image: np.ndarray
    owner: np.ndarray
    labels: tuple[int, ...]

    def box_xywh(self, index: int) -> tuple[float, float, float, float]:
        """Extent of the visible part of an object in pixels, exact to 0.5."""
        shown = self.owner == index
        left, width = _extent(shown.any(axis=0))
        top, height = _extent(shown.any(axis=1))
        return (left, top, width, height)

    def area(self, index: int) -> float:
        """Visible area of an object in square pixels."""
        return np.count_nonzero(self.owner == index) / _ZOOM**2

    def label_map(self) -> np.ndarray:
        """What is where, `(H, W)` uint8: 0 on edges, else an index into `SEGMENTS` + 1.

        Edges are the pixels that several objects share.
        """
        ids = np.array([1, *(label + 2 for label in self.labels)], np.uint8)
        quarters = ids[self.owner + 1]
        quarters = np.stack([quarters[i::2, j::2] for i in (0, 1) for j in (0, 1)])
        return np.where((quarters == quarters[0]).all(0), quarters[0], 0)


def _extent(shown: np.ndarray) -> tuple[float, float]:
    """Start and length in pixels of what is True in a row of half pixels."""
    places = np.flatnonzero(shown)
    return places[0] / _ZOOM, (places[-1] + 1 - places[0]) / _ZOOM


def draw_detection_set(
    root: str | Path,
    *,
    num_train: int = 256,
    num_val: int = 64,
    image_size: int = 256,
    seed: int = 0,
) -> Path:
    """Draw a set in COCO layout, or leave it be where it is there already.

    Writes `annotations/instances_{train,val}.json` and JPEG files in `train/` and
    `val/`. Boxes are the exact extent of what can be seen of a shape.
    The i-th image of a split depends on `seed`, split, `image_size` and i only.

    Args:
        root: folder, made if need be.
        num_train: images to train on.
        num_val: images to evaluate on.
        image_size: mean side in pixels; images are landscape, portrait or square.
        seed: of all drawings.

    Returns:
        `root`.

    Raises:
        ValueError: no images, an image side below 64, a negative seed, or a folder
            with other contents.
    """
    recipe = _Recipe(num_train, num_val, image_size, seed)
    return recipe.draw(Path(root), 'detection', _draw_detection_split)


def draw_segmentation_set(
    root: str | Path,
    *,
    num_train: int = 256,
    num_val: int = 64,
    image_size: int = 256,
    seed: int = 0,
) -> Path:
    """Draw the same images in ADE20K's layout, or leave them be.

    Writes `{images,annotations}/{training,validation}` and `classes.txt`, the names
    of ids 1 to 6 (`SEGMENTS`). Id 0 is void: pixels on the edge of an object.

    Args and Raises: as `draw_detection_set`.

    Returns:
        `root`.
    """
    recipe = _Recipe(num_train, num_val, image_size, seed)
    return recipe.draw(Path(root), 'segmentation', _draw_segmentation_split)


@dataclass(frozen=True)
class _Recipe:
    """All that a drawn set depends on."""

    num_train: int
    num_val: int
    image_size: int
    seed: int

    def __post_init__(self) -> None:
        least = dict(num_train=1, num_val=1, image_size=64, seed=0)
        if any(type(n) is not int or n < least[k] for k, n in asdict(self).items()):
            raise ValueError(f'got {asdict(self)}; give integers of at least {least}')

    def draw(self, root: Path, kind: str, draw_split: Callable) -> Path:
        """Call `draw_split` for both splits, unless they are there already."""
        recipe = json.dumps(dict(asdict(self), version=_VERSION, kind=kind))
        mark = root / 'drawn.json'
        if mark.is_file():
            if mark.read_text() == recipe:
                return root
        elif root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise ValueError(
                f'{str(root)!r} has contents that were not drawn here; choose an empty '
                'folder'
            )
        root.mkdir(parents=True, exist_ok=True)
        mark.write_text('')  # until all is there: an interrupted set is drawn again
        for folder in _FOLDERS:  # a smaller set must not keep what an older one had
            for path in (root / folder).glob('[0-9]' * 6 + '.*'):
                path.unlink()
        for split, count in (('train', self.num_train), ('val', self.num_val)):
            draw_split(root, split, self._scenes(split, count))
        mark.write_text(recipe)
        return root

    def _scenes(self, split: str, count: int) -> Iterator[tuple[str, Scene]]:
        """Drawings, each with the name of its files."""
        for index in range(count):
            rng = np.random.default_rng(
                (self.seed, split == 'val', self.image_size, index)
            )
            is_empty = index % _EMPTY_EVERY == _EMPTY_EVERY - 1
            num_objects = 0 if is_empty else int(rng.integers(1, 7))
            yield f'{index:06d}', draw_scene(rng, self.image_size, num_objects)


def _write_image(folder: Path, name: str, scene: Scene) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    file_name = f'{name}.jpg'
    quality = [cv2.IMWRITE_JPEG_QUALITY, 92]
    cv2.imwrite(str(folder / file_name), scene.image, quality)
    return file_name


def _draw_detection_split(
    root: Path, split: str, scenes: Iterator[tuple[str, Scene]]
) -> None:
    images, annotations = [], []
    for index, (name, scene) in enumerate(scenes):
        file_name = _write_image(root / split, name, scene)
        height, width = scene.image.shape[:2]
        images.append(
            dict(id=index + 1, file_name=file_name, width=width, height=height)
        )
        for i, label in enumerate(scene.labels):
            annotation = dict(
                id=len(annotations) + 1,
                image_id=index + 1,
                category_id=label + 1,
                bbox=scene.box_xywh(i),
                area=scene.area(i),
                iscrowd=0,
            )
            annotations.append(annotation)
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(SHAPES)]
    coco = dict(images=images, annotations=annotations, categories=categories)
    path = root / 'annotations' / f'instances_{split}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(coco))


def _draw_segmentation_split(
    root: Path, split: str, scenes: Iterator[tuple[str, Scene]]
) -> None:
    folder = dict(train='training', val='validation')[split]
    maps = root / 'annotations' / folder
    maps.mkdir(parents=True, exist_ok=True)
    for name, scene in scenes:
        _write_image(root / 'images' / folder, name, scene)
        cv2.imwrite(str(maps / f'{name}.png'), scene.label_map())
    (root / 'classes.txt').write_text('\n'.join(SEGMENTS) + '\n')


def draw_scene(rng: np.random.Generator, image_size: int, num_objects: int) -> Scene:
    """Draw one image.

    Args:
        rng: source of all that is random in it.
        image_size: mean side in pixels.
        num_objects: to draw; fewer where there is no room for them.
    """
    aspect = math.sqrt(rng.choice((3 / 4, 1, 4 / 3)))
    width, height = round(image_size * aspect), round(image_size / aspect)
    image = _background(rng, width, height)
    image = cv2.resize(image, (width * _ZOOM, height * _ZOOM))
    owner = np.full(image.shape[:2], -1, np.int16)
    labels: list[int] = []
    areas: list[int] = []  # of the shapes alone
    for _ in range(num_objects * 3):
        if len(labels) == num_objects:
            break
        label = int(rng.integers(len(SHAPES)))
        shape, area = _shape_mask(rng, SHAPES[label], owner.shape)
        covered = np.where(shape, len(labels), owner)
        visible = np.bincount(covered[covered >= 0], minlength=len(labels) + 1)
        if (visible < _MIN_VISIBLE * np.array([*areas, area])).any():
            continue
        image[shape] = _fill(rng, image, shape)
        owner = covered
        labels.append(label)
        areas.append(area)
    noise = rng.standard_normal((height, width, 3), np.float32) * rng.uniform(0, 8)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    image = np.clip(image + noise, 0, 255).astype(np.uint8)
    return Scene(image, owner, tuple(labels))


def _shape_mask(
    rng: np.random.Generator, name: str, canvas_hw: tuple[int, int]
) -> tuple[np.ndarray, float]:
    """Where a shape of random size, place and turn lies, and its area uncut."""
    height, width = canvas_hw
    radius = min(canvas_hw) * math.exp(rng.uniform(math.log(0.1), math.log(0.28)))
    stretch = np.array((1.0, rng.uniform(0.75, 1.0)))
    turn = rng.uniform(0, 2 * math.pi)
    rotation = np.array(
        ((math.cos(turn), -math.sin(turn)), (math.sin(turn), math.cos(turn)))
    )
    centre = rng.uniform((0, 0), (width, height))
    contours = [
        (unit * radius * stretch) @ rotation.T + centre for unit in _unit_contours(name)
    ]
    mask = np.zeros(canvas_hw, np.uint8)
    points = [np.rint(c * (1 << _SHIFT)).astype(np.int32) for c in contours]
    cv2.fillPoly(mask, points, 1, shift=_SHIFT)  # even-odd: a ring keeps its hole
    outer, *holes = (cv2.contourArea(c.astype(np.float32)) for c in contours)
    return mask.astype(bool), outer - sum(holes)


def _unit_contours(name: str) -> list[np.ndarray]:
    """Outlines `(n, 2)` of a shape in the unit circle, outer one first."""

    def around(count: int, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
        angle = np.arange(count) * (2 * math.pi / count)
        radius = np.resize(radii, count)
        return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1)

    return {
        'disc': [around(64)],
        'ring': [around(64), around(64) * 0.55],
        'square': [around(4)],
        'triangle': [around(3)],
        'star': [around(10, (1.0, 0.42))],
    }[name]


def _colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0, 255, 3)


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A `(height, width, 3)` float picture without objects."""
    first, second = _colour(rng), _colour(rng)
    y, x = np.mgrid[:height, :width] / max(width, height)
    turn = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(turn) + y * math.sin(turn)
    kind = rng.choice(('plain', 'gradient', 'stripes', 'clouds'))
    if kind == 'plain':
        mix = np.zeros((height, width))
    elif kind == 'gradient':
        mix = (along - along.min()) / np.ptp(along)
    elif kind == 'stripes':
        mix = 0.5 + 0.5 * np.sin(along * 2 * math.pi * rng.uniform(3, 15))
        mix *= 0.6
    else:
        cells = rng.uniform(0, 1, rng.integers(3, 12, 2))
        mix = cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC)
    mix = mix.clip(0, 1).astype(np.float32)[..., None]
    return first.astype(np.float32) + mix * (second - first).astype(np.float32)


def _fill(rng: np.random.Generator, image: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Shaded colours `(n, 3)` for the n pixels of a shape, unlike what they cover."""
    under = image[shape].mean(axis=0)
    colours = rng.uniform(0, 255, (8, 3))
    apart = np.abs(colours - under).sum(axis=1) > 200
    colour = colours[apart.argmax()] if apart.any() else 255 - under
    shade = np.linspace(*rng.uniform(0.75, 1.25, 2), image.shape[1])
    return (colour * shade[np.nonzero(shape)[1], None]).clip(0, 255)
