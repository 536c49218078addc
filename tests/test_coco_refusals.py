"""COCO-style sets that are refused, and reading a file's categories alone."""

import json
from pathlib import Path

import pytest
from coco_helpers import (
    CATEGORIES,
    GOOD,
    box_entry,
    build,
    expect_error,
    grid_of_boxes,
    image_entry,
    write_set,
)

from mmbackbones.data import read_faults
from mmbackbones.data.coco_json import read_categories
from mmbackbones.data.det_transforms import LoadImage


def test_a_missing_data_root_is_refused(tmp_path: Path) -> None:
    expect_error(
        r"data_root '.*nowhere' does not exist; set train_dataloader\.dataset\.data_r",
        tmp_path / 'nowhere',
    )


def test_a_missing_annotation_file_is_refused(tmp_path: Path) -> None:
    expect_error(
        r"ann_file '.*ann\.json' does not exist; set val_dataloader\.dataset\.ann_file",
        tmp_path,
        test_mode=True,
    )


@pytest.mark.parametrize(
    ('text', 'pattern'),
    [
        ('', 'is not valid json, perhaps truncated'),
        ('{"images": [{"id": 1, "fi', 'is not valid json, perhaps truncated'),
        ('[]', "needs a list 'images'"),
        ('{"images": []}', "needs a list 'annotations'"),
        ('{"images": [], "annotations": {}}', "needs a list 'annotations'"),
        ('{"images": [], "annotations": []}', "needs a list 'categories'"),
        (
            '{"images": [{"id": 1, "width": 3}], "annotations": [], "categories": []}',
            r'images\[0\] lacks file_name, height',
        ),
        (
            '{"images": [], "annotations": [{"bbox": 1}], "categories": []}',
            r'annotations\[0\] lacks image_id, category_id',
        ),
        (
            '{"images": [], "annotations": [], "categories": ["cat"]}',
            r'categories\[0\] lacks id, name',
        ),
    ],
)
def test_a_file_that_is_not_coco_shaped_is_refused(
    text: str, pattern: str, tmp_path: Path
) -> None:
    (tmp_path / 'ann.json').write_text(text)
    expect_error(rf'ann\.json.*{pattern}', tmp_path)


@pytest.mark.parametrize(
    ('content', 'pattern'),
    [
        (dict(images=[]), 'lists no images'),
        (dict(annotations=[]), 'has no annotations: there is nothing to train on'),
        (
            dict(annotations=[box_entry([1, 1, 0, 4]), box_entry(GOOD, iscrowd=1)]),
            'has no usable box to train on: of 2, 1 zero-area, 1 crowd',
        ),
        (dict(categories=[]), 'lists no categories'),
        (dict(categories=[dict(id=3, name=None)]), 'the name None; ids are int'),
        (dict(categories=[dict(id=7.0, name='a')]), r'the id 7\.0; ids are int'),
        (
            dict(categories=[dict(id=7, name='a'), dict(id=7, name='b')]),
            'lists the category id 7 more than once',
        ),
        (
            dict(categories=[dict(id=7, name='a'), dict(id=8, name='a')]),
            'lists the category name a more than once',
        ),
        (
            dict(annotations=[box_entry(GOOD, i) for i in (0, 90, 7)]),
            '2 annotations of .* have a category id .*: 0, 90; it lists 3, 7',
        ),
        (
            dict(images=[image_entry(), image_entry()]),
            'lists the image id 1 repeatedly',
        ),
        (dict(images=[image_entry() | dict(width=0)]), 'width 0 and the height'),
        (dict(images=[image_entry() | dict(height=None)]), 'the height None; they are'),
        (dict(images=[image_entry() | dict(width='640')]), "the width '640' and"),
        (dict(images=[image_entry() | dict(id=[1])]), r'whose id is \[1\]'),
        (
            dict(annotations=[box_entry(GOOD) | dict(image_id=[1])]),
            r'whose image_id is \[1\]',
        ),
        (
            dict(
                categories=[dict(id=7, name='a'), dict(id='3', name='b')],
                annotations=[box_entry(GOOD, 3)],
            ),
            'has categories of the id 7, 3; ids are integers',
        ),
    ],
)
def test_contents_that_cannot_be_trained_on_are_refused(
    content: dict, pattern: str, tmp_path: Path
) -> None:
    expect_error(rf'ann\.json.*{pattern}|{pattern}', write_set(tmp_path, **content))


