"""COCO-style sets: what is kept, what is dropped and counted, how it is loaded."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from coco_helpers import (
    CATEGORIES,
    GOOD,
    HEIGHT,
    INF,
    NAN,
    WIDTH,
    box_entry,
    boxes_of,
    build,
    expect_error,
    grid_of_boxes,
    image_entry,
    write_set,
)
from mmcv.transforms import LoadImageFromFile
from mmdet.apis import DetInferencer
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
from mmengine.config import Config
from mmengine.dataset import Compose

import mmbackbones.data.coco as coco_module
from mmbackbones.data.det_transforms import LoadImage


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that the data set writes to the log."""
    lines: list[str] = []
    monkeypatch.setattr(
        coco_module, 'print_log', lambda line, logger, level=20: lines.append(line)
    )
    return lines


def test_an_image_without_boxes_is_trained_on(tmp_path: Path, log: list[str]) -> None:
    images = [image_entry(1), image_entry(2, 'b.png')]
    dataset = build(write_set(tmp_path, images=images))
    assert len(dataset) == 2
    assert boxes_of(dataset, 1) == []
    assert log[0].endswith(
        'ann.json: 2 images (1 without boxes), 1 boxes, 2 classes; dropped no boxes'
    )


@pytest.mark.parametrize(
    ('bbox', 'kept', 'reason'),
    [
        ([4, 5, 10, 12], [4, 5, 14, 17], None),
        ([0, 0, WIDTH, HEIGHT], [0, 0, WIDTH, HEIGHT], None),
        ([-3, -2, 10, 12], [0, 0, 7, 10], None),
        ([35, 25, 10, 12], [35, 25, WIDTH, HEIGHT], None),
        ([4.5, 5.5, 0.25, 0.25], [4.5, 5.5, 4.75, 5.75], None),
        ([4, 5, 0, 12], None, 'zero-area'),
        ([4, 5, 10, 0], None, 'zero-area'),
        ([4, 5, -10, 12], None, 'inverted'),
        ([4, 5, -10, -12], None, 'inverted'),
        ([NAN, 5, 10, 12], None, 'NaN or infinite'),
        ([4, 5, INF, 12], None, 'NaN or infinite'),
        ([WIDTH, 5, 10, 12], None, 'outside the image'),
        ([4, -20, 10, 12], None, 'outside the image'),
        ([4, 5, 10], None, 'not four numbers'),
        ([4, 5, None, 12], None, 'not four numbers'),
        (None, None, 'not four numbers'),
    ],
)
def test_boxes_are_clamped_or_dropped_and_counted(
    bbox: object, kept: list | None, reason: str | None, tmp_path: Path, log: list[str]
) -> None:
    dataset = build(write_set(tmp_path, [box_entry(bbox), box_entry(GOOD)]))
    good = [4, 5, 14, 17]
    assert boxes_of(dataset) == ([good] if kept is None else [kept, good])
    dropped = f'dropped 1 of 2 boxes: 1 {reason}' if reason else 'dropped no boxes'
    assert len([line for line in log if dropped in line]) == 1


def test_all_drops_are_in_one_line(tmp_path: Path, log: list[str]) -> None:
    annotations = [
        box_entry(GOOD),
        box_entry(GOOD, 3, iscrowd=1),
        box_entry(GOOD, 3, iscrowd=1),
        box_entry(GOOD, 3, ignore=1),
        box_entry([4, 5, 0, 3], 3),
        box_entry([NAN, 5, 3, 3], 3),
        box_entry(GOOD, 3, image_id=99),
    ]
    for test_mode in (False, True):
        log.clear()
        dataset = build(write_set(tmp_path, annotations), test_mode=test_mode)
        assert boxes_of(dataset) == [[4, 5, 14, 17]]
        assert log[0].endswith(
            'dropped 6 of 7 boxes: 3 crowd, 1 zero-area, 1 NaN or infinite, '
            '1 of images not listed'
        )


