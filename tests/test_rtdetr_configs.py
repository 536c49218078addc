"""RT-DETR's configs state the published models and recipes; other backbones fit."""

import re
from pathlib import Path

import pytest
import torch
from helpers import data_sample
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from official_helpers import checkout
from torch import nn

from mmbackbones.apis import detection  # noqa: F401  (registers all parts)
from mmbackbones.convert import from_ours, to_ours
from mmbackbones.engine.param_groups import assign_groups

CONFIG_DIR = Path(__file__).parent.parent / 'configs'

# Parameters in training and in deploy form, tensors that learn (all counted on the
# official models; v1 with HGNetV2 as v2, whose parameters are the same), epochs,
# final epochs, times of the base size in multi-scale.
SIZES = dict(
    r18vd=(20_184_464, 19_983_248, 326),
    r34vd=(31_441_668, 31_240_452, 404),
    r50vd_m=(36_593_772, 36_392_556, 399),
    r50vd=(42_891_372, 42_095_724, 387),
    r101vd=(76_556_268, 74_772_972, 438),
    hgnetv2_b4=(32_925_036, 32_129_388, 410),
    hgnetv2_b5=(67_374_188, 65_590_892, 460),
    hgnetv2_b6=(125_584_348, 122_420_188, 516),
)
RECIPES = {
    'rtdetr_r18vd_coco': (72, 0, 3),
    'rtdetr_r34vd_coco': (72, 0, 3),
    'rtdetr_r50vd_m_coco': (72, 0, 3),
    'rtdetr_r50vd_coco': (72, 0, 3),
    'rtdetr_r101vd_coco': (72, 0, 3),
    'rtdetr_hgnetv2_b4_coco': (72, 0, 3),
    'rtdetr_hgnetv2_b5_coco': (72, 0, 3),
    'rtdetrv2_r18vd_coco': (120, 3, None),
    'rtdetrv2_r34vd_coco': (120, 3, 3),
    'rtdetrv2_r50vd_m_coco': (84, 3, 3),
    'rtdetrv2_r50vd_coco': (72, 1, 3),
    'rtdetrv2_r101vd_coco': (72, 1, 3),
    'rtdetrv2_hgnetv2_b4_coco': (72, 1, 3),
    'rtdetrv2_hgnetv2_b5_coco': (72, 1, 3),
    'rtdetrv2_hgnetv2_b6_coco': (72, 1, 3),
    'rtdetrv2_r18vd_dsp_coco': (36, 3, None),
    'rtdetrv2_r34vd_dsp_coco': (12, 2, 3),
    'rtdetrv2_r50vd_m_dsp_coco': (36, 3, 3),
    'rtdetrv2_r50vd_dsp_coco': (12, 2, 3),
}
# Tensors of each group: (rate, decay) -> how many.
FULL, NONE = 1e-4, 0.0
GROUPS = {
    'rtdetr_r18vd_coco': {(1e-5, FULL): 23, (1e-5, NONE): 46, (FULL, NONE): 159,
                          (FULL, FULL): 98},
    'rtdetr_r50vd_coco': {(1e-5, FULL): 52, (FULL, NONE): 205, (FULL, FULL): 130},
    'rtdetr_r101vd_coco': {(1e-6, FULL): 103, (FULL, FULL): 335},
    'rtdetr_hgnetv2_b4_coco': {(5e-6, FULL): 75, (FULL, FULL): 335},
    'rtdetrv2_r18vd_coco': {(FULL, NONE): 162, (FULL, FULL): 164},
    'rtdetrv2_r34vd_coco': {(5e-5, FULL): 39, (5e-5, NONE): 78, (FULL, NONE): 181,
                            (FULL, FULL): 106},
    'rtdetrv2_r50vd_coco': {(1e-5, FULL): 52, (FULL, NONE): 126, (FULL, FULL): 209},
    'rtdetrv2_hgnetv2_b6_coco': {(5e-6, FULL): 169, (FULL, NONE): 130,
                                 (FULL, FULL): 217},
}  # fmt: skip


def load(name: str) -> Config:
    return Config.fromfile(CONFIG_DIR / f'{name}.py')


