"""Every shipped config parses, dumps, builds, and states the published recipe."""

import ast
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import mmbackbones  # noqa: F401
from mmbackbones.apis.config import _check_pretrained, load_config

CONFIG_DIR = Path(__file__).parent.parent / 'configs'
CONFIGS = sorted(path.stem for path in CONFIG_DIR.glob('*.py'))

# Upstream letter, parameters in training and in deploy form (measured on the
# official models), lr, backbone lr, weight decay, epochs, final epochs, repeats of
# the base size (None: no multi-scale), images a step.
PUBLISHED = {
    'dfine_nano_hgnetv2_b0_coco': (
        3_782_693, 3_753_799, 8e-4, 4e-4, 1e-4, 160, 12, None, 128),
    'dfine_hgnetv2_b0_coco': (
        10_321_877, 10_237_491, 2e-4, 1e-4, 1e-4, 132, 12, 20, 32),
    'dfine_hgnetv2_b2_coco': (
        19_590_064, 19_248_189, 2e-4, 2e-5, 1e-4, 132, 12, 6, 32),
    'dfine_hgnetv2_b4_coco': (
        31_244_152, 30_724_195, 2.5e-4, 1.25e-5, 1.25e-4, 80, 8, 4, 32),
    'dfine_hgnetv2_b5_coco': (
        62_621_560, 61_601_635, 2.5e-4, 2.5e-6, 1.25e-4, 80, 8, 3, 32),
    'dfine_nano_hgnetv2_b0_obj365': (
        None, None, 8e-4, 4e-4, 1e-4, 48, 0, None, 128),
    'dfine_hgnetv2_b0_obj365': (
        None, 10_457_711, 2.5e-4, 1.25e-4, 1.25e-4, 36, 0, 20, 32),
    'dfine_hgnetv2_b2_obj365': (
        None, 19_468_409, 2.5e-4, 2.5e-5, 1.25e-4, 36, 0, 6, 32),
    'dfine_hgnetv2_b4_obj365': (
        None, 30_944_415, 2.5e-4, 1.25e-5, 1.25e-4, 24, 0, 4, 32),
    'dfine_hgnetv2_b5_obj365': (
        None, 61_821_855, 2.5e-4, 2.5e-6, 1.25e-4, 24, 0, 3, 32),
    'dfine_nano_hgnetv2_b0_obj365_coco': (
        3_782_693, 3_753_799, 8e-4, 4e-4, 1e-4, 64, 8, None, 128),
    'dfine_hgnetv2_b0_obj365_coco': (
        10_321_877, 10_237_491, 2.5e-4, 1.25e-4, 1.25e-4, 64, 8, 10, 32),
    'dfine_hgnetv2_b2_obj365_coco': (
        19_590_064, 19_248_189, 2.5e-4, 2.5e-5, 1.25e-4, 56, 8, 6, 32),
    'dfine_hgnetv2_b4_obj365_coco': (
        31_244_152, 30_724_195, 2.5e-4, 1.25e-5, 1.25e-4, 36, 6, 4, 32),
    'dfine_hgnetv2_b5_obj365_coco': (
        62_621_560, 61_601_635, 2.5e-4, 2.5e-6, 1.25e-4, 36, 6, 3, 32),
}  # fmt: skip


def load(name: str) -> Config:
    return Config.fromfile(CONFIG_DIR / f'{name}.py')


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def build(cfg: Config) -> torch.nn.Module:
    init_default_scope(cfg.default_scope)
    model_cfg = cfg.model.copy()
    if model_cfg.get('decoder', {}).get('num_classes', 0) is None:
        model_cfg.decoder.num_classes = 3  # follows from data that is not here
    if model_cfg.get('num_classes', 0) is None:
        model_cfg.num_classes = 3  # likewise, of a segmentor
    with torch.device('meta'):
        return MODELS.build(model_cfg)


@pytest.mark.parametrize('name', CONFIGS)
def test_config_documents_dumps_and_builds(name: str, tmp_path: Path) -> None:
    text = (CONFIG_DIR / f'{name}.py').read_text()
    doc = ast.get_docstring(ast.parse(text))
    assert (doc and 'python tools/' in doc) or 'tools/dist_train.sh' in doc
    readme = (CONFIG_DIR.parent / 'README.md').read_text()
    assert name in readme, f'{name} has no row in the README'
    cfg = load(name)
    cfg.dump(tmp_path / 'flat.py')
    assert Config.fromfile(tmp_path / 'flat.py').to_dict() == cfg.to_dict()
    assert num_parameters(build(cfg)) > 0


