"""The forms in which results are handed on."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from mmbackbones.inference.metadata import ModelInfo
from mmbackbones.inference.results import NO_CLASS, Detections, LabelMap
from mmbackbones.inference.writer import ResultWriter

INFO = ModelInfo(
    task='detection', classes=('cat', 'dog'), category_ids=(17, 18), palette=None
)
SHAPE = (50, 100)
FOUND = Detections(
    info=INFO,
    index=3,
    name='a.jpg',
    path=None,
    shape_hw=SHAPE,
    held_image=np.full((*SHAPE, 3), 40, np.uint8),
    xyxy=np.array([[-10, 5, 30, 25], [50, 10, 60, 40], [110, 0, 120, 5]], np.float32),
    scores=np.array([0.75, 0.5, 0.25], np.float32),
    labels=np.array([1, 0, 0]),
)
NOTHING = replace(
    FOUND, xyxy=FOUND.xyxy[:0], scores=FOUND.scores[:0], labels=FOUND.labels[:0]
)

LABELS = np.zeros(SHAPE, np.int32)
LABELS[10:30, 20:60] = 1
LABELS[15:20, 30:40] = NO_CLASS  # a hole
MAP = LabelMap(
    info=replace(INFO, task='segmentation', palette=((0, 0, 255), (0, 255, 0))),
    index=0,
    name='a.jpg',
    path=None,
    shape_hw=SHAPE,
    held_image=FOUND.held_image,
    labels=LABELS,
)

BARE = replace(MAP, info=replace(MAP.info, palette=None))


def test_coco() -> None:
    first = dict(
        image_id=3,
        file_name='a.jpg',
        category_id=18,
        category_name='dog',
        bbox=[-10.0, 5.0, 40.0, 20.0],
        score=0.75,
    )
    assert FOUND.to_coco()[0] == first
    assert {entry['image_id'] for entry in FOUND.to_coco(99)} == {99}
    assert NOTHING.to_coco() == []
    json.dumps(FOUND.to_coco())


def test_yolo() -> None:
    """The first box is clipped, the last lies outside of the image."""
    lines = FOUND.to_yolo().splitlines()
    assert lines == [
        '1 0.150000 0.300000 0.300000 0.400000',
        '0 0.550000 0.500000 0.100000 0.600000',
    ]
    assert FOUND.to_yolo(with_scores=True).split()[5] == '0.750000'
    assert NOTHING.to_yolo() == ''


def test_yolo_lines_stay_within_the_image() -> None:
    """As others read them: centre and half of the size, in six digits."""
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(-30, 160, (2000, 2, 2)).astype(np.float32), axis=1)
    many = replace(
        FOUND,
        xyxy=corners.reshape(-1, 4),
        scores=np.ones(2000, np.float32),
        labels=np.zeros(2000, np.int64),
    )
    lines = [line.split()[1:] for line in many.to_yolo().splitlines()]
    x, y, w, h = np.array(lines, float).T
    assert len(x) > 500 and (w > 0).all() and (h > 0).all()
    for low, high in ((x - w / 2, x + w / 2), (y - h / 2, y + h / 2)):
        assert low.min() == 0 and high.max() == 1


def test_labelme() -> None:
    content = json.loads(json.dumps(FOUND.to_labelme()))
    assert (content['imageHeight'], content['imageWidth']) == SHAPE
    assert content['shapes'][0]['points'] == [[0.0, 5.0], [30.0, 25.0]]
    assert content['shapes'][0]['label'] == 'dog'


@pytest.mark.parametrize('result', [FOUND, NOTHING])
def test_supervision(result: Detections) -> None:
    pytest.importorskip('supervision', reason='supervision is not installed')
    found = result.to_supervision()
    assert len(found) == len(result)
    assert (found.xyxy == result.xyxy).all() and (found.class_id == result.labels).all()
    assert found.data['class_name'].tolist() == result.names
    assert len(found[found.confidence > 0.6]) == min(len(result), 1)


def test_dataframe() -> None:
    pytest.importorskip('pandas', reason='pandas is not installed')
    table = FOUND.to_dataframe()
    assert table.category_id.tolist() == [18, 17, 17]
    assert table.x2.tolist() == [30, 60, 120]
    assert list(NOTHING.to_dataframe().columns) == list(table.columns)
    assert MAP.to_dataframe().pixels.tolist() == [50 * 100 - 800, 750]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('supervision', 'pandas'):
        monkeypatch.setitem(__import__('sys').modules, name, None)
    with pytest.raises(ValueError, match='pip install supervision'):
        FOUND.to_supervision()
    with pytest.raises(ValueError, match='pip install pandas'):
        MAP.to_dataframe()


@pytest.mark.parametrize('result', [FOUND, NOTHING, MAP, BARE])
def test_a_plot_leaves_the_image(result: Detections) -> None:
    before = result.image.copy()
    picture = result.plot()
    assert picture.shape == before.shape and picture.dtype == np.uint8
    assert (result.image == before).all()
    assert (picture != before).any() == (result is not NOTHING)


def test_boxes_are_drawn_where_they_are() -> None:
    picture = FOUND.plot()
    assert (picture[39:42, 52:58] != 40).any() and (picture[45:, 65:] == 40).all()
    far = replace(FOUND, xyxy=np.array([[np.nan, -1e30, 1e30, np.inf]] * 3, np.float32))
    assert far.plot().shape == (*SHAPE, 3)


def test_id_maps() -> None:
    ids = MAP.id_map()
    assert ids.dtype == np.uint8 and ids[0, 0] == 17 and ids[12, 25] == 18
    assert ids[17, 35] == 0  # no class
    many = replace(MAP, info=replace(MAP.info, category_ids=(0, 300)))
    assert many.id_map().dtype == np.uint16 and many.id_map()[17, 35] == 255


def test_maps_as_coco_labelme_and_supervision() -> None:
    entries = MAP.to_coco()
    assert [entry['category_id'] for entry in entries] == [17, 18]
    mask = coco_mask.decode(entries[1]['segmentation'])
    assert (mask == (LABELS == 1)).all() and entries[1]['area'] == 750
    shape = MAP.to_labelme()['shapes'][1]
    png = np.frombuffer(base64.b64decode(shape['mask']), np.uint8)
    inside = cv2.imdecode(png, cv2.IMREAD_UNCHANGED)
    (x1, y1), (x2, y2) = shape['points']
    assert (x1, y1, x2, y2) == (20, 10, 59, 29)
    assert (inside == (LABELS == 1)[y1 : y2 + 1, x1 : x2 + 1]).all()
    with pytest.raises(ValueError, match='label map has none'):
        MAP.to_yolo()
    pytest.importorskip('supervision', reason='supervision is not installed')
    found = MAP.to_supervision()
    assert found.mask.sum((1, 2)).tolist() == [4200, 750]
    assert found.data['class_name'].tolist() == ['cat', 'dog']


@pytest.mark.parametrize(
    ('result', 'name', 'format'),
    [
        (FOUND, 'x/a.jpg', None),
        (FOUND, 'a.json', None),
        (FOUND, 'a.json', 'labelme'),
        (FOUND, 'a.txt', None),
        (MAP, 'a.png', 'id_map'),
        (MAP, 'a.png', None),
    ],
)
def test_save(
    result: Detections, name: str, format: str | None, tmp_path: Path
) -> None:
    result.save(tmp_path / name, format=format)
    assert (tmp_path / name).stat().st_size > 0
    if format == 'id_map':
        assert (np.asarray(Image.open(tmp_path / name)) == MAP.id_map()).all()
    if format == 'labelme':
        assert json.loads((tmp_path / name).read_text())['shapes']


def test_save_says_what_it_knows(tmp_path: Path) -> None:
    known = r'suffix says no format; choose one of picture \(.jpg .*yolo \(.txt\)'
    for name in ('a.xyz', 'a', 'a.j'):
        with pytest.raises(ValueError, match=known):
            FOUND.save(tmp_path / name)
    with pytest.raises(ValueError, match='choose one of'):
        MAP.save(tmp_path / 'a.txt', format='yolo')
    with pytest.raises(ValueError, match=r"no pictures end in '.xyz'; take .jpg"):
        FOUND.save(tmp_path / 'a.xyz', format='picture')


@pytest.mark.parametrize(
    ('task', 'folder', 'name', 'pictures'),
    [
        ('detection', '.', 'a.jpg', True),
        ('segmentation', 'pictures', 'a.jpg', True),
        ('segmentation', 'id_maps', 'a.png', False),
    ],
)
def test_writer_leaves_the_images_that_are_read(
    task: str, folder: str, name: str, pictures: bool, tmp_path: Path
) -> None:
    writer = ResultWriter(tmp_path, task, pictures=pictures, formats=())
    elsewhere = [str(tmp_path / 'other' / name), str(tmp_path / 'b.jpg' / name)]
    writer.check_sources(elsewhere)
    same = tmp_path / 'other' / '..' / folder / name
    with pytest.raises(ValueError, match=f"written over the image '.*{name}'; choose"):
        writer.check_sources([*elsewhere, str(same)])
    ResultWriter(tmp_path, 'detection', pictures=False).check_sources([str(same)])


def test_writer_refuses_names_that_share_a_file(tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path, 'segmentation', formats=())
    with pytest.raises(ValueError, match=r"several suffixes.*: 'a' is one"):
        writer.check_names(['a.jpg', 'a.png', 'b.jpg'])
    writer = ResultWriter(tmp_path, 'detection')
    writer.check_names(['a.jpg', 'a.png'])
    with pytest.raises(ValueError, match=r"'a.jpg' is one"):
        writer.check_names(['a.jpg', 'a.jpg'])
    ResultWriter(tmp_path, 'detection', pictures=False).check_names(['a.jpg', 'a.jpg'])
    with pytest.raises(ValueError, match="'yolo' is none of segmentation"):
        ResultWriter(tmp_path, 'segmentation', formats=['yolo'])
