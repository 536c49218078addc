"""Windows over large images, and joining what was found in them."""

import threading

import cv2
import numpy as np
import pytest
from inference_helpers import stub_inferencer

from mmbackbones.inference.tiling import Boxes, Window, cut, merge_boxes, merge_maps

IMAGE = (100, 180)
LEFT, RIGHT = Window(0, 0, 100, 100), Window(80, 0, 180, 100)
WHOLE = Window(0, 0, 180, 100)


def boxes(*rows: tuple, labels: tuple | None = None) -> Boxes:
    """Of rows x1, y1, x2, y2, score."""
    table = np.array(rows, np.float32).reshape(-1, 5)
    labels = np.array(labels or [0] * len(table), np.int64)
    return Boxes(table[:, :4], table[:, 4], labels)


def merge(*found: Boxes, windows: tuple = (LEFT, RIGHT)) -> list:
    merged = merge_boxes(found, windows, IMAGE)
    return np.c_[merged.xyxy, merged.scores].round(3).tolist()


@pytest.mark.parametrize(
    ('image_hw', 'tile_hw', 'overlap', 'starts'),
    [
        ((50, 60), (64, 64), 0.25, {(0, 0)}),
        ((64, 160), (64, 64), 0.25, {(0, 0), (48, 0), (96, 0)}),
        ((100, 64), (64, 64), 0.0, {(0, 0), (0, 36)}),
    ],
)
def test_windows_cover_the_image(
    image_hw: tuple, tile_hw: tuple, overlap: float, starts: set
) -> None:
    windows = cut(image_hw, tile_hw, overlap)
    assert {(w.x1, w.y1) for w in windows} == starts
    seen = np.zeros(image_hw, bool)
    for w in windows:
        assert w.x2 <= image_hw[1] and w.y2 <= image_hw[0]
        seen[w.y1 : w.y2, w.x1 : w.x2] = True
    assert seen.all()


@pytest.mark.parametrize(
    ('tile_hw', 'overlap', 'message'),
    [
        ((0, 64), 0.2, r'tile is \(0, 64\)'),
        ((64, 31), 0.2, r'tile is \(64, 31\); give sides of 32 pixels or more'),
        ((64, 64), 1.0, 'overlap is 1.0'),
    ],
)
def test_what_is_no_tile(tile_hw: tuple, overlap: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut((100, 100), tile_hw, overlap)


def test_nothing_found() -> None:
    assert merge(boxes(), boxes()) == []


def test_what_two_windows_see_counts_once_with_the_best_score() -> None:
    seen_twice = merge(boxes((84, 10, 94, 20, 0.5)), boxes((84, 10, 95, 20, 0.75)))
    assert seen_twice == [[84, 10, 95, 20, 0.75]]


def test_true_neighbours_stay() -> None:
    """Two boxes with an IoU of 0.6, both seen by both windows: suppression at 0.5
    would leave one, and without joining there are four."""
    pair = ((84, 10, 92, 26, 0.75), (86, 10, 94, 26, 0.5))
    assert merge(boxes(*pair), boxes(*pair)) == [list(pair[0]), list(pair[1])]


def test_classes_are_kept_apart() -> None:
    box = (84, 10, 94, 20, 0.5)
    assert len(merge(boxes(box), boxes(box, labels=(1,)))) == 2


def test_a_fragment_gives_way_to_the_whole() -> None:
    fragment, whole = (70, 10, 100, 30, 0.9), (70, 10, 120, 30, 0.5)
    found = merge(boxes(fragment), boxes(), boxes(whole), windows=(LEFT, RIGHT, WHOLE))
    assert found == [[70, 10, 120, 30, 0.5]]


def test_fragments_are_joined_where_none_is_whole() -> None:
    left, right = (60, 10, 100, 30, 0.5), (80, 11, 130, 30, 0.75)
    assert merge(boxes(left), boxes(right)) == [[60, 10, 130, 30, 0.75]]
    assert merge(boxes(left), boxes()) == []  # where it ends, nobody knows


def test_maps_are_joined_in_the_middle_of_the_overlap() -> None:
    maps = [np.full((100, 100), 1), np.full((100, 100), 2)]
    merged = merge_maps(maps, (LEFT, RIGHT), IMAGE)
    assert (merged[:, :90] == 1).all() and (merged[:, 90:] == 2).all()
    whole = np.arange(100 * 180).reshape(IMAGE)
    assert (merge_maps([whole], [WHOLE], IMAGE) == whole).all()


def test_small_objects_of_a_large_image() -> None:
    """35 objects of 20 pixels in 768 x 768: 2.5 pixels for the model without tiles."""
    image = np.zeros((768, 768, 3), np.uint8)
    places = [(x, y) for x in range(30, 768, 150) for y in range(30, 640, 90)]
    for x, y in places:
        image[y : y + 20, x : x + 20] = (0, 255, 0)
    image[680:760, 480:] = (0, 0, 255)  # and a long one that no tile shows whole
    model = stub_inferencer()
    (plain,) = model.predict(image)
    assert plain.names == ['dark']  # the long one
    (tiled,) = model.predict(image, tile=192, batch_size=8)
    found = {(round(x), round(y)) for x, y, *_ in tiled.xyxy[tiled.labels == 1]}
    exact = [min(abs(x - a) + abs(y - b) for a, b in found) for x, y in places]
    assert max(exact) <= 2 and (tiled.labels == 1).sum() == len(places)
    (long,) = tiled.xyxy[tiled.labels == 0]
    assert np.abs(long - (480, 680, 768, 760)).max() <= 4


def test_few_inputs_are_held_at_once_however_many_windows() -> None:
    """Of 1 + 400 windows, in batches of 2 and two threads."""
    model = stub_inferencer()
    lock, now, most = threading.Lock(), 0, 0
    prepare, predict = model.backend.prepare, model.backend.predict

    def counted(image: np.ndarray, name: str) -> object:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        return prepare(image, name)

    def forgotten(inputs: list) -> list:
        nonlocal now
        with lock:
            now -= len(inputs)
        return predict(inputs)

    model.backend.prepare, model.backend.predict = counted, forgotten
    image = np.zeros((640, 640, 3), np.uint8)
    options = dict(tile=32, overlap=0.0, batch_size=2, num_workers=2)
    found = model.predict([image, image], **options)
    assert [len(result) for result in found] == [0, 0]
    assert 2 <= most <= 12  # not 401


def test_tiles_of_a_segmentor_cover_each_pixel() -> None:
    class Session:
        name, fixed_batch = 'stub', None

        def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
            return dict(labels=(images[:, 0] > 0.5).astype(np.int64))

    model = stub_inferencer(task='segmentation', input_size_hw=(64, 64))
    model.backend._session = Session()
    image = cv2.circle(np.zeros((150, 200, 3), np.uint8), (90, 70), 40, (0, 0, 255), -1)
    (result,) = model.predict(image, tile=64)
    assert ((result.labels == 1) == (image[..., 2] > 0)).all()