def build(cfg: Config) -> nn.Module:
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        return MODELS.build(cfg.model)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def groups_of(cfg: Config, model: nn.Module) -> dict[tuple[float, float], set[str]]:
    """Names of the parameters of each rate and decay."""
    optimizer = cfg.optim_wrapper.optimizer
    groups = assign_groups(model, **cfg.optim_wrapper.paramwise_cfg)
    return {
        (
            round(optimizer.lr * group.lr_mult, 9),
            optimizer.weight_decay * group.decay_mult,
        ): set(group.parameters)
        for group in groups
    }


def test_every_config_is_listed():
    names = {path.stem for path in CONFIG_DIR.glob('rtdetr*.py')}
    assert names == {*RECIPES, 'rtdetrv2_r18vd_custom'}


@pytest.mark.parametrize('name', RECIPES)
def test_config_states_the_published_recipe(name):
    epochs, final, repeat = RECIPES[name]
    version, size = re.fullmatch(
        r'(rtdetr|rtdetrv2)_(.+?)(?:_dsp)?_coco', name
    ).groups()
    is_second, is_discrete = version == 'rtdetrv2', '_dsp_' in name
    cfg = load(name)
    model = build(cfg)
    train, deploy, num_learned = SIZES[size]
    assert num_parameters(model) == train
    learned = [n for n, p in model.named_parameters() if p.requires_grad]
    num_layers = len(model.decoder.decoder.layers)
    assert len(learned) == num_learned - (2 * num_layers if is_discrete else 0)
    assert model.decoder.eval_layer == (2 if size == 'r50vd_m' else num_layers - 1)
    model.switch_to_deploy()
    assert num_parameters(model) == deploy

    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay) == (1e-4, 1e-4)
    assert optimizer.betas == (0.9, 0.999)
    assert cfg.optim_wrapper.clip_grad.max_norm == 0.1
    amp = cfg.optim_wrapper.type.__name__ == 'AmpOptimWrapper'
    assert amp is is_second
    assert cfg.train_cfg.max_epochs == epochs
    stage_switch = cfg.default_hooks.stage_switch
    assert stage_switch.num_final_epochs == final
    assert stage_switch.reload_best is False
    augments = cfg.model.data_preprocessor.batch_augments
    if repeat is None:
        assert augments is None
    else:
        assert augments[0].base_size_repeat == repeat
    assert cfg.train_dataloader.batch_size * 4 == cfg.auto_scale_lr.base_batch_size
    assert cfg.auto_scale_lr.base_batch_size == 16
    has_warm_up = is_second or 'hgnetv2' in name
    assert [s.end for s in cfg.param_scheduler] == [2000] * has_warm_up
    ema = cfg.default_hooks.ema
    assert (ema.warmup_iters, ema.momentum) == (2000, 1e-4)
    assert bool(cfg.load_from) is is_discrete


@pytest.mark.parametrize('name', GROUPS)
def test_groups_have_the_published_tensors(name):
    cfg = load(name)
    found = groups_of(cfg, build(cfg))
    assert {key: len(names) for key, names in found.items()} == GROUPS[name]


@pytest.mark.parity
@pytest.mark.parametrize('name', RECIPES)
def test_groups_are_those_of_the_official_patterns(name):
    yaml = pytest.importorskip('yaml', reason='needs PyYAML')
    if name.startswith('rtdetr_hgnetv2'):
        pytest.skip('upstream trains it with PaddlePaddle only')
    is_second = name.startswith('rtdetrv2')
    code, family = (
        ('rtdetrv2_pytorch', 'rtdetrv2') if is_second else ('rtdetr_pytorch', 'rtdetr')
    )
    folder = checkout('RT-DETR', code, 'configs', family)
    cfg = load(name)
    stem = _upstream_name(name, (CONFIG_DIR / f'{name}.py').read_text())
    options = yaml.safe_load((folder / 'include' / 'optimizer.yml').read_text())
    options = options['optimizer']
    own = yaml.safe_load((folder / stem).read_text())
    options |= own.get('optimizer', {})

    model = build(cfg)
    learned = {n for n, p in model.named_parameters() if p.requires_grad}
    state = model.state_dict()
    theirs, _ = from_ours(state, 'rtdetrv2' if is_second else 'rtdetr')
    expected: dict[tuple[float, float], set[str]] = {}
    for their_name in theirs:
        (our_name,) = to_ours_name(their_name, state, theirs)
        if our_name not in learned:
            continue
        group = next(
            (g for g in options['params'] if re.findall(g['params'], their_name)), {}
        )
        key = (
            group.get('lr', options['lr']),
            group.get('weight_decay', options['weight_decay']),
        )
        expected.setdefault(key, set()).add(our_name)
    assert groups_of(cfg, model) == expected


