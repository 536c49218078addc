"""Published weights by `init_cfg` and `load_from`, and what does not fit."""

import pickle
from pathlib import Path

import pytest
import torch
from backbone_helpers import fill
from dfine_helpers import TOYS, build
from helpers import TOY_ARCH, toy_detector_cfg
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor, nn
from torch.testing import assert_close

import mmbackbones  # noqa: F401  registers loaders and backbones
from mmbackbones.backbones import ConvNeXtV2, HGNetV2
from mmbackbones.backbones.hiera import Hiera
from mmbackbones.convert import from_ours
from mmbackbones.convert.dfine import HUGGING_FACE
from mmbackbones.engine import pretrained
from mmbackbones.engine.load_report import fit_state_dict
from mmbackbones.engine.pretrained import load_backbone
from mmbackbones.registry import MODELS

HIERA = dict(embed_dims=8, num_heads=1, depths=(1, 2, 2, 1))
CONVNEXT = dict(channels=(8, 12, 16, 20), depths=(1, 2, 2, 1))
NETS = {
    'HGNetV2': lambda **kw: HGNetV2(dict(TOY_ARCH), **kw),
    'Hiera': lambda **kw: Hiera(dict(HIERA), **kw),
    'ConvNeXtV2': lambda **kw: ConvNeXtV2(dict(CONVNEXT), **kw),
}


def write(state: dict[str, Tensor], path: Path) -> str:
    if path.suffix == '.pdparams':
        path.write_bytes(pickle.dumps({k: v.numpy() for k, v in state.items()}, 4))
    elif path.suffix == '.safetensors':
        save_file = pytest.importorskip('safetensors.torch').save_file
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        containers = {'.pt': 'model', '.pth': 'model_state'}
        key = containers.get(path.suffix)
        torch.save({key: state} if key else state, path)
    return str(path)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(pretrained, 'print_log', lambda text, _: messages.append(text))
    return messages


@pytest.mark.parametrize(
    ('family', 'maker', 'suffix'),
    [
        ('HGNetV2', 'paddle', '.pdparams'),
        ('HGNetV2', 'dfine', '.ckpt'),
        ('HGNetV2', 'hf', '.safetensors'),
        ('Hiera', 'official', '.pth'),
        ('Hiera', 'hf', '.bin'),
        ('ConvNeXtV2', 'official', '.pt'),
        ('ConvNeXtV2', 'fcmae', '.pt'),
        ('ConvNeXtV2', 'timm', '.safetensors'),
        ('ConvNeXtV2', 'mmpretrain', '.bin'),
    ],
)
def test_init_cfg_takes_weights_from_everywhere(
    tmp_path, monkeypatch, said, family, maker, suffix
):
    source = fill(NETS[family]())
    theirs, _ = from_ours(source.state_dict(), maker)
    path = write(theirs, tmp_path / f'w{suffix}')
    net = NETS[family](init_cfg=dict(type='Pretrained', checkpoint=path))
    told: list[str] = []
    monkeypatch.setattr(
        pretrained, 'update_init_info', lambda _, init_info: told.append(init_info)
    )
    net.init_weights()
    for name, value in net.state_dict().items():
        if 'num_batches_tracked' not in name:
            assert_close(value, source.state_dict()[name], rtol=0, atol=0)
    assert f'{family} (names: ' in said[0] and ' tensors loaded' in said[0]
    assert told == [f'PretrainedInit: load from {path}']