@pytest.mark.parametrize('name', PUBLISHED)
def test_config_states_the_published_recipe(name: str) -> None:
    published = PUBLISHED[name]
    train, deploy, lr, backbone_lr, decay, epochs, final, repeat, batch = published
    cfg = load(name)
    model = build(cfg)
    if train is not None:
        assert num_parameters(model) == train
    if deploy is not None:
        model.switch_to_deploy()
        assert num_parameters(model) == deploy
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay) == (lr, decay)
    assert optimizer.betas == (0.9, 0.999)
    backbone = cfg.optim_wrapper.paramwise_cfg.groups[0]
    assert backbone.name == 'backbone'
    assert lr * backbone.lr_mult == pytest.approx(backbone_lr)
    assert cfg.optim_wrapper.clip_grad.max_norm == 0.1
    assert cfg.train_cfg.max_epochs == epochs
    assert cfg.default_hooks.stage_switch.num_final_epochs == final
    augments = cfg.model.data_preprocessor.batch_augments
    if repeat is None:
        assert augments is None
    else:
        assert augments[0].base_size_repeat == repeat
    assert cfg.train_dataloader.batch_size * 4 == cfg.auto_scale_lr.base_batch_size
    assert cfg.auto_scale_lr.base_batch_size == batch
    warm_up = cfg.param_scheduler
    assert bool(warm_up) is not name.endswith('obj365_coco')
    ema = cfg.default_hooks.ema
    assert ema.warmup_iters == (0 if name.endswith('obj365_coco') else 1000)
    assert ema.momentum == pytest.approx(1e-4)


def test_own_data_are_fine_tuned_as_coco_from_objects365() -> None:
    """Without warm-up: 500 steps would be most of a run on a few hundred images.

    The average of weights keeps its ramp: without, such a run would hardly move it.
    """
    ours, published = (
        load(f'dfine_hgnetv2_b0_{kind}') for kind in ('custom', 'obj365_coco')
    )
    assert published.default_hooks.ema.pop('warmup_iters') == 0
    assert ours.default_hooks.ema.pop('warmup_iters') == 1000
    for key in (
        'optim_wrapper',
        'param_scheduler',
        'train_cfg',
        'default_hooks',
        'auto_scale_lr',
    ):
        assert ours[key] == published[key], key
    augments = [cfg.model.data_preprocessor.batch_augments for cfg in (ours, published)]
    assert augments[0] == augments[1]


def test_no_workers_need_one_word_only(tmp_path: Path) -> None:
    options = {
        'train_dataloader.num_workers': 0,
        'train_dataloader.prefetch_factor': 2,
        'val_dataloader.num_workers': 2,
    }
    path = str(CONFIG_DIR / 'dfine_hgnetv2_b4_coco.py')
    cfg = load_config(path, work_dir=str(tmp_path), cfg_options=options)
    assert not {'persistent_workers', 'prefetch_factor'} & set(cfg.train_dataloader)
    assert cfg.val_dataloader.persistent_workers
    assert cfg.test_dataloader.persistent_workers


CUSTOM = [
    name for name in CONFIGS if name.endswith('_custom') and 'upernet' not in name
]


@pytest.mark.parametrize('name', CUSTOM)
def test_own_data_of_any_dialect(name: str, tmp_path: Path) -> None:
    """The same four lines, classes from the file, an average that can follow."""
    cfg = load(name)
    assert cfg.model.decoder.num_classes is None
    assert cfg.val_evaluator.ann_file is None
    for loader, split in ((cfg.train_dataloader, 'train'), (cfg.val_dataloader, 'val')):
        assert loader.dataset.data_root == 'data/custom/'
        assert loader.dataset.ann_file == f'annotations/{split}.json'
    assert cfg.load_from.startswith('weights/')
    assert cfg.default_hooks.ema.warmup_iters >= 1000
    assert all(s.get('warmup', 0) <= 100 for s in cfg.param_scheduler)
    text = (CONFIG_DIR / f'{name}.py').read_text()
    yours = text.split('# Yours')[1].split('# ---')[0]
    assert len([line for line in yours.splitlines()[1:] if ' = ' in line]) == 4