def to_ours_name(name: str, state: dict, theirs: dict) -> list[str]:
    """Tensors are shared by a conversion that only renames."""
    return [key for key, value in state.items() if value is theirs[name]]


def _upstream_name(name: str, text: str) -> str:
    return re.search(r'rtdetr\w*?_\w+\.yml', text).group()


@pytest.mark.parametrize(
    ('type_', 'arch'), [('Hiera', 'tiny'), ('ConvNeXtV2', 'atto'), ('HGNetV2', 'b0')]
)
@pytest.mark.parametrize('name', ['rtdetr_r50vd_coco', 'rtdetrv2_r50vd_coco'])
def test_backbones_of_other_families_fit_by_config_alone(type_, arch, name):
    cfg = load(name)
    cfg.model.backbone = dict(type=type_, arch=arch, out_indices=(1, 2, 3))
    model = build(cfg)
    assert (
        model.encoder.input_proj[0].conv.in_channels == (model.backbone.out_channels[0])
    )
    output = model.eval()._forward(torch.zeros(1, 3, 96, 160, device='meta'))
    assert output.queries.boxes.shape == (1, 1, 300, 4)


def narrow_model(name: str, **decoder: object) -> nn.Module:
    """A config's model, with a real backbone and thin maps behind it."""
    cfg = load(name)
    cfg.model.update(
        neck=dict(hidden_dim=16, feedforward_channels=16),
        decoder=dict(hidden_dim=16, feedforward_channels=16, num_queries=10, **decoder),
    )
    cfg.model.data_preprocessor.batch_augments = None
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


@pytest.mark.parametrize(
    ('name', 'choices'),
    [
        ('rtdetr_r18vd_coco', {}),
        ('rtdetrv2_r18vd_coco', dict(query_select_method='agnostic')),
    ],
)
def test_every_parameter_learns_with_and_without_boxes(name, choices):
    model = narrow_model(name, **choices).train()
    full = data_sample([[4, 4, 30, 40], [10, 20, 60, 50]], [3, 79])
    terms = []
    for samples in ([full, data_sample()], [data_sample(), data_sample()]):
        model.zero_grad(set_to_none=True)
        losses = model.loss(torch.rand(2, 3, 64, 64), samples)
        assert all(loss.isfinite() for loss in losses.values())
        terms.append(set(losses))
        sum(losses.values()).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
    # last, two before it, encoder; three of denoising: three terms each
    assert terms[0] == terms[1]
    assert len(terms[0]) == 3 * (1 + 2 + 1 + 3)


def test_published_weights_of_a_whole_model_load(tmp_path):
    """As upstream's trainer saves them: the averaged ones, under v1's names."""
    from mmbackbones.engine.checkpoint_io import load_from_local
    from mmbackbones.engine.load_report import fit_state_dict

    model = narrow_model('rtdetr_r18vd_coco')
    theirs, conversion = from_ours(model.state_dict(), 'rtdetr')
    assert set(conversion.dropped) == {'decoder.anchors', 'decoder.valid_mask'}
    noise = {k: torch.zeros_like(v) for k, v in theirs.items()}
    torch.save(dict(model=noise, ema=dict(module=theirs, updates=7)),
               tmp_path / 'v1.pth')  # fmt: skip
    checkpoint = load_from_local(str(tmp_path / 'v1.pth'))
    fitted, report = fit_state_dict(model, checkpoint)
    assert report.complete
    for key, value in model.state_dict().items():
        assert torch.equal(fitted[key], value), key
    assert to_ours(theirs)[0].keys() <= fitted.keys()
