"""DEIM's configs state the published recipes, and their groups are the real ones."""

import functools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, PARAM_SCHEDULERS, init_default_scope
from test_configs import build, load, num_parameters
from torch import nn
from torch.optim import AdamW

from mmbackbones.data.synthetic import draw_detection_set
from mmbackbones.decoders import DEIMDecoder, DEIMRTDETRv2Decoder, DFINEDecoder
from mmbackbones.engine.param_groups import assign_groups
from mmbackbones.engine.phases import PhaseHook
from mmbackbones.losses import DETRCriterion, DFINECriterion
from mmbackbones.losses.classification import MatchabilityTerm

# Parameters in deploy form (of L and X as measured on the official models), epochs,
# ends of the phases, lr, backbone lr, weight decay, repeats of the base size, images
# a step, updates of the average's warm-up.
PUBLISHED = {
    'deim_nano_hgnetv2_b0_coco': (
        3_753_799, 160, (4, 78, 148), 8e-4, 4e-4, 1e-4, None, 128, 1000),
    'deim_hgnetv2_b0_coco': (
        10_237_491, 132, (4, 64, 120), 4e-4, 2e-4, 1e-4, 20, 32, 1000),
    'deim_hgnetv2_b2_coco': (
        19_248_189, 102, (4, 49, 90), 4e-4, 4e-5, 1e-4, 6, 32, 1000),
    'deim_hgnetv2_b4_coco': (
        30_769_891, 58, (4, 29, 50), 5e-4, 2.5e-5, 1.25e-4, 4, 32, 1000),
    'deim_hgnetv2_b5_coco': (
        61_695_555, 58, (4, 29, 50), 5e-4, 5e-6, 1.25e-4, 3, 32, 1000),
    'deim_hgnetv2_b5_obj365_coco': (
        61_601_635, 24, (2, 12, 20), 2.5e-4, 2.5e-6, 1.25e-4, 3, 32, 0),
    'deim_rtdetrv2_r18vd_coco': (
        None, 120, (4, 64, 117), 2e-4, 2e-4, 1e-4, None, 16, 2000),
    'deim_rtdetrv2_r34vd_coco': (
        None, 120, (4, 64, 117), 2e-4, 1e-4, 1e-4, 3, 16, 2000),
    'deim_rtdetrv2_r50vd_m_coco': (
        None, 60, (4, 34, 58), 2e-4, 2e-5, 1e-4, 3, 16, 2000),
    'deim_rtdetrv2_r50vd_coco': (
        None, 60, (4, 34, 58), 2e-4, 2e-5, 1e-4, 3, 16, 2000),
    'deim_rtdetrv2_r101vd_coco': (
        None, 60, (4, 34, 58), 2e-4, 2e-6, 1e-4, 3, 16, 2000),
}  # fmt: skip

every = pytest.mark.parametrize('name', PUBLISHED)


@every
def test_config_states_the_published_recipe(name: str) -> None:
    deploy, epochs, ends, lr, backbone_lr, decay, repeat, batch, ramp = PUBLISHED[name]
    cfg = load(name)
    model = build(cfg)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay) == (lr, decay)
    mults = {
        mult
        for parameter, (mult, _) in decayed(name).items()
        if parameter.startswith('backbone.') and 'conv.weight' in parameter
    }
    assert [lr * mult for mult in mults] == [pytest.approx(backbone_lr)]
    assert cfg.train_cfg.max_epochs == epochs
    switch = cfg.default_hooks.stage_switch
    assert (switch.of_epochs, switch.ends) == (epochs, ends)
    assert cfg.default_hooks.ema.warmup_iters == ramp
    assert cfg.train_dataloader.batch_size * 4 == batch
    assert cfg.auto_scale_lr.base_batch_size == batch
    first, *others = cfg.model.data_preprocessor.batch_augments
    assert first.type.__name__ == 'MixUp' and first.prob == 0.5
    assert [a.base_size_repeat for a in others] == ([repeat] if repeat else [])

    classification = model.criterion.classification
    assert type(classification) is MatchabilityTerm and classification.gamma == 1.5
    dfine = 'rtdetr' not in name
    assert isinstance(model.criterion, DFINECriterion if dfine else DETRCriterion)
    assert isinstance(model.criterion, DFINECriterion) is dfine
    check_decoder_and_frozen_parts(model, name)
    if deploy is not None:
        model.switch_to_deploy()
        assert num_parameters(model) == deploy


