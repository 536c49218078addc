"""The drawn set: the same each time, varied, and its boxes on the drawings."""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmbackbones.data.coco import CocoDetection
from mmbackbones.data.synthetic import (
    SHAPES,
    draw_detection_set,
    draw_scene,
    draw_segmentation_set,
)

SMALL = dict(num_train=34, num_val=6, image_size=96)


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_detection_set(tmp_path_factory.mktemp('drawn') / 'set', **SMALL)


def contents(root: Path) -> dict[str, bytes]:
    files = sorted(path for path in root.rglob('*') if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def annotations(root: Path, split: str = 'train') -> dict:
    return json.loads((root / 'annotations' / f'instances_{split}.json').read_text())


def test_it_loads_as_a_detection_set(root: Path) -> None:
    for split, count in (('train', 34), ('val', 6)):
        dataset = CocoDetection(
            data_root=str(root),
            ann_file=f'annotations/instances_{split}.json',
            data_prefix=dict(img=f'{split}/'),
        )
        assert len(dataset) == count
        assert dataset.metainfo['classes'] == SHAPES
        loaded = sum(len(dataset.get_data_info(i)['instances']) for i in range(count))
        assert loaded == len(annotations(root, split)['annotations'])  # none dropped


def test_it_is_varied(root: Path) -> None:
    coco = annotations(root)
    images = {image['id']: image for image in coco['images']}
    for image in images.values():
        pixels = cv2.imread(str(root / 'train' / image['file_name']))
        assert pixels.shape == (image['height'], image['width'], 3)
    shapes = {(image['width'] > image['height']) for image in images.values()}
    assert shapes == {False, True}
    boxes = coco['annotations']
    assert {box['category_id'] for box in boxes} == set(range(1, 6))
    counts = np.bincount([box['image_id'] for box in boxes], minlength=35)[1:]
    assert (counts == 0).sum() == 2 and counts.max() >= 6
    sides = [max(box['bbox'][2:]) for box in boxes]
    assert min(sides) < 96 / 6 and max(sides) > 96 / 3
    for box in boxes:
        x, y, w, h = box['bbox']
        image = images[box['image_id']]
        assert w > 2 and h > 2 and x >= 0 and y >= 0
        assert x + w <= image['width'] and y + h <= image['height']
        assert 0 < box['area'] <= w * h


def test_colour_says_nothing_about_the_class(root: Path) -> None:
    """Mean colour at the middle of discs and squares, far less apart than spread."""
    coco = annotations(root)
    colours: dict[int, list] = {}
    for box in coco['annotations']:
        name = coco['images'][box['image_id'] - 1]['file_name']
        pixels = cv2.imread(str(root / 'train' / name))
        x, y, w, h = box['bbox']
        middle = pixels[int(y + h / 2), int(x + w / 2)]
        colours.setdefault(box['category_id'], []).append(middle)
    discs, squares = np.array(colours[1]), np.array(colours[3])
    assert (discs.std(0) > 40).all() and (squares.std(0) > 40).all()
    assert (np.abs(discs.mean(0) - squares.mean(0)) < 60).all()


def test_it_is_drawn_once_and_the_same_everywhere(root: Path, tmp_path: Path) -> None:
    again = draw_detection_set(tmp_path / 'again', **SMALL)
    assert contents(again) == contents(root)
    times = {path: path.stat().st_mtime_ns for path in again.rglob('*')}
    draw_detection_set(again, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in again.rglob('*')} == times
    draw_detection_set(again, **SMALL, seed=1)
    other = contents(again)
    assert other.keys() == contents(root).keys()
    assert other['train/000000.jpg'] != contents(root)['train/000000.jpg']


def test_more_images_leave_the_first_as_they_are(root: Path, tmp_path: Path) -> None:
    other = draw_detection_set(tmp_path, num_train=2, num_val=1, image_size=96)
    for name in ('train/000000.jpg', 'train/000001.jpg', 'val/000000.jpg'):
        assert contents(other)[name] == contents(root)[name]
    assert contents(other)['val/000000.jpg'] != contents(other)['train/000000.jpg']


def test_an_interrupted_set_is_drawn_again(root: Path, tmp_path: Path) -> None:
    again = draw_detection_set(tmp_path / 'again', **SMALL)
    (again / 'train' / '000003.jpg').write_bytes(b'')
    (again / 'drawn.json').write_text('{}')  # of another version, say
    draw_detection_set(again, **SMALL)
    assert contents(again) == contents(root)


def test_a_set_that_was_never_finished_is_drawn_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / 'set'
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, 'write_text', _only_marks(Path.write_text, fails))
        draw_detection_set(folder, **SMALL)
    assert (folder / 'train').is_dir()  # something was drawn
    draw_detection_set(folder, **SMALL)
    assert contents(folder) == contents(root)


