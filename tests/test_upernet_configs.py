"""Segmentation configs, and D-FINE with all backbones: recipes and sizes."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import data_sample
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn

from mmbackbones.apis.config import load_config, prepare
from mmbackbones.backbones import ConvNeXtV2, HGNetV2, Hiera
from mmbackbones.data.synthetic import draw_segmentation_set
from mmbackbones.engine.param_groups import assign_groups

CONFIG_DIR = Path(__file__).parent.parent / 'configs'
FAMILIES = (HGNetV2, Hiera, ConvNeXtV2)
ARCHES = [(family, arch) for family in FAMILIES for arch in family.arch_settings]
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, RGB

# Parameters (UPerNet's as published for ConvNeXt V2: 122M, 235M, 707M), drop path,
# layer-wise rate, side of the crop.
UPERNET = {
    'upernet_hgnetv2_b0_ade20k': (36_352_328, 0.0, 0.9, 512),
    'upernet_hgnetv2_b2_ade20k': (44_739_246, 0.0, 0.9, 512),
    'upernet_hgnetv2_b4_ade20k': (56_476_684, 0.0, 0.9, 512),
    'upernet_hgnetv2_b6_ade20k': (111_969_548, 0.0, 0.9, 512),
    'upernet_hiera_tiny_ade20k': (59_563_724, 0.1, 0.65, 512),
    'upernet_hiera_base_ade20k': (83_178_476, 0.2, 0.8, 512),
    'upernet_hiera_large_ade20k': (248_180_396, 0.4, 0.9, 512),
    'upernet_convnextv2_tiny_ade20k': (60_289_004, 0.4, 0.9, 512),
    'upernet_convnextv2_base_ade20k': (122_229_292, 0.4, 0.9, 512),
    'upernet_convnextv2_large_ade20k': (235_184_300, 0.4, 0.9, 512),
    'upernet_convnextv2_huge_ade20k_640px': (706_807_020, 0.4, 0.9, 640),
}

# Parameters of the whole and of the backbone (its three output norms included), its
# rate at the top, drop path, epochs.
DFINE = {
    'dfine_hiera_tiny_coco': (44_305_400, 27_142_368, 5e-5, 0.1, 80),
    'dfine_hiera_base_coco': (67_920_152, 50_757_120, 5e-5, 0.2, 80),
    'dfine_hiera_base_plus_coco': (86_221_336, 69_000_960, 5e-5, 0.2, 80),
    'dfine_convnextv2_atto_coco': (11_543_969, 3_387_880, 1e-4, 0.1, 132),
    'dfine_convnextv2_nano_coco': (28_145_790, 14_983_760, 1e-4, 0.1, 132),
    'dfine_convnextv2_tiny_coco': (45_030_680, 27_867_648, 1e-4, 0.2, 80),
    'dfine_convnextv2_base_coco': (104_972_056, 87_694_336, 1e-4, 0.3, 80),
}


@cache
def parse(name: str) -> Config:
    return Config.fromfile(CONFIG_DIR / f'{name}.py')


def load(name: str) -> Config:
    return copy.deepcopy(parse(name))


def build(cfg: Config, device: str = 'meta') -> nn.Module:
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device(device):
        return MODELS.build(cfg.model)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_no_config_is_left_out() -> None:
    shipped = {path.stem for path in CONFIG_DIR.glob('*.py')}
    segmentation = {name for name in shipped if name.startswith('upernet_')}
    assert segmentation == {*UPERNET, 'upernet_hgnetv2_b0_custom'}
    assert DFINE.keys() == {
        name for name in shipped if name.startswith(('dfine_hiera', 'dfine_convnext'))
    }


@pytest.mark.parametrize('name', UPERNET)
def test_upernet_recipe(name: str) -> None:
    parameters, drop_path, layer_decay, crop = UPERNET[name]
    cfg = load(name)
    model = build(cfg)
    assert count(model) == parameters
    assert model.num_classes == model.auxiliary_head.num_classes == 150
    assert cfg.model.backbone.get('drop_path_rate', 0.0) == drop_path
    assert 'BN' == cfg.model.decode_head.norm_cfg.type  # SyncBN by the runtime only
    assert cfg.sync_bn == 'torch'

    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.betas) == (1e-4, (0.9, 0.999))
    assert optimizer.weight_decay == 0.05
    groups = assign_groups(model, **cfg.optim_wrapper.paramwise_cfg)
    of = {n: group for group in groups for n in group.parameters}
    num_depths = model.backbone.num_layers
    for n, group in of.items():
        expected = 1.0  # of the heads
        if n.startswith('backbone.'):
            depth, _ = model.backbone.get_layer_depth(n, 'backbone.')
            expected = layer_decay ** (num_depths - 1 - depth)
        assert group.lr_mult == pytest.approx(expected), n
    assert min(group.lr_mult for group in groups) < 0.6
    decayed = [n for n, group in of.items() if group.decay_mult]
    assert not [n for n in decayed if n.endswith('bias') or 'norm' in n or 'pos_e' in n]
    assert all(model.get_parameter(n).ndim > 1 for n in decayed)
    scalars = [n for n in of if '.lab.' in n]
    assert bool(scalars) is name.startswith(
        ('upernet_hgnetv2_b0', 'upernet_hgnetv2_b2')
    )

    warm_up, decay = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (1e-6, 1500)
    assert (decay.power, decay.begin, decay.eta_min) == (1.0, 1500, 0)
    assert 'end' not in decay  # follows max_iters
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (160_000, 16_000)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size
    assert cfg.auto_scale_lr.base_batch_size == 16

    pipeline = cfg.train_dataloader.dataset.pipeline
    assert (pipeline[2].scale, pipeline[2].ratio_range) == ((4 * crop, crop), (0.5, 2))
    assert pipeline[3].crop_size == (crop, crop) and pipeline[3].cat_max_ratio == 0.75
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.pipeline[1].scale == (4 * crop, crop)
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.size == (crop, crop)
    assert (preprocessor.mean, preprocessor.std) == (MEAN, STD)
    assert cfg.model.test_cfg.mode == 'slide'
    assert cfg.model.test_cfg.stride == ((341, 341) if crop == 512 else (426, 426))
    assert cfg.default_hooks.checkpoint.save_best == 'mIoU'


@pytest.mark.parametrize('name', DFINE)
def test_dfine_recipe_for_transformers_and_convnext(name: str) -> None:
    parameters, backbone_parameters, lr, drop_path, epochs = DFINE[name]
    cfg = load(name)
    model = build(cfg)
    assert (count(model), count(model.backbone)) == (parameters, backbone_parameters)
    preprocessor = cfg.model.data_preprocessor
    assert (preprocessor.mean, preprocessor.std) == (MEAN, STD)
    assert cfg.model.backbone.drop_path_rate == drop_path
    assert cfg.train_cfg.max_epochs == epochs
    assert {n for n, _ in model.backbone.named_children() if 'norm' in n} == {
        'norm1', 'norm2', 'norm3'}  # fmt: skip

    optimizer = cfg.optim_wrapper.optimizer
    groups = assign_groups(model, **cfg.optim_wrapper.paramwise_cfg)
    of = {n: group for group in groups for n in group.parameters}
    assert of.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    backbone = {n: g for n, g in of.items() if n.startswith('backbone.')}
    top = max(group.lr_mult for group in backbone.values())
    assert top * optimizer.lr == pytest.approx(lr)
    assert of['backbone.norm3.weight'].lr_mult == top
    decays = {g.decay_mult * optimizer.weight_decay for g in backbone.values()}
    assert sorted(decays) == pytest.approx([0, 0.05])
    others = {n: g for n, g in of.items() if n not in backbone}
    assert {g.lr_mult for g in others.values()} == {1.0}
    assert {g.decay_mult for g in others.values()} == {0.0, 1.0}
    assert all(g.decay_mult == 0 for n, g in of.items() if n.endswith('bias'))


@pytest.mark.parametrize(
    ('name', 'mean'),
    [('dfine_hiera_base_coco', 1.7e-5), ('dfine_hiera_tiny_coco', 2.7e-5)],
)
def test_hiera_learns_at_the_rate_that_its_config_argues_for(name, mean) -> None:
    cfg = load(name)
    blocks = [
        cfg.optim_wrapper.optimizer.lr * group.lr_mult
        for group in assign_groups(build(cfg), **cfg.optim_wrapper.paramwise_cfg)
        if any(n.endswith('mlp.fc1.weight') for n in group.parameters)
    ]
    assert len(blocks) in (12, 24)
    assert sum(blocks) / len(blocks) == pytest.approx(mean, rel=0.02)
    assert (
        f'{mean:.1e}'.replace('e-05', 'e-5') in (CONFIG_DIR / f'{name}.py').read_text()
    )


@pytest.mark.parametrize(
    ('family', 'arch'), ARCHES, ids=lambda x: getattr(x, '__name__', x)
)
@pytest.mark.parametrize(
    'method', ['dfine_hgnetv2_b4_coco', 'upernet_hgnetv2_b4_ade20k']
)
def test_every_arch_under_every_method(method: str, family: type, arch: str) -> None:
    cfg = load(method)
    cfg.model.backbone = dict(type=family, arch=arch)  # no other edit
    model = build(cfg)
    channels = model.backbone.out_channels
    if cfg.default_scope == 'mmseg':
        assert model.decode_head.in_channels == channels and len(channels) == 4
        images = torch.empty(2, 3, 64, 96, device='meta')
        logits = model.train()(images, mode='tensor')
        assert logits.shape == (2, 150, 16, 24)
    else:
        assert model.encoder.input_proj[0].conv.in_channels == channels[0]
        maps = model.extract_feat(torch.empty(1, 3, 64, 96, device='meta'))
        assert [tuple(m.shape) for m in maps] == [
            (1, 256, 8, 12), (1, 256, 4, 6), (1, 256, 2, 3)]  # fmt: skip


# The smallest published backbone of each family under both methods.
SMALL = {
    'dfine_hgnetv2_b0_coco': dict(),
    'dfine_convnextv2_atto_coco': dict(),
    'dfine_hiera_tiny_coco': dict(),
    'upernet_hgnetv2_b0_ade20k': dict(),
    'upernet_convnextv2_tiny_ade20k': dict(arch='atto'),
    'upernet_hiera_tiny_ade20k': dict(),
}


def small_model(name: str) -> nn.Module:
    """The model of a config with a published backbone and a narrow rest."""
    cfg = load(name)
    cfg.model.backbone.update(SMALL[name], init_cfg=None)
    if 'drop_path_rate' in cfg.model.backbone:
        cfg.model.backbone.drop_path_rate = 0.0  # a dropped path has no gradient
    if cfg.default_scope == 'mmseg':
        cfg.model.decode_head.channels = 16
        cfg.model.auxiliary_head.channels = 8
    else:
        cfg.model.neck.update(hidden_dim=32, feedforward_channels=32)
        cfg.model.decoder.update(
            hidden_dim=32,
            num_queries=20,
            num_layers=2,
            feedforward_channels=32,
            num_denoising=10,
            eval_size_hw=(64, 64),
        )
    torch.manual_seed(0)
    return build(cfg, 'cpu')


def seg_sample() -> SegDataSample:
    return SegDataSample(gt_sem_seg=PixelData(data=torch.randint(150, (1, 64, 64))))


@pytest.mark.parametrize('name', SMALL)
def test_small_ones_train_a_step(name: str) -> None:
    model = small_model(name).train()
    is_segmentor = name.startswith('upernet')
    samples = (
        [seg_sample(), seg_sample()]
        if is_segmentor
        else [data_sample([[4, 4, 40, 50]], [3]), data_sample([[9, 9, 60, 30]], [7])]
    )
    losses = model.loss(torch.randn(2, 3, 64, 64), samples)
    loss, _ = model.parse_losses(losses)
    assert loss.isfinite()
    loss.backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not parameter.grad.isfinite().all())
    ]
    assert not without
    assert all(  # not merely there: something arrives at the very first layer
        parameter.grad.abs().sum() > 0
        for parameter in list(model.backbone.parameters())[:4]
    )


def shrink(cfg: Config) -> ConfigDict:
    """Crops of 64 px and a narrow head, for a few steps on a CPU."""
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.model.test_cfg.mode = 'whole'
    cfg.model.decode_head.channels = 16
    cfg.model.auxiliary_head.channels = 8
    cfg.train_dataloader.dataset.pipeline[2].scale = (256, 64)
    cfg.train_dataloader.dataset.pipeline[3].crop_size = (64, 64)
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        if split != 'train':
            loader.dataset.pipeline[1].scale = (256, 64)
    return cfg


def test_ade20k_config_runs_on_its_folder_layout(tmp_path: Path) -> None:
    root = draw_segmentation_set(
        tmp_path / 'ade', num_train=3, num_val=2, image_size=64
    )
    path = CONFIG_DIR / 'upernet_hgnetv2_b0_ade20k.py'
    cfg = load_config(str(path), data_root=str(root), work_dir=str(tmp_path / 'run'))
    shrink(cfg)
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    cfg.param_scheduler = []
    cfg.log_level = 'WARNING'
    cfg.experiment_name = 'ade20k_on_drawings'
    runner = Runner.from_cfg(prepare(cfg))
    runner.train()
    assert runner.iter == 2
    scores = runner.message_hub.log_scalars
    assert 0 <= scores['val/mIoU'].current() <= 100
    assert len(runner.val_dataloader.dataset.metainfo['classes']) == 150
