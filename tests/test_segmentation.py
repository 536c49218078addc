"""UPerNet follows its backbone; pictures of label maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TOY_ARCH
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from PIL import Image

import mmbackbones.segmentors  # noqa: F401
from mmbackbones.apis.segmentation import build_segmentor
from mmbackbones.data.seg_folders import ADE20K, SegmentationFolders
from mmbackbones.evaluation.seg_pictures import (
    SegPictureHook,
    SegVisualizer,
    draw_label_map,
)

TOY_HIERA = dict(embed_dims=16, num_heads=1, depths=(1, 1, 1, 1), pos_embed_size=(8, 8))
TOY_CONVNEXT = dict(channels=(8, 16, 24, 32), depths=(1, 1, 1, 1))


def config(**overrides: object) -> ConfigDict:
    """UPerNet at toy width."""
    norm_cfg = dict(type='BN')
    cfg = ConfigDict(
        type='UPerNet',
        num_classes=5,
        data_preprocessor=dict(
            type='mmseg.SegDataPreProcessor', size=(64, 64), bgr_to_rgb=True
        ),
        backbone=dict(type='HGNetV2', arch=TOY_ARCH),
        decode_head=dict(type='UPerHead', channels=16, norm_cfg=norm_cfg),
        auxiliary_head=dict(
            type='FCNHead', in_strides=16, channels=8, num_convs=1, norm_cfg=norm_cfg
        ),
    )
    if 'type' in overrides.get('backbone', {}):
        cfg.backbone = {}
    if overrides.get('auxiliary_head', cfg) is None:
        cfg.auxiliary_head = None
    cfg.update(overrides)
    return cfg


def build(**overrides: object) -> torch.nn.Module:
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(config(**overrides))
    model.init_weights()
    return model


def samples(*input_hw: int, void: bool = False) -> list[SegDataSample]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        labels = torch.randint(5, (1, *input_hw), generator=generator)
        labels[:, :8] = 255
        sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
        sample.set_metainfo(dict(ori_shape=input_hw, img_shape=input_hw))
        found.append(sample)
    if void:
        found[0].gt_sem_seg.data.fill_(255)
    return found


BACKBONES = {
    'HGNetV2': (dict(type='HGNetV2', arch=TOY_ARCH), (16, 24, 32, 40)),
    'Hiera': (dict(type='Hiera', arch=TOY_HIERA), (16, 32, 64, 128)),
    'ConvNeXtV2': (dict(type='ConvNeXtV2', arch=TOY_CONVNEXT), (8, 16, 24, 32)),
}


@pytest.mark.parametrize('name', BACKBONES)
def test_backbones_are_swapped_without_another_edit(name: str) -> None:
    backbone, channels = BACKBONES[name]
    model = build(backbone=backbone)
    assert model.backbone.out_strides == (4, 8, 16, 32)
    assert model.decode_head.in_channels == channels
    assert model.auxiliary_head.in_channels == channels[2]
    assert model.num_classes == model.auxiliary_head.num_classes == 5


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('input_hw', [(64, 64), (64, 104)])
@pytest.mark.parametrize('void', [False, True])
def test_a_step_reaches_every_parameter(
    name: str, input_hw: tuple[int, int], void: bool
) -> None:
    model = build(backbone=BACKBONES[name][0]).train()
    losses = model.loss(torch.rand(2, 3, *input_hw), samples(*input_hw, void=void))
    loss = losses['decode.loss_ce'] + losses['aux.loss_ce']
    assert loss.isfinite()
    loss.backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all()
    ]
    assert not without


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (dict(num_classes=None), 'num_classes is not set'),
        (dict(num_classes=0), 'num_classes is 0; give'),
        (dict(num_classes='5'), "num_classes is '5'; give"),
        (
            dict(test_cfg=dict(mode='slied')),
            "mode is 'slied'; it is 'whole' or 'slide'",
        ),
        (dict(test_cfg=dict(mode='slide')), r'crop_size is None; .*\(height, width\)'),
        (
            dict(test_cfg=dict(mode='slide', crop_size=(64, 64), stride=42)),
            r'stride is 42; .*\(height, width\)',
        ),
        (dict(backbone=dict(type='mmseg.ResNet', depth=18)), 'ResNet has no out_stri'),
        (
            dict(backbone=dict(out_indices=(0, 1))),
            r'auxiliary_head.in_strides is \(16,\), but .* strides \(4, 8\)',
        ),
        (
            dict(decode_head=dict(in_strides=(4, 64))),
            r'in_strides is \(4, 64\), but backbone HGNetV2 .* \(4, 8, 16, 32\)',
        ),
        (
            dict(decode_head=dict(in_channels=[1, 2, 3, 4])),
            r'in_channels is \[1, 2, 3, 4\], .* be \(16, 24, 32, 40\)',
        ),
        (
            dict(auxiliary_head=dict(num_classes=7)),
            'auxiliary_head.num_classes is 7, but it has to be 5',
        ),
    ],
)
def test_what_does_not_fit(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**overrides)


def test_stated_values_that_fit_are_taken() -> None:
    heads = dict(
        decode_head=dict(in_channels=[16, 24, 32, 40], in_index=[0, 1, 2, 3]),
        auxiliary_head=dict(in_channels=32, in_index=2, num_classes=5),
    )
    assert build(**heads).decode_head.in_channels == (16, 24, 32, 40)
    model = build(decode_head=dict(in_strides=[8, 32]), auxiliary_head=None)
    assert model.decode_head.in_channels == (24, 40)
    assert model.decode_head.in_index == (1, 3)
    assert not model.with_auxiliary_head


def test_several_auxiliary_heads_follow() -> None:
    head = dict(type='FCNHead', channels=8, num_convs=1)
    heads = [dict(head, in_strides=16), dict(head, in_strides=8)]
    model = build(auxiliary_head=heads)
    assert [h.in_channels for h in model.auxiliary_head] == [32, 24]
    with pytest.raises(ValueError, match=r'auxiliary_head\[1\].in_strides is \(64,\)'):
        build(auxiliary_head=[heads[0], dict(head, in_strides=64)])


@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_predictions_have_the_size_of_the_original(mode: str) -> None:
    test_cfg = dict(mode=mode, crop_size=(64, 64), stride=(42, 42))
    model = build(test_cfg=test_cfg).eval()
    sample = SegDataSample(
        metainfo=dict(ori_shape=(33, 50), img_shape=(64, 97), pad_shape=(64, 97))
    )
    with torch.no_grad():
        result = model.predict(torch.rand(1, 3, 64, 97), [sample])[0]
    assert result.pred_sem_seg.data.shape == (1, 33, 50)
    assert 0 <= result.pred_sem_seg.data.min() <= result.pred_sem_seg.data.max() < 5


PALETTE = [[200, 0, 0], [0, 200, 0]]


def test_overlays_leave_what_has_no_class() -> None:
    image = np.full((40, 60, 3), 100, np.uint8)
    labels = np.full((40, 60), 255)
    drawn = draw_label_map(image, labels, ('a', 'b'), PALETTE)
    np.testing.assert_array_equal(drawn, image)
    labels[:, :30], labels[:, 30:50] = 0, 1
    drawn = draw_label_map(
        image, labels, ('a', 'b'), PALETTE, alpha=0.5, with_names=False
    )
    assert drawn[0, 0].tolist() == [150, 50, 50]
    assert drawn[0, 40].tolist() == [50, 150, 50]
    assert drawn[0, 55].tolist() == [100, 100, 100]
    named = draw_label_map(image, labels, ('a', 'b'), PALETTE, alpha=0.5)
    changed = np.argwhere((named != drawn).any(-1))
    assert len(changed) > 20  # letters, near the middle of a region
    assert changed[:, 0].min() > 0 and changed[:, 0].max() < 30
    assert changed[:, 1].max() < 50


def test_the_visualizer_draws_ground_truth_beside_prediction(tmp_path: Path) -> None:
    visualizer = SegVisualizer(alpha=1.0)
    visualizer.dataset_meta = dict(classes=('a', 'b'), palette=PALETTE)
    sample = SegDataSample(
        gt_sem_seg=PixelData(data=torch.zeros(1, 8, 6, dtype=torch.int64)),
        pred_sem_seg=PixelData(data=torch.ones(1, 8, 6, dtype=torch.int64)),
    )
    image = np.zeros((8, 6, 3), np.uint8)
    path = tmp_path / 'x.png'
    visualizer.add_datasample('x', image, sample, with_labels=False, out_file=str(path))
    picture = np.asarray(Image.open(path))
    assert picture.shape == (8, 12, 3)
    assert picture[0, 0].tolist() == [200, 0, 0]
    assert picture[0, -1].tolist() == [0, 200, 0]
    assert visualizer.get_image().shape == (8, 6, 3)


def checkpoint(path: Path, model: torch.nn.Module, **meta: object) -> str:
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return str(path)


def test_a_checkpoint_brings_its_classes(tmp_path: Path) -> None:
    names = ('a', 'b', 'c')
    file = checkpoint(
        tmp_path / 'named.pth',
        build(num_classes=3),
        dataset_meta=dict(classes=names, category_ids=(4, 9, 300)),
    )
    cfg = Config(dict(model=config(), default_scope='mmseg'))
    meta = build_segmentor(cfg, file, 'cpu').dataset_meta
    assert (meta['classes'], meta['category_ids']) == (names, (4, 9, 300))
    assert len(meta['palette']) == 3

    file = checkpoint(tmp_path / 'bare.pth', build(num_classes=2))
    meta = build_segmentor(cfg, file, 'cpu').dataset_meta
    assert meta['classes'] == ('class 0', 'class 1')
    assert meta['category_ids'] == (0, 1)


def test_a_checkpoint_without_classes_has_those_of_the_data_set(
    tmp_path: Path,
) -> None:
    """No image of it is needed."""
    file = checkpoint(tmp_path / 'bare.pth', build(num_classes=150))
    dataset = dict(type=ADE20K, data_root='nowhere')
    cfg = Config(dict(model=config(), test_dataloader=dict(dataset=dataset)))
    meta = build_segmentor(cfg, file, 'cpu').dataset_meta
    assert meta['classes'][:2] == ('wall', 'building')
    assert meta['category_ids'] == tuple(range(1, 151))  # 0 is no class there
    assert meta['palette'][0] == [120, 120, 120]
    file = checkpoint(tmp_path / 'two.pth', build(num_classes=2))
    meta = build_segmentor(cfg, file, 'cpu').dataset_meta
    assert (meta['classes'], meta['category_ids']) == (('class 0', 'class 1'), (0, 1))
    dataset = dict(type=SegmentationFolders, class_file='none.txt')
    cfg.test_dataloader.dataset = dataset
    meta = build_segmentor(cfg, file, 'cpu').dataset_meta
    assert meta['classes'] == ('class 0', 'class 1')


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / 'other.pth', torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"other.pth' is of no segmentor"):
        build_segmentor(Config(dict(model=config())), file, 'cpu')


def test_the_picture_hook_needs_a_folder() -> None:
    SegPictureHook().after_test_iter(None, 0)  # off: nothing to do
    with pytest.raises(ValueError, match='test_out_dir is not set'):
        SegPictureHook(draw=True)