def _only_marks(write: Callable, other: Callable) -> Callable:
    def run(path: Path, text: str) -> object:
        return (write if path.name == 'drawn.json' else other)(path, text)

    return run


@pytest.mark.parametrize('draw', [draw_detection_set, draw_segmentation_set])
def test_a_smaller_set_keeps_nothing_of_a_larger_one(
    draw: Callable, tmp_path: Path
) -> None:
    small = dict(num_train=1, num_val=1, image_size=64)
    draw(tmp_path / 'set', num_train=3, num_val=2, image_size=64)
    (tmp_path / 'set' / 'mine').mkdir()
    (tmp_path / 'set' / 'mine' / '000002.jpg').write_text('mine')
    draw(tmp_path / 'set', **small)
    expected = contents(draw(tmp_path / 'other', **small))
    assert contents(tmp_path / 'set') == {**expected, 'mine/000002.jpg': b'mine'}


def test_a_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / 'thesis.txt').write_text('mine')
    with pytest.raises(ValueError, match='not drawn here'):
        draw_detection_set(tmp_path)
    assert contents(tmp_path) == {'thesis.txt': b'mine'}


@pytest.mark.parametrize(
    'options',
    [
        dict(num_train=0),
        dict(num_val='3'),
        dict(image_size=32),
        dict(image_size=64.5),
        dict(seed=-1),
    ],
)
def test_wrong_numbers_are_refused(options: dict, tmp_path: Path) -> None:
    ((name, value),) = options.items()
    message = f'{name!r}: {value!r}.* integers of at least'
    with pytest.raises(ValueError, match=message):
        draw_detection_set(tmp_path / 'set', **options)


@pytest.mark.parametrize('num_objects', [0, 1, 8])
def test_boxes_enclose_what_shows_of_a_shape(num_objects: int) -> None:
    """Seen in the picture itself: inside a box something differs from its outside."""
    for seed in range(5):
        scene = draw_scene(np.random.default_rng(seed), 96, num_objects)
        assert len(scene.labels) <= num_objects
        assert (num_objects == 0) == (len(scene.labels) == 0)
        height, width = scene.image.shape[:2]
        assert scene.owner.shape == (2 * height, 2 * width)
        assert scene.owner.max() == len(scene.labels) - 1
        for index in range(len(scene.labels)):
            x, y, w, h = (int(2 * value) for value in scene.box_xywh(index))
            inside = scene.owner[y : y + h, x : x + w] == index
            assert inside.sum() == (scene.owner == index).sum()
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()
            assert scene.area(index) == inside.sum() / 4


def test_a_lone_shape_is_where_its_box_is() -> None:
    """The picture departs from its background just within the box."""
    for seed in range(30):
        with_one = draw_scene(np.random.default_rng(seed), 96, 1)
        # The owner map tells pixels of the shape; their colour must be another one.
        own = cv2.resize(
            (with_one.owner == 0).astype(np.float32),
            with_one.image.shape[1::-1],
            interpolation=cv2.INTER_AREA,
        )
        image = with_one.image.astype(float)
        gap = np.abs(image[own == 1].mean(0) - image[own == 0].mean(0)).sum()
        assert gap > 40