def test_classes_that_the_file_lacks_are_refused(tmp_path: Path) -> None:
    expect_error(
        r'metainfo\.classes names bird, cow, which .*ann\.json.* it has dog, cat',
        write_set(tmp_path),
        metainfo=dict(classes=('cat', 'bird', 'cow')),
    )
    expect_error(
        'cannot be chosen with label_from_category_id',
        tmp_path,
        metainfo=dict(classes=('cat', 'dog')),
        label_from_category_id=True,
    )


def test_a_file_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = write_set(tmp_path) / 'ann.json'
    content = json.loads(path.read_text())
    content['images'][0]['file_name'] = 3
    path.write_text(json.dumps(content))
    expect_error(r'ann\.json.* image with id 1 the file_name 3; it is a text', tmp_path)


def test_classes_that_are_stated_twice_are_refused(tmp_path: Path) -> None:
    expect_error(
        r'metainfo\.classes has cat more than once',
        write_set(tmp_path),
        metainfo=dict(classes=('cat', 'dog', 'cat')),
    )


def test_a_missing_image_folder_is_refused(tmp_path: Path) -> None:
    root = write_set(tmp_path)
    (root / 'images' / 'a.png').unlink()
    (root / 'images').rmdir()
    expect_error(r'1 of 1 images of .* are not in ', root)


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    expect_error(
        'missing_images is .skip.; choose', write_set(tmp_path), missing_images='skip'
    )
    expect_error('filter_cfg has min_sizes', tmp_path, filter_cfg=dict(min_sizes=3))


def test_an_unreadable_image_is_refused_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_faults, '_WAITS', ())  # before files are tried again
    root = write_set(tmp_path)
    path = root / 'images' / 'a.png'
    path.write_bytes(path.read_bytes()[:60])
    dataset = build(root, pipeline=[dict(type=LoadImage)])
    with pytest.raises(ValueError, match=r"image '.*a\.png' cannot be read"):
        dataset[0]


@pytest.mark.parametrize('order', ['last', 'first', 'decoy'])
def test_categories_are_read_without_the_rest(order: str, tmp_path: Path) -> None:
    rest = dict(images=[image_entry()], annotations=[box_entry(GOOD)])
    own = dict(categories=CATEGORIES)
    content = {
        'last': {**rest, **own},
        'first': {**own, **rest},
        'decoy': {'info': {'categories': ['x']}, 'categories ': 1, **rest, **own},
    }[order]
    path = tmp_path / 'ann.json'
    for indent in (None, 2):
        path.write_text(json.dumps(content, indent=indent))
        assert read_categories(str(path)) == CATEGORIES
    long = [dict(id=i, name=f'{"name" * 300} {i}') for i in range(2000)]
    path.write_text(json.dumps({**content, 'categories': long}))
    assert read_categories(str(path)) == long


def test_shares_of_the_image_are_no_boxes(tmp_path: Path) -> None:
    shares = grid_of_boxes(lambda x, y, w, h: [x / 40, y / 30, w / 40, h / 30])
    root = write_set(tmp_path, shares)
    expect_error(r'15 of 15 boxes lie between 0 and 1.*\[x, y, width, height\]', root)
    expect_error('15 of 15 boxes', root, test_mode=True)
    assert len(build(write_set(tmp_path, shares[:3]))) == 1  # too few to tell


def test_corners_are_no_boxes(tmp_path: Path) -> None:
    corners = grid_of_boxes(lambda x, y, w, h: [x, y, x + w, y + h])
    root = write_set(tmp_path, corners)
    expect_error(r'reach beyond .* 15 would be right as \[x1, y1, x2, y2\]', root)


def test_negative_ids_are_no_labels(tmp_path: Path) -> None:
    content = dict(
        categories=[dict(id=-1, name='a')], annotations=[box_entry(GOOD, -1)]
    )
    root = write_set(tmp_path, **content)
    expect_error('category ids -1; label_from', root, label_from_category_id=True)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    root = write_set(tmp_path)
    text = (root / 'ann.json').read_text()
    (root / 'ann.json').write_text(text, encoding='utf-8-sig')
    assert len(build(root)) == 1


@pytest.mark.parametrize(
    'text', ['', '{"categories": [{"id": 1, "na', '{"images": []}']
)
def test_reading_categories_refuses_what_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / 'ann.json'
    path.write_text(text)
    with pytest.raises(ValueError, match=r'ann\.json'):
        read_categories(str(path))