def test_the_class_as_type_does_the_same(tmp_path):
    source = fill(NETS['ConvNeXtV2']())
    theirs, _ = from_ours(source.state_dict(), 'timm')
    path = write(theirs, tmp_path / 'w.bin')
    net = NETS['ConvNeXtV2'](init_cfg=dict(type=PretrainedInit, checkpoint=path))
    net.init_weights()
    assert_close(net.state_dict(), source.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('prefix', [None, 'backbone.', 'student.'])
@pytest.mark.parametrize('maker', ['ours', 'mmpretrain'])
def test_the_backbone_of_a_whole_model_is_found(tmp_path, prefix, maker):
    source = fill(NETS['ConvNeXtV2']())
    before = prefix or 'backbone.'
    state = {before + k: v for k, v in from_ours(source.state_dict(), maker)[0].items()}
    state['head.fc.weight'] = torch.zeros(2)
    path = write(state, tmp_path / 'w.bin')
    init_cfg = dict(type='Pretrained', checkpoint=path, prefix=prefix)
    net = NETS['ConvNeXtV2'](init_cfg=init_cfg)
    net.init_weights()
    assert_close(net.state_dict(), source.state_dict(), rtol=0, atol=0)
    report = load_backbone(net, state, prefix)
    assert report.dropped == {'head.fc.weight': f'not below {before}'}


def test_a_prefix_that_nothing_has_is_an_error():
    net = NETS['Hiera']()
    with pytest.raises(
        ValueError, match=r"prefix is 'net\.', but the weights have pos"
    ):
        load_backbone(net, net.state_dict(), 'net.')


def test_output_norms_may_be_missing_and_may_be_too_many():
    plain, normed = NETS['Hiera'](), NETS['Hiera'](with_out_norm=True)
    report = load_backbone(normed, plain.state_dict())
    assert {name.split('.')[0] for name in report.missing} == {
        'norm1',
        'norm2',
        'norm3',
    }
    report = load_backbone(plain, normed.state_dict())
    assert set(report.dropped.values()) == {'not in the backbone'}
    assert len(report.dropped) == 6


def _without(state: dict, name: str) -> dict:
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ('net', 'weights', 'message'),
    [
        # another family
        (
            NETS['HGNetV2'](),
            NETS['ConvNeXtV2']().state_dict(),
            r'not those of this HGNetV2\. they lack: stem\..*; not in the backbone: '
            r'downsample_layers\..*They are of ConvNeXtV2',
        ),
        (NETS['Hiera'](), NETS['HGNetV2']().state_dict(), 'They are of HGNetV2'),
        (NETS['Hiera'](), {'conv1.weight': torch.zeros(1)}, 'they lack: pos_embed'),
        # another size: all names of the smaller one occur in the larger one
        (
            Hiera(dict(HIERA, depths=(1, 2, 3, 1))),
            NETS['Hiera']().state_dict(),
            r'shapes: blocks\.5\..*they lack: blocks\.6\.',
        ),
        (
            NETS['ConvNeXtV2'](),
            ConvNeXtV2(dict(CONVNEXT, depths=(1, 2, 3, 1))).state_dict(),
            r'not in the backbone: stages\.2\.2\.dwconv\.weight',
        ),
        (
            HGNetV2(dict(TOY_ARCH, use_learnable_affine_block=False)),
            NETS['HGNetV2']().state_dict(),
            r'not in the backbone: stem\.stem1\.lab\.scale',
        ),
        (
            NETS['HGNetV2'](),
            _without(NETS['HGNetV2']().state_dict(), 'stem.stem3.bn.weight'),
            r'they lack: stem\.stem3\.bn\.weight\.',
        ),
        (
            HGNetV2(dict(TOY_ARCH, stem_channels=(1, 8, 8)), in_channels=1),
            NETS['HGNetV2']().state_dict(),
            r'shapes: stem\.stem1\.conv\.weight \(8, 3, .*\) instead of \(8, 1, ',
        ),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else '',
)  # fmt: skip
def test_weights_of_another_family_or_size_are_refused_whole(
    tmp_path, net, weights, message
):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    path = write(weights, tmp_path / 'w.bin')
    net.init_cfg = dict(type='Pretrained', checkpoint=path)
    with pytest.raises(ValueError, match=message) as caught:
        net.init_weights()
    assert str(caught.value).startswith(path)
    assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


def test_modules_of_others_load_as_before(tmp_path):
    class Other(BaseModule):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.stages = nn.Linear(2, 2)

    path = write({'stages.weight': torch.ones(2, 2)}, tmp_path / 'w.bin')
    net = Other(init_cfg=dict(type='Pretrained', checkpoint=path))
    net.init_weights()  # its bias is missing, which MMEngine only says
    assert_close(net.stages.weight.detach(), torch.ones(2, 2))


# -- load_from -----------------------------------------------------------------------


@pytest.mark.parametrize('maker', ['paddle', 'hf', 'dfine'])
def test_load_from_takes_a_backbone_from_everywhere(maker):
    pytest.importorskip('mmdet', reason='needs mmdet')
    import mmbackbones.detectors  # noqa: F401

    model = MODELS.build(toy_detector_cfg())
    backbone = fill(NETS['HGNetV2']())
    theirs, _ = from_ours(backbone.state_dict(), maker)
    fitted, report = fit_state_dict(model, dict(state_dict=theirs))
    for name, value in backbone.state_dict().items():
        if maker != 'paddle' or 'num_batches_tracked' not in name:
            assert fitted[f'backbone.{name}'] is value or torch.equal(
                fitted[f'backbone.{name}'], value
            )
    assert 'names: ' in report.notes[0] and maker in report.notes[0]


def test_load_from_takes_a_detector_of_hugging_face():
    encoder, decoder = build(TOYS['N'])
    model = nn.Module()
    model.backbone = fill(NETS['HGNetV2']())
    model.encoder, model.decoder = encoder, decoder
    theirs, _ = HUGGING_FACE.inverse().convert(model.state_dict())
    fitted, report = fit_state_dict(model, dict(state_dict=theirs))
    assert report.dropped == {}
    assert set(report.missing) == {'decoder.anchors', 'decoder.valid_mask'}
    assert_close(fitted, dict(model.state_dict()), rtol=0, atol=0)
    assert report.notes[0].startswith('DFINE (names: hf)')
