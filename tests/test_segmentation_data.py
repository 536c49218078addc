"""Segmentation sets: ids to labels, folders, and one clear error for what is wrong."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mmseg.datasets import ADE20KDataset
from PIL import Image

from mmbackbones.data import read_faults
from mmbackbones.data.seg_classes import IGNORED, LabelTable
from mmbackbones.data.seg_folders import ADE20K, SegmentationFolders
from mmbackbones.data.seg_transforms import LoadLabelMap, LoadSegImage
from mmbackbones.data.synthetic import SEGMENTS, draw_scene, draw_segmentation_set

# As mmseg's inferencer wants them; the set reads with LoadSegImage, LoadLabelMap.
PIPELINE = [dict(type='LoadImageFromFile'), dict(type='mmseg.LoadAnnotations')]
NAMES = ('sky', 'road', 'car')


def write_pair(
    root: Path, ids: np.ndarray | list, name: str = 'a', image_hw: tuple | None = None
) -> Path:
    """One image, grey, and its label map."""
    ids = np.asarray(ids)
    for folder in ('images', 'maps'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    height, width = image_hw or ids.shape
    Image.new('RGB', (width, height), 'grey').save(root / 'images' / f'{name}.jpg')
    dtype = np.uint8 if ids.max() < 256 else np.uint16
    Image.fromarray(ids.astype(dtype)).save(root / 'maps' / f'{name}.png')
    return root


def folders(root: Path, **options: object) -> SegmentationFolders:
    defaults = dict(
        data_root=str(root),
        data_prefix=dict(img_path='images', seg_map_path='maps'),
        metainfo=dict(classes=NAMES),
        pipeline=PIPELINE,
    )
    return SegmentationFolders(**{**defaults, **options})


def labels_of(dataset: SegmentationFolders, index: int = 0) -> list:
    return dataset[index]['gt_seg_map'].tolist()


# Ids of a map -> labels.
@pytest.mark.parametrize(
    ('options', 'ids', 'labels'),
    [
        (dict(), [[0, 1], [2, 255]], [[0, 1], [2, IGNORED]]),
        (dict(reduce_zero_label=True), [[0, 1], [3, 255]], [[IGNORED, 0], [2, 255]]),
    ],
    ids=['from 0', 'from 1'],
)
def test_plain_lists_count_from_zero_or_one(
    options: dict, ids: list, labels: list, tmp_path: Path
) -> None:
    assert labels_of(folders(write_pair(tmp_path, ids), **options)) == labels


CLASS_FILES = {
    'mapping.yaml': '0: unlabelled\n7: sky\n200: road\n1000: car\n',
    'below.yaml': 'classes:\n  7: sky\n  200: road\n  1000: car\ntrain: images\n',
    'names.yml': 'names: {7: sky, 200: road, 1000: car}',
    'mapping.json': '{"7": "sky", "200": "road", "1000": "car"}',
}


@pytest.mark.parametrize('name', CLASS_FILES)
def test_a_class_file_gives_any_ids(name: str, tmp_path: Path) -> None:
    write_pair(tmp_path, [[0, 7, 200], [1000, 255, 7]])
    (tmp_path / name).write_text(CLASS_FILES[name])
    dataset = folders(tmp_path, metainfo=None, class_file=name, reduce_zero_label=True)
    assert dataset.metainfo['classes'] == NAMES
    assert dataset.metainfo['category_ids'] == (7, 200, 1000)
    assert len(dataset.metainfo['palette']) == 3
    assert labels_of(dataset) == [[255, 0, 1], [2, 255, 0]]


def test_missing_class_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"class_file '.*none.txt' does not exist"):
        folders(write_pair(tmp_path, [[0]]), metainfo=None, class_file='none.txt')


def ade_root(root: Path, ids: list) -> Path:
    """The layout of ADEChallengeData2016, one pair in each half."""
    for half in ('training', 'validation'):
        for kind, suffix in (('images', 'jpg'), ('annotations', 'png')):
            (root / kind / half).mkdir(parents=True)
            name = f'ADE_{half[:5]}_00000001.{suffix}'
            pixels = np.array(ids, np.uint8)
            picture = Image.fromarray(pixels)
            if kind == 'images':
                picture = Image.new('RGB', pixels.shape[::-1])
            picture.save(root / kind / half / name)
    return root


@pytest.mark.parametrize('above', [False, True])
def test_ade20k_void_is_ignored_and_classes_start_at_zero(
    above: bool, tmp_path: Path
) -> None:
    ids = [[0, 1, 2], [149, 150, 0]]
    root = ade_root(tmp_path / 'ADEChallengeData2016', ids)
    dataset = ADE20K(
        data_root=str(root.parent if above else root),
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'
        ),
        pipeline=PIPELINE,
    )
    assert labels_of(dataset) == [[255, 0, 1], [148, 149, 255]]
    assert dataset.metainfo['classes'] == tuple(ADE20KDataset.METAINFO['classes'])
    assert dataset.metainfo['category_ids'] == tuple(range(1, 151))
    assert dataset.metainfo['palette'] == ADE20KDataset.METAINFO['palette']


def test_some_classes_of_ade20k(tmp_path: Path) -> None:
    root = ade_root(tmp_path, [[0, 1, 2, 3]])
    dataset = ADE20K(
        data_root=str(root),
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'
        ),
        metainfo=dict(classes=('sky', 'wall')),
        pipeline=PIPELINE,
    )
    assert labels_of(dataset) == [[255, 1, 255, 0]]
    colours = ADE20KDataset.METAINFO['palette']
    assert dataset.metainfo['palette'] == [colours[2], colours[0]]


def colour_map(root: Path) -> None:
    Image.new('RGB', (2, 1)).save(root / 'maps' / 'a.png')


def fractional_map(root: Path) -> None:
    fractions = np.array([[0, 1.5]], np.float32)
    Image.fromarray(fractions).save(root / 'maps' / 'a.png', format='TIFF')


def broken_map(root: Path) -> None:
    data = (root / 'maps' / 'a.png').read_bytes()
    (root / 'maps' / 'a.png').write_bytes(data[:20])


def broken_pixels(root: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 3, (1, 999))
    write_pair(root, ids)
    data = (root / 'maps' / 'a.png').read_bytes()
    (root / 'maps' / 'a.png').write_bytes(data[:90])


def no_image(root: Path) -> None:
    (root / 'images' / 'a.jpg').write_bytes(b'')


@pytest.mark.parametrize(
    ('ids', 'damage', 'message'),
    [
        (
            [[0, 3]],
            None,
            r"a.png' has 1 pixels .* no class: 3; .*0 to 255",
        ),
        ([[9, 0, 4], [4, 4, 0]], None, 'has 4 pixels .*: 4, 9'),
        ([[0, 300]], None, 'no class: 300'),
        ([[0, 1]], colour_map, "a.png' is a colour picture"),
        ([[0, 1]], fractional_map, "a.png' has fractions"),
        ([[0, 1]], broken_map, "label map '.*a.png' cannot be read"),
        ([[0, 1]], broken_pixels, "label map '.*a.png' is broken"),
        ([[0, 1]], no_image, "image '.*a.jpg' cannot be read"),
    ],
)
def test_what_is_wrong_with_a_map(
    ids: list,
    damage: Callable | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(read_faults, '_WAITS', ())  # before files are tried again
    write_pair(tmp_path, ids)
    if damage:
        damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        folders(tmp_path)[0]


def test_map_of_another_size_names_both(tmp_path: Path) -> None:
    write_pair(tmp_path, np.zeros((4, 6)), image_hw=(5, 6))
    with pytest.raises(ValueError, match=r"a.png' is 6 x 4 .*a.jpg' is 6 x 5"):
        folders(tmp_path)[0]


@pytest.mark.parametrize('upright', [False, True])
def test_the_map_says_which_way_a_rotated_photo_is(
    upright: bool, tmp_path: Path
) -> None:
    write_pair(tmp_path, np.zeros((6, 4) if upright else (4, 6)))
    image = Image.new('RGB', (6, 4))
    image.paste('white', (0, 0, 6, 1))  # the stored first row
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image.save(tmp_path / 'images' / 'a.png', exif=exif)
    (tmp_path / 'images' / 'a.jpg').unlink()
    sample = folders(tmp_path)[0]
    assert sample['img'].shape[:2] == sample['gt_seg_map'].shape
    bright = sample['img'][:, -1] if upright else sample['img'][0]
    assert (bright == 255).all()


def remove_maps(root: Path) -> None:
    (root / 'maps' / 'a.png').unlink()


def remove_map_folder(root: Path) -> None:
    remove_maps(root)
    (root / 'maps').rmdir()


def remove_images(root: Path) -> None:
    (root / 'images' / 'a.jpg').unlink()


def second_suffix(root: Path) -> None:
    (root / 'images' / 'a.png').touch()


@pytest.mark.parametrize(
    ('damage', 'options', 'message'),
    [
        (None, dict(data_root='gone'), "data_root 'gone' .* give --data-root"),
        (remove_map_folder, dict(), 'data_prefix.seg_map_path .*maps.* does not exist'),
        (
            None,
            dict(data_prefix=dict(img_path='images')),
            'train_dataloader.dataset.data_prefix.seg_map_path is not set',
        ),
        (remove_maps, dict(), '1 of 1 images .* no label map .* a.jpg'),
        (None, dict(seg_map_suffix='_gt.png'), 'the map of a.jpg is a_gt.png'),
        (remove_images, dict(), 'no images in .*none ends in .jpg'),
        (None, dict(img_suffix='.png'), 'none ends in .png'),
        (second_suffix, dict(), "'a.png' and 'a.jpg' .* share a label map"),
        (None, dict(ann_file='list.txt'), "ann_file '.*list.txt' does not exist"),
        (None, dict(metainfo=None), 'empty: set class_file or metainfo.classes'),
    ],
)
def test_what_is_missing(
    damage: Callable | None, options: dict, message: str, tmp_path: Path
) -> None:
    write_pair(tmp_path, [[0, 1]])
    if damage:
        damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        folders(tmp_path, **options)


def test_suffixes_may_be_mixed_and_a_list_chooses(tmp_path: Path) -> None:
    for name in 'abc':
        write_pair(tmp_path, [[0]], name)
    (tmp_path / 'images' / 'b.jpg').rename(tmp_path / 'images' / 'b.JPEG')
    write_pair(tmp_path, [[1]], 'd')
    (tmp_path / 'maps' / 'extra.png').touch()
    assert len(folders(tmp_path)) == 4
    (tmp_path / 'list.txt').write_text('d\nb\n')
    chosen = folders(tmp_path, ann_file='list.txt')
    names = [Path(chosen.get_data_info(i)['img_path']).name for i in range(2)]
    assert names == ['d.jpg', 'b.JPEG'] and len(chosen) == 2
    (tmp_path / 'list.txt').write_text('d\ne\n')
    with pytest.raises(ValueError, match=r'1 of 2 images .* are not in .*: e'):
        folders(tmp_path, ann_file='list.txt')


def test_loaders_of_mmseg_are_replaced_only_at_their_defaults(tmp_path: Path) -> None:
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='mmseg.LoadAnnotations'),
        dict(type='LoadImageFromFile', to_float32=True),
    ]
    dataset = folders(write_pair(tmp_path, [[0]]), pipeline=pipeline)
    kinds = [type(step).__name__ for step in dataset.pipeline.transforms]
    assert kinds == ['LoadSegImage', 'LoadLabelMap', 'LoadImageFromFile']


def test_without_a_map_an_image_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new('RGB', (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / 'a.jpg', exif=exif)
    results = LoadSegImage()(dict(img_path=str(tmp_path / 'a.jpg')))
    assert results['ori_shape'] == (6, 4)


def test_the_drawn_set(tmp_path: Path) -> None:
    root = draw_segmentation_set(
        tmp_path / 'set', num_train=3, num_val=1, image_size=64
    )
    dataset = SegmentationFolders(
        data_root=str(root),
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'
        ),
        class_file='classes.txt',
        reduce_zero_label=True,
        pipeline=PIPELINE,
    )
    assert dataset.metainfo['classes'] == SEGMENTS
    assert len(dataset) == 3
    scene = draw_scene(np.random.default_rng((0, False, 64, 0)), 64, 8)
    labels = np.unique(dataset[0]['gt_seg_map'])
    assert {0, IGNORED} < set(labels.tolist()) and len(labels) > 2
    assert scene.label_map().shape == scene.image.shape[:2]


def test_label_maps_of_a_scene_agree_with_its_objects() -> None:
    scene = draw_scene(np.random.default_rng(3), 96, 4)
    label_map = scene.label_map()
    assert label_map.max() == max(scene.labels) + 2
    for label in set(scene.labels):
        owned = sum(scene.area(i) for i, k in enumerate(scene.labels) if k == label)
        inside = (label_map == label + 2).sum()
        assert 0.7 * owned < inside <= owned
    assert 0 < (label_map == 0).mean() < 0.1


def test_a_map_that_is_not_there() -> None:
    table = LabelTable.of(known=NAMES).lookup()
    with pytest.raises(ValueError, match=r"label map 'gone.png' cannot be read"):
        LoadLabelMap()(dict(seg_map_path='gone.png', id_to_label=table))