def test_labels_count_the_categories_by_rising_id(tmp_path: Path) -> None:
    root = write_set(tmp_path, [box_entry(GOOD, 7), box_entry(GOOD, 3)])
    dataset = build(root)
    assert dataset.metainfo == dict(classes=('cat', 'dog'), category_ids=(3, 7))
    labels = [x['bbox_label'] for x in dataset.get_data_info(0)['instances']]
    assert labels == [1, 0]


def test_stated_classes_keep_their_order(tmp_path: Path) -> None:
    root = write_set(tmp_path, [box_entry(GOOD, 7), box_entry(GOOD, 3)])
    dataset = build(root, metainfo=dict(classes=('dog', 'cat')))
    assert dataset.metainfo == dict(classes=('dog', 'cat'), category_ids=(7, 3))
    labels = [x['bbox_label'] for x in dataset.get_data_info(0)['instances']]
    assert labels == [0, 1]


def test_a_part_of_the_classes_may_be_stated(tmp_path: Path, log: list[str]) -> None:
    root = write_set(tmp_path, [box_entry(GOOD, 7), box_entry(GOOD, 3)])
    dataset = build(root, metainfo=dict(classes=('cat',)))
    assert dataset.metainfo == dict(classes=('cat',), category_ids=(3,))
    assert len(boxes_of(dataset)) == 1
    assert log[0].endswith('dropped 1 of 2 boxes: 1 of other classes')


def test_labels_may_be_the_category_ids(tmp_path: Path, log: list[str]) -> None:
    root = write_set(tmp_path, [box_entry(GOOD, 7), box_entry(GOOD, 3)])
    dataset = build(root, label_from_category_id=True)
    assert len(dataset.metainfo['classes']) == 8
    assert dataset.metainfo['classes'][3] == 'cat'
    assert dataset.metainfo['classes'][0] == 'unused 0'
    assert dataset.metainfo['category_ids'] == tuple(range(8))
    labels = [x['bbox_label'] for x in dataset.get_data_info(0)['instances']]
    assert labels == [7, 3]
    assert len(log) == 1  # no warning about the unused rows
    again = build(root, label_from_category_id=True, metainfo=dataset.metainfo)
    assert again.metainfo == dataset.metainfo


def test_categories_without_a_box_are_named(tmp_path: Path, log: list[str]) -> None:
    """As in Roboflow's files, where id 0 is a super-category that no box has."""
    categories = [dict(id=0, name='animals'), *CATEGORIES]
    root = write_set(tmp_path, [box_entry(GOOD, 7), box_entry(GOOD, 3)])
    build(root)
    assert len(log) == 1
    write_set(tmp_path, [box_entry(GOOD), box_entry(GOOD, 3)], categories=categories)
    build(root)
    assert 'lists 1 categories without any box: animals.' in log[2]
    build(root, test_mode=True)
    assert len(log) == 4


@pytest.mark.parametrize(
    ('filter_cfg', 'kept'),
    [
        (None, [1, 2]),
        (dict(), [1, 2]),
        (dict(filter_empty_gt=True), [1]),
        (dict(min_size=HEIGHT), [1, 2]),
    ],
)
def test_filters_of_mmdet_work(
    filter_cfg: dict | None, kept: list, tmp_path: Path
) -> None:
    root = write_set(tmp_path, images=[image_entry(1), image_entry(2, 'b.png')])
    dataset = build(root, filter_cfg=filter_cfg)
    assert [dataset.get_data_info(i)['img_id'] for i in range(len(dataset))] == kept
    assert len(build(root, filter_cfg=filter_cfg, test_mode=True)) == 2
    expect_error('leaves none of the 2 images', root, filter_cfg=dict(min_size=31))


def test_a_lazy_data_set_needs_no_files(tmp_path: Path) -> None:
    """Inference builds the test set for its metainfo, on machines without data."""
    classes = ('cat', 'dog')
    dataset = build(tmp_path, lazy_init=True, metainfo=dict(classes=classes))
    assert dataset.metainfo == dict(classes=classes)


