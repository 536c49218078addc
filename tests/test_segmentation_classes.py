"""Ids and names of classes: tables, class files, and what follows in a config."""

from pathlib import Path

import pytest
from mmengine.config import Config

from mmbackbones.data.seg_classes import (
    IGNORED,
    UNKNOWN,
    LabelTable,
    resolve_seg_classes,
)
from mmbackbones.data.seg_folders import ADE20K, SegmentationFolders

NAMES = ('sky', 'road', 'car')


@pytest.mark.parametrize('name', ['a.txt', 'a.yaml'])
@pytest.mark.parametrize('first', [0, 1])
def test_a_list_in_a_file_counts_likewise(
    name: str, first: int, tmp_path: Path
) -> None:
    text = 'sky\nroad\ncar\n' if name.endswith('txt') else '[sky, road, car]'
    (tmp_path / name).write_text(text)
    table = LabelTable.of(
        class_file=str(tmp_path / name), reduce_zero_label=bool(first)
    )
    assert table.classes == NAMES
    assert table.category_ids == (first, first + 1, first + 2)


def test_chosen_classes_leave_the_others_ignored(tmp_path: Path) -> None:
    (tmp_path / 'c.yaml').write_text('{0: unlabelled, 7: sky, 200: road, 1000: car}')
    table = LabelTable.of(
        classes=('car', 'sky'),
        class_file=str(tmp_path / 'c.yaml'),
        reduce_zero_label=True,
    )
    assert table.category_ids == (1000, 7)
    assert table.ignored_ids == (0, 200, 255)
    lookup = table.lookup()
    assert [lookup[i] for i in (0, 1, 7, 200, 255, 1000)] == [
        IGNORED, UNKNOWN, 1, IGNORED, IGNORED, 0]  # fmt: skip


def test_id_255_may_be_a_class_by_name(tmp_path: Path) -> None:
    (tmp_path / 'c.yaml').write_text('{0: sky, 255: road}')
    table = LabelTable.of(class_file=str(tmp_path / 'c.yaml'))
    assert table.lookup()[255] == 1 and table.ignored_ids == ()


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'neither a list of names nor a mapping'),
        ('[]', 'is empty'),
        ('{}', 'is empty'),
        ('classes: 5', 'neither a list of names nor a mapping'),
        ('sky', 'neither a list of names nor a mapping'),
        ('sky: 1', "entry 'sky': 1; an id is an integer"),
        ('{0: no, 1: sky}', 'entry 0: False; .* need quotes'),
        ('{0: sky, 1: ~}', 'entry 1: None; .* need quotes'),
        ('{0: sky, 1: {name: road}}', 'entry 1: .*a name is a text'),
        ('{1.5: sky}', 'entry 1.5'),
        ('{true: sky}', 'entry True'),
        ('{0: sky, 0: road}', 'a key occurs twice'),
        ('{0: sky, "0": road}', "entry '0': 'road'.* occurs once"),
        ('[sky', 'is broken'),
        ('{0: sky, 1: sky}', 'names sky repeatedly'),
        ('{-1: sky}', 'ids -1; ids are 0 to 65535'),
        ('{0: ""}', 'empty names'),
        (str(dict(enumerate('c' + str(i) for i in range(256)))), '255 are possible'),
    ],
)
def test_wrong_class_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / 'c.yaml').write_text(text)
    with pytest.raises(ValueError, match=message):
        LabelTable.of(class_file=str(tmp_path / 'c.yaml'))


def seg_config(root: Path, num_classes: int | None, **train: object) -> Config:
    def loader(**options: object) -> dict:
        dataset = dict(
            type=SegmentationFolders, data_root=str(root), class_file='c.txt'
        )
        return dict(dataset={**dataset, **options})

    return Config(
        dict(
            model=dict(num_classes=num_classes, decode_head=dict()),
            train_dataloader=loader(**train),
            val_dataloader=loader(),
        )
    )


@pytest.mark.parametrize('stated', [None, 3])
def test_num_classes_follows_the_class_file(stated: int | None, tmp_path: Path) -> None:
    (tmp_path / 'c.txt').write_text('sky\nroad\ncar\n')
    cfg = resolve_seg_classes(seg_config(tmp_path, stated))
    assert cfg.model.num_classes == 3


def test_num_classes_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r'train_dataloader.dataset: class_file .*c.txt'
    ):
        resolve_seg_classes(seg_config(tmp_path, None))
    assert resolve_seg_classes(seg_config(tmp_path, 5)).model.num_classes == 5
    (tmp_path / 'c.txt').write_text('sky\nroad\ncar\n')
    with pytest.raises(ValueError, match=r'is 5, but train_dataloader.* 3 classes'):
        resolve_seg_classes(seg_config(tmp_path, 5))
    other = dict(metainfo=dict(classes=['sky', 'road']))
    with pytest.raises(ValueError, match=r'other classes .* differ in car'):
        resolve_seg_classes(seg_config(tmp_path, None, **other))
    swapped = dict(metainfo=dict(classes=['road', 'sky', 'car']))
    with pytest.raises(ValueError, match='differ in their order'):
        resolve_seg_classes(seg_config(tmp_path, None, **swapped))
    with pytest.raises(ValueError, match='the config has no segmentation set'):
        resolve_seg_classes(Config(dict(model=dict(num_classes=None))))


def test_classes_of_known_sets_and_of_wrapped_ones() -> None:
    wrapped = dict(
        type='RepeatDataset', times=2, dataset=dict(type=ADE20K, data_root='none')
    )
    cfg = Config(
        dict(
            model=dict(num_classes=None),
            train_dataloader=dict(dataset=wrapped),
            val_dataloader=dict(dataset=dict(type='mmseg.ADE20KDataset')),
        )
    )
    assert resolve_seg_classes(cfg).model.num_classes == 150


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r'has moon, which .* it has sky, road'):
        LabelTable.of(classes=('moon',), known=NAMES)


def test_a_choice_of_classes_has_each_once(tmp_path: Path) -> None:
    for classes, message in (
        (('sky', 'sky'), 'metainfo.classes has the names sky repeatedly'),
        ('sky', "metainfo.classes is 'sky'; it takes a list"),
        ((), 'metainfo.classes is empty'),
    ):
        with pytest.raises(ValueError, match=message):
            LabelTable.of(classes=classes, known=NAMES)


def test_class_files_of_other_encodings(tmp_path: Path) -> None:
    path = tmp_path / 'c.txt'
    path.write_bytes('sky\ncafé\n'.encode('utf-8-sig'))  # as Windows' editor saves it
    assert LabelTable.of(class_file=str(path)).classes == ('sky', 'café')
    path.write_bytes('sky\ncafé\n'.encode('latin-1'))
    with pytest.raises(ValueError, match=r'c\.txt. is no UTF-8 text'):
        LabelTable.of(class_file=str(path))