def check_decoder_and_frozen_parts(model: nn.Module, name: str) -> None:
    frozen = [
        parameter
        for parameter, value in model.named_parameters()
        if not value.requires_grad and 'decoder.up' not in parameter
        and 'reg_scale' not in parameter
    ]  # fmt: skip
    activations = {type(m) for m in model.decoder.modules()} & {nn.ReLU, nn.SiLU}
    if 'obj365' in name:  # starts from D-FINE's weights
        assert type(model.decoder) is DFINEDecoder
        assert activations == {nn.ReLU}
        assert frozen and all('backbone.stem' in parameter for parameter in frozen)
        return
    dfine = 'rtdetr' not in name
    assert type(model.decoder) is (DEIMDecoder if dfine else DEIMRTDETRv2Decoder)
    assert activations == {nn.SiLU}
    assert frozen == []
    if not dfine:
        widths = [tuple(linear.weight.shape) for linear in
                  model.decoder.query_pos_head.layers]  # fmt: skip
        assert widths == [(256, 4), (256, 256), (256, 256)]


@functools.cache
def decayed(name: str) -> dict[str, tuple[float, bool]]:
    """Factor on the rate and whether it is decayed, of each trainable parameter."""
    cfg = load(name)
    groups = assign_groups(build(cfg), **cfg.optim_wrapper.paramwise_cfg)
    return {
        parameter: (group.lr_mult, group.decay_mult == 1)
        for group in groups
        for parameter in group.parameters
    }


@pytest.mark.parametrize(
    ('name', 'mult'), [('deim_hgnetv2_b0_coco', 0.5), ('deim_hgnetv2_b2_coco', 0.1)]
)
def test_groups_of_s_and_m(name: str, mult: float) -> None:
    """All norms at the full rate and undecayed; LAB with the convolutions."""
    for parameter, options in decayed(name).items():
        if 'norm' in parameter or 'bn' in parameter:
            assert options == (1, False), parameter
        elif parameter.startswith('backbone.'):
            assert options == (mult, True), parameter
        else:
            assert options == (1, True), parameter  # biases too


@pytest.mark.parametrize(
    ('name', 'mult'), [('deim_hgnetv2_b4_coco', 0.05), ('deim_hgnetv2_b5_coco', 0.01)]
)
def test_groups_of_l_and_x(name: str, mult: float) -> None:
    """The pattern slip of D-FINE: the backbone's norms are decayed at its rate."""
    found = decayed(name)
    assert any('backbone' in p and '.bn.' in p for p in found)
    for parameter, options in found.items():
        if parameter.startswith('backbone.'):
            assert options == (mult, True), parameter
        else:
            norm = 'norm' in parameter or 'bn' in parameter
            assert options == (1, not norm), parameter


def test_groups_of_n_are_those_of_dfine() -> None:
    assert decayed('deim_nano_hgnetv2_b0_coco') == decayed('dfine_nano_hgnetv2_b0_coco')


@pytest.mark.parametrize(
    ('name', 'mult'),
    [
        ('deim_rtdetrv2_r18vd_coco', 1),
        ('deim_rtdetrv2_r34vd_coco', 0.5),
        ('deim_rtdetrv2_r50vd_coco', 0.1),
        ('deim_rtdetrv2_r101vd_coco', 0.01),
    ],
)
def test_groups_of_rtdetrv2(name: str, mult: float) -> None:
    for parameter, options in decayed(name).items():
        if 'norm' in parameter:
            assert options == (1, False), parameter
        else:
            backbone = parameter.startswith('backbone.')
            assert options == (mult if backbone else 1, True), parameter