@pytest.mark.parametrize(
    ('name', 'base', 'other'),
    [
        ('dfine_hgnetv2_b0_custom', 'b0_obj365_coco', 'b4_obj365_coco'),
        ('rtdetrv2_r18vd_custom', 'rtdetrv2_r18vd_coco', 'rtdetr_r50vd_coco'),
        ('deim_hgnetv2_b0_custom', 'deim_hgnetv2_b0_', 'deim_nano_hgnetv2_b0_'),
        ('deimv2_hgnetv2_atto_custom', 'atto_coco', 'b4_coco'),
    ],
)
def test_another_model_may_stand_under_own_data(
    name: str, base: str, other: str, tmp_path: Path
) -> None:
    shutil.copytree(CONFIG_DIR, tmp_path, dirs_exist_ok=True)
    lines = (tmp_path / f'{name}.py').read_text().splitlines()
    (line,) = [i for i, line in enumerate(lines) if line.startswith('    from .')]
    assert base in lines[line]
    lines[line] = lines[line].replace(base, other)
    (tmp_path / 'mine.py').write_text('\n'.join(lines))
    cfg = Config.fromfile(tmp_path / 'mine.py')
    assert cfg.train_dataloader.dataset.data_root == 'data/custom/'
    assert cfg.default_hooks.ema.warmup_iters >= 1000
    assert num_parameters(build(cfg)) != num_parameters(build(load(name)))


def names(pipeline: list) -> list[str]:
    return [step.type.__name__ for step in pipeline]


def test_final_pipeline_lacks_strong_augmentation() -> None:
    cfg = load('dfine_hgnetv2_b4_coco')
    strong = ['WindowDistort', 'WindowZoomOut', 'WindowIoUCrop']
    full = names(cfg.train_dataloader.dataset.pipeline)
    final = names(cfg.default_hooks.stage_switch.pipeline)
    assert [name for name in full if name not in strong] == [
        'FastLoadImage', 'LoadAnnotations', *final[2:]]  # fmt: skip
    assert not set(strong) & set(final)


def test_the_first_start_of_a_run_that_resumes_is_pretrained(tmp_path: Path) -> None:
    """Random weights must not come silently with `--resume auto`."""
    weights = tmp_path / 'stage1.pth'
    weights.touch()
    work_dir = tmp_path / 'run'
    for resume, checkpoint, kept in (
        (None, None, True),
        ('auto', None, True),
        ('auto', 'epoch_1.pth', False),
    ):
        cfg = load_config(
            str(CONFIG_DIR / 'dfine_hgnetv2_b4_coco.py'), work_dir=str(work_dir)
        )
        cfg.model.backbone.init_cfg.checkpoint = str(weights)
        cfg.resume = resume
        if checkpoint:
            (work_dir / checkpoint).touch()
        _check_pretrained(cfg, training=True)
        assert (cfg.model.backbone.init_cfg is not None) == kept


def test_plain_pipelines_differ_in_classes_alone() -> None:
    """Each step stands at the place of its plain form, with the same settings."""
    fast_forms = {
        'FastLoadImage': 'LoadImage',
        'PackPlanes': 'PackDetInputs',
        'WindowDistort': 'PhotometricDistort',
        'WindowFlip': 'RandomFlip',
        'WindowIoUCrop': 'RandomIoUCrop',
        'WindowResize': 'Resize',
        'WindowZoomOut': 'RandomZoomOut',
    }
    filters = {'keep_ratio', 'backend', 'interpolation'}  # of the plain resize
    cfg = load('dfine_hgnetv2_b4_coco')
    for kind in ('train_pipeline', 'final_pipeline'):
        plain = cfg[f'plain_{kind}']
        assert names(plain) == [fast_forms.get(n, n) for n in names(cfg[kind])]
        for ours, theirs in zip(cfg[kind], plain, strict=True):
            settings = {k: v for k, v in theirs.items() if k not in filters}
            assert {**ours, 'type': 0} == {**settings, 'type': 0}
    assert cfg.train_dataloader.dataset.pipeline == cfg.train_pipeline
