"""Official DEIMv2 models of HGNetV2, their configurations, and ours beside them.

Reference: a checkout of https://github.com/Intellindust-AI-Lab/DEIMv2 at
$MMB_REFERENCE_DIR/DEIMv2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from official_helpers import checkout, official_packages
from torch import nn

CONFIGS = Path(__file__).parent.parent / 'configs'

# Upstream's letter -> our config.
SIZES = dict(
    atto='deimv2_hgnetv2_atto_coco',
    femto='deimv2_hgnetv2_femto_coco',
    pico='deimv2_hgnetv2_pico_coco',
    n='deimv2_nano_hgnetv2_b0_coco',
    s='deimv2_hgnetv2_b0_coco',
    m='deimv2_hgnetv2_b2_coco',
    l='deimv2_hgnetv2_b4_coco',
    x='deimv2_hgnetv2_b5_coco',
)


def official_config(size: str) -> dict:
    """Values of upstream's `deimv2_hgnetv2_{size}_coco.yml`, inclusions merged."""
    name = f'deimv2_hgnetv2_{size}_coco.yml'
    return _read(checkout('DEIMv2', 'configs', 'deimv2') / name)


def _read(path: Path) -> dict:
    own = yaml.safe_load(path.read_text())
    merged = {}
    for name in own.pop('__include__', []):
        _merge(merged, _read(path.parent / name))
    return _merge(merged, own)


def _merge(base: dict, changes: dict) -> dict:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
    return base


@contextmanager
def official_modules() -> Iterator[SimpleNamespace]:
    """Upstream's modules, without importing what its packages import."""
    names = (
        'lite_encoder', 'hybrid_encoder', 'deim_decoder', 'deim_criterion', 'matcher',
        'deim', 'postprocessor',
    )  # fmt: skip
    source = checkout('DEIMv2', 'engine')
    with official_packages('official_deimv2', source, 'backbone', 'deim') as load:
        found = {name: load(f'deim.{name}') for name in names}
        yield SimpleNamespace(**found, hgnetv2=load('backbone.hgnetv2'))


def build_official(official: SimpleNamespace, config: dict) -> nn.Module:
    """The whole model of an official configuration, with random weights."""
    backbone = official.hgnetv2.HGNetv2(**{**config['HGNetv2'], 'pretrained': False})
    size = config['eval_spatial_size']
    name = config['DEIM']['encoder']
    module = dict(
        LiteEncoder=official.lite_encoder, HybridEncoder=official.hybrid_encoder
    )[name]
    encoder = getattr(module, name)(**config[name], eval_spatial_size=size)
    decoder = official.deim_decoder.DEIMTransformer(
        **deepcopy(config['DEIMTransformer']), eval_spatial_size=size
    )
    return official.deim.DEIM(backbone, encoder, decoder)


def build_official_criterion(official: SimpleNamespace, config: dict) -> nn.Module:
    """The criterion of an official configuration, with its matcher."""
    options = dict(config['DEIMCriterion'])
    matcher = dict(options.pop('matcher'))
    matcher.pop('type')
    matcher = official.matcher.HungarianMatcher(
        **matcher, use_focal_loss=config['use_focal_loss']
    )
    return official.deim_criterion.DEIMCriterion(matcher, **options)


def load_model_config(size: str) -> Config:
    """Our config of an official letter."""
    return Config.fromfile(CONFIGS / f'{SIZES[size]}.py')


def build_ours(config: Config) -> nn.Module:
    """The detector of a config."""
    init_default_scope(config.default_scope)
    return MODELS.build(config.model)


def neutral_projection(theirs: nn.Module) -> nn.Module:
    """Values that transformers publishes for the projection before encoder heads."""
    linear, norm = theirs.model.enc_output
    with torch.no_grad():
        linear.weight.copy_(torch.eye(len(linear.weight)))
        norm.weight.fill_(1)
        for module in (linear, norm):
            module.bias.zero_()
    return theirs


def as_official(theirs: nn.Module) -> nn.Module:
    """A model of transformers, in place, with what it does otherwise taken back.

    In the official code encoder heads read the tokens as they are, all layers add the
    positions of the selected boxes, and heads have SiLU.
    """
    model = theirs.model
    # A norm has an effect whatever its parameters.
    model.enc_output = nn.Identity()
    positions = []
    model.decoder.register_forward_pre_hook(lambda *_: positions.clear())
    model.decoder.query_pos_head.register_forward_hook(
        lambda _, __, output: positions.append(output) or positions[0]
    )
    for module in theirs.modules():
        if isinstance(getattr(module, 'act', None), nn.ReLU):
            module.act = nn.SiLU()
    return theirs
