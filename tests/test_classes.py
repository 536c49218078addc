"""The number of classes follows from the annotation file into the config."""

import json
from pathlib import Path

import pytest
from mmengine.config import Config

from mmbackbones.data.classes import resolve_classes
from mmbackbones.data.coco import CocoDetection

NAMES = {2: 'cat', 5: 'dog', 9: 'emu'}


def write_json(path: Path, names: dict[int, str] = NAMES) -> None:
    # As an annotation tool may order them, not by id.
    categories = [dict(id=i, name=name) for i, name in reversed(names.items())]
    content = dict(images=[], annotations=[], categories=categories)
    path.write_text(json.dumps(content))


def make_config(root: Path, num_classes: int | None = None, **train: object) -> Config:
    """Training and validation set in `root`; test is the validation set again."""

    def loader(name: str, **options: object) -> dict:
        dataset = dict(
            type='CocoDetection', data_root=str(root), ann_file=f'{name}.json'
        )
        return dict(batch_size=2, dataset={**dataset, **options})

    return Config(
        dict(
            model=dict(type='DFINE', decoder=dict(num_classes=num_classes)),
            train_dataloader=loader('train', **train),
            val_dataloader=loader('val', test_mode=True),
            test_dataloader=loader('val', test_mode=True),
        )
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_json(tmp_path / 'train.json')
    write_json(tmp_path / 'val.json')
    return tmp_path


LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def classes_in(cfg: Config) -> list:
    return [
        cfg[loader].dataset.get('metainfo', {}).get('classes') for loader in LOADERS
    ]


@pytest.mark.parametrize('num_classes', [None, 3])
def test_number_and_names_follow_from_the_file(
    num_classes: int | None, root: Path
) -> None:
    cfg = resolve_classes(make_config(root, num_classes))
    assert cfg.model.decoder.num_classes == 3
    assert classes_in(cfg) == [('cat', 'dog', 'emu')] * 3
    before = cfg.pretty_text
    assert resolve_classes(cfg).pretty_text == before


def test_it_works_on_a_config_with_classes_as_types(root: Path) -> None:
    text = make_config(root).pretty_text.replace(
        "type='CocoDetection'", 'type=CocoDetection'
    )
    path = root / 'config.py'
    header = 'from mmbackbones.data.coco import CocoDetection\n'
    path.write_text(header + text.replace("type='DFINE'", 'type=CocoDetection'))
    cfg = resolve_classes(Config.fromfile(path))
    assert cfg.train_dataloader.dataset.type is CocoDetection
    assert cfg.model.decoder.num_classes == 3
    cfg.dump(root / 'flat.py')
    flat = Config.fromfile(root / 'flat.py')
    assert flat.train_dataloader.dataset.type == 'mmbackbones.data.coco.CocoDetection'
    flat.model.decoder.num_classes = None
    for loader in LOADERS:
        del flat[loader].dataset['metainfo']
    assert classes_in(resolve_classes(flat)) == [('cat', 'dog', 'emu')] * 3


def test_a_stated_number_that_differs_is_refused(root: Path) -> None:
    pattern = (
        r"num_classes is 80, but '.*train\.json' gives 3 classes \(cat, dog, emu\); "
        'set num_classes to None'
    )
    with pytest.raises(ValueError, match=pattern):
        resolve_classes(make_config(root, 80))


@pytest.mark.parametrize(
    ('names', 'difference'),
    [
        ({2: 'cat', 5: 'dog'}, 'it lacks emu;'),
        ({**NAMES, 1: 'fox'}, 'only it has fox;'),
        ({2: 'Cat', 5: 'dog', 9: 'emu'}, 'it lacks cat; only it has Cat;'),
    ],
)
def test_other_categories_in_validation_are_refused(
    names: dict, difference: str, root: Path
) -> None:
    write_json(root / 'val.json', names)
    pattern = rf"val_dataloader\.dataset \('.*val\.json'\) has other .*: {difference}"
    with pytest.raises(ValueError, match=pattern):
        resolve_classes(make_config(root))


def test_ids_may_differ_between_the_files(root: Path) -> None:
    """The names decide: labels of the validation set follow the training set."""
    write_json(root / 'val.json', {0: 'emu', 1: 'cat', 4: 'dog'})
    cfg = resolve_classes(make_config(root))
    assert classes_in(cfg) == [('cat', 'dog', 'emu')] * 3


def test_stated_classes_are_kept_and_handed_on(root: Path) -> None:
    write_json(root / 'val.json', {**NAMES, 1: 'fox'})
    cfg = make_config(root, metainfo=dict(classes=('emu', 'cat')))
    resolve_classes(cfg)
    assert cfg.model.decoder.num_classes == 2
    assert classes_in(cfg) == [('emu', 'cat')] * 3
    cfg.val_dataloader.dataset.metainfo.classes = ('cat', 'emu')
    with pytest.raises(ValueError, match='their order differs'):
        resolve_classes(cfg)
    with pytest.raises(ValueError, match=r'metainfo\.classes names owl'):
        resolve_classes(make_config(root, metainfo=dict(classes=('owl',))))


def test_labels_that_are_ids_need_a_row_for_each(root: Path) -> None:
    cfg = make_config(root, label_from_category_id=True)
    for loader in LOADERS[1:]:
        cfg[loader].dataset.label_from_category_id = True
    resolve_classes(cfg)
    assert cfg.model.decoder.num_classes == 10
    assert classes_in(cfg)[2][:3] == ('unused 0', 'unused 1', 'cat')


@pytest.mark.parametrize('wrapper', ['RepeatDataset', 'ConcatDataset'])
def test_wrapped_data_sets_are_found(wrapper: str, root: Path) -> None:
    cfg = make_config(root)
    inner = cfg.train_dataloader.dataset
    other = inner.copy()
    other.ann_file = 'more.json'
    write_json(root / 'more.json', {1: 'owl'})
    cfg.train_dataloader.dataset = (
        dict(type='RepeatDataset', times=2, dataset=inner)
        if wrapper == 'RepeatDataset'
        else dict(type='ConcatDataset', datasets=[inner, other])
    )
    if wrapper == 'ConcatDataset':
        with pytest.raises(ValueError, match=r"train_dataloader\.dataset \('.*more"):
            resolve_classes(cfg)
        write_json(root / 'more.json')
    resolve_classes(cfg)
    assert cfg.model.decoder.num_classes == 3
    wrapped = cfg.train_dataloader.dataset
    for dataset in wrapped.get('datasets') or [wrapped.dataset]:
        assert dataset.metainfo.classes == ('cat', 'dog', 'emu')


def test_without_files_a_stated_number_is_enough(tmp_path: Path) -> None:
    cfg = make_config(tmp_path, 80)
    before = cfg.pretty_text
    assert resolve_classes(cfg).pretty_text == before
    pattern = r"is to follow from .*'.*train\.json', which does not exist; set train_"
    with pytest.raises(ValueError, match=pattern):
        resolve_classes(make_config(tmp_path))


def test_validation_alone_is_enough(root: Path) -> None:
    (root / 'train.json').unlink()
    assert resolve_classes(make_config(root)).model.decoder.num_classes == 3


def test_other_data_sets_are_left_alone(tmp_path: Path) -> None:
    cfg = make_config(tmp_path)
    for loader in LOADERS:
        cfg[loader].dataset.type = 'mmdet.VOCDataset'
    before = cfg.pretty_text
    assert resolve_classes(cfg).pretty_text == before
    cfg = Config(dict(model=dict(decoder=dict(num_classes=4)), train_dataloader=None))
    assert resolve_classes(cfg).model.decoder.num_classes == 4


@pytest.mark.parametrize('text', ['', '{"categories": []', '[1, 2]'])
def test_a_broken_file_is_refused(text: str, root: Path) -> None:
    (root / 'train.json').write_text(text)
    with pytest.raises(ValueError, match=r'train\.json'):
        resolve_classes(make_config(root))