# Of the base rate at epoch 30, in the middle of the cosine, and at the end.
@pytest.mark.parametrize(
    ('name', 'turning'),
    [
        ('deim_hgnetv2_b0_coco', (64, 120)),
        ('deim_hgnetv2_b2_coco', (49, 90)),
        ('deim_hgnetv2_b4_coco', (29, 50)),
        ('deim_hgnetv2_b5_coco', (29, 50)),
        ('deim_rtdetrv2_r18vd_coco', (64, 117)),
        ('deim_rtdetrv2_r50vd_coco', (34, 58)),
        ('deim_nano_hgnetv2_b0_coco', None),
        ('deim_hgnetv2_b5_obj365_coco', None),
    ],
)
def test_schedule(name: str, turning: tuple | None) -> None:
    cfg = load(name)
    length = 1000
    optimizer = AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    if 'obj365' in name:
        assert cfg.param_scheduler == []
        return
    (schedule,) = cfg.param_scheduler
    end = cfg.train_cfg.max_epochs * length  # as the runner states it
    factor = PARAM_SCHEDULERS.build(
        dict(schedule, end=end), default_args=dict(optimizer=optimizer)
    ).factor
    assert factor(1000) == 0.25 and factor(2000) == 1
    if turning is None:
        assert {factor(i * length) for i in range(2, cfg.train_cfg.max_epochs)} == {1.0}
        return
    flat, constant = (epoch * length for epoch in turning)
    assert factor(flat) == 1 > factor(flat + 1) > 0.99
    assert factor((flat + constant) // 2) == pytest.approx(0.75, abs=1e-3)
    assert factor(constant - 1) > factor(constant) == factor(end) == 0.5


def names(steps: list) -> list:
    """Names of transforms; of alternatives as lists."""
    found = []
    for step in steps:
        if step.type.__name__ == 'RandomChoice':
            found.append([names(branch) for branch in step.transforms])
        else:
            found.append(step.type.__name__)
    return found


@every
def test_phases(name: str) -> None:
    switch = load(name).default_hooks.stage_switch
    assert switch.type is PhaseHook
    plain, dense, strong = (names(phase.pipeline) for phase in switch.phases)
    assert plain == names(switch.pipeline)
    reading, crops, rest = strong[:2], strong[2:5], strong[5:]
    assert crops[0] == 'WindowDistort'
    assert crops[1].endswith('ZoomOut') and crops[2].endswith('IoUCrop')
    assert plain == [*reading, *rest]
    mosaic = ['WholeMosaic', 'CentredAffine', 'WindowDistort']
    assert dense == [*reading, [mosaic, crops], *rest]
    (choice,) = (s for s in switch.phases[1].pipeline if 'transforms' in s)
    assert list(choice.prob) == [0.5, 0.5]
    assert choice.transforms[0][0].size == 320
    on = [set(phase.augments) for phase in switch.phases]
    assert on == [{'MultiScaleResize'}, {'MixUp', 'MultiScaleResize'},
                  {'MultiScaleResize'}]  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_detection_set(
        tmp_path_factory.mktemp('set'), num_train=4, num_val=1, image_size=64
    )


def test_every_pipeline_runs(folder: Path, tmp_path: Path) -> None:
    """As dumped: what a checkpoint's config is built from."""
    load('deim_hgnetv2_b4_coco').dump(tmp_path / 'flat.py')
    cfg = Config.fromfile(tmp_path / 'flat.py')
    init_default_scope('mmdet')
    data_set = DATASETS.build(
        dict(
            cfg.train_dataloader.dataset,
            data_root=str(folder),
            ann_file='annotations/instances_train.json',
            data_prefix=dict(img='train/'),
        )
    )
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (RandomChoice draws from it)
    for phase in cfg.default_hooks.stage_switch.phases:
        data_set.pipeline = Compose(phase.pipeline)
        for _ in range(4):
            sample = data_set[0]
            assert sample['inputs'].shape == (3, 640, 640)
            boxes = sample['data_samples'].gt_instances.bboxes.tensor
            assert (boxes >= 0).all() and (boxes <= 640).all()
