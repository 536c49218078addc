"""COCO-style sets on disk of a few small images, and the data set that reads them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmbackbones.data.coco import CocoDetection

WIDTH, HEIGHT = 40, 30
NAN, INF = float('nan'), float('inf')


def image_entry(image_id: int = 1, name: str = 'a.png') -> dict:
    return dict(id=image_id, file_name=name, width=WIDTH, height=HEIGHT)


def box_entry(bbox: object, category_id: int = 7, image_id: int = 1, **more) -> dict:
    return dict(
        id=next(IDS), image_id=image_id, category_id=category_id, bbox=bbox, **more
    )


IDS = iter(range(1, 100_000))
CATEGORIES = [dict(id=7, name='dog'), dict(id=3, name='cat')]
GOOD = [4, 5, 10, 12]


def write_set(
    root: Path,
    annotations: list | None = None,
    images: list | None = None,
    categories: list | None = None,
) -> Path:
    """A data root whose images are on disk; one good box by default."""
    images = [image_entry()] if images is None else images
    annotations = [box_entry(GOOD)] if annotations is None else annotations
    content = dict(
        images=images,
        annotations=annotations,
        categories=CATEGORIES if categories is None else categories,
    )
    (root / 'images').mkdir(exist_ok=True)
    for image in images:
        path = root / 'images' / str(image.get('file_name'))
        path.parent.mkdir(exist_ok=True)
        Image.new('RGB', (WIDTH, HEIGHT), (200, 10, 60)).save(path)
    (root / 'ann.json').write_text(json.dumps(content))
    return root


def build(root: Path, **options: object) -> CocoDetection:
    return CocoDetection(
        data_root=str(root),
        ann_file='ann.json',
        data_prefix=dict(img='images/'),
        **options,
    )


def expect_error(pattern: str, root: Path, **options: object) -> None:
    with pytest.raises(ValueError, match=pattern):
        build(root, **options)


def boxes_of(dataset: CocoDetection, index: int = 0) -> list:
    return [instance['bbox'] for instance in dataset.get_data_info(index)['instances']]


def grid_of_boxes(convert: Callable) -> list[dict]:
    """Fifteen boxes of 10 x 8 pixels all over an image of 40 x 30."""
    places = [(x, y) for x in (1, 7, 14, 21, 28) for y in (1, 9, 20)]
    return [box_entry(convert(x, y, 10, 8)) for x, y in places]