def test_a_test_set_needs_no_annotations(tmp_path: Path) -> None:
    content = dict(images=[image_entry()], categories=CATEGORIES)
    write_set(tmp_path)
    (tmp_path / 'ann.json').write_text(json.dumps(content))
    assert boxes_of(build(tmp_path, test_mode=True)) == []


def test_missing_images_are_refused_or_left_out(tmp_path: Path, log: list[str]) -> None:
    names = ['a.png', 'sub/b.png', 'c.png']
    images = [image_entry(i, name) for i, name in enumerate(names)]
    annotations = [box_entry(GOOD, image_id=i) for i in (0, 1, 1)]
    root = write_set(tmp_path, annotations, images)
    assert len(build(root)) == 3
    (root / 'images' / 'sub' / 'b.png').unlink()
    (root / 'images' / 'c.png').unlink()
    pattern = r'2 of 3 images of .*ann\.json.* are not in .*: sub/b\.png, c\.png; set '
    expect_error(pattern + r"train_.*data_prefix\.img, or missing_images='drop'", root)
    expect_error(pattern + 'val_', root, test_mode=True, missing_images='drop')
    log.clear()
    assert len(build(root, missing_images='drop')) == 1
    assert log[0].endswith(
        '1 images (0 without boxes), 1 boxes, 2 classes; dropped 2 of 3 boxes: '
        '2 of images not on disk; left out 2 images not on disk'
    )


def test_good_boxes_are_no_mistake_and_cut_ones_are_counted(
    tmp_path: Path, log: list[str]
) -> None:
    good = grid_of_boxes(lambda *box: list(box))
    build(write_set(tmp_path, good))
    assert log[0].endswith('dropped no boxes')
    log.clear()
    beyond = [box_entry([35, 25, 20, 20]), box_entry([-5, 2, 10, 10])]
    build(write_set(tmp_path, [*good, *beyond]))
    assert log[0].endswith('dropped no boxes; cut 2 at the edge of their image')


PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type=Resize, scale=(64, 64), keep_ratio=False),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=PackDetInputs, meta_keys=('img_id', 'ori_shape', 'img_shape')),
]


def test_a_plain_loader_reads_as_ours_does(tmp_path: Path) -> None:
    """Also in a pipeline that is put in place later, but not one with own settings."""
    root = write_set(tmp_path)
    dataset = build(root, pipeline=PIPELINE)
    assert type(dataset.pipeline.transforms[0]) is LoadImage
    dataset.pipeline = Compose(PIPELINE[:1])
    assert type(dataset.pipeline.transforms[0]) is LoadImage
    chosen = [dict(type=LoadImageFromFile, color_type='unchanged')]
    dataset.pipeline = Compose(chosen)
    assert type(dataset.pipeline.transforms[0]) is LoadImageFromFile
    dataset = pickle.loads(pickle.dumps(build(root, pipeline=PIPELINE)))
    sample = dataset[0]['data_samples']
    assert sample.ori_shape == (HEIGHT, WIDTH)
    assert sample.gt_instances.labels.tolist() == [1]


def test_the_test_pipeline_serves_mmdets_inferencer(tmp_path: Path) -> None:
    """It looks for a loader of mmdet's name, in a dumped config, too."""
    root = write_set(tmp_path)
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=PIPELINE))))
    inferencer = DetInferencer.__new__(DetInferencer)
    del cfg.test_dataloader.dataset.pipeline[2]  # no annotations to load
    pipeline = inferencer._init_pipeline(cfg)
    path = str(root / 'images' / 'a.png')
    for source in (path, np.zeros((HEIGHT, WIDTH, 3), np.uint8)):
        packed = pipeline(source)
        assert packed['inputs'].shape == (3, 64, 64)
        assert packed['data_samples'].ori_shape == (HEIGHT, WIDTH)
