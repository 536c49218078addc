"""Options of an export that do not go together, said before anything is loaded."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from mmbackbones.apis.export import (
    _few_images,
    _target,
    export_model,
)
from mmbackbones.apis.export_options import ExportOptions, default_size
from mmbackbones.export.description import published_licence
from mmbackbones.export.executorch_file import need_executorch
from mmbackbones.export.onnx_file import need

DETECTOR = Config(dict(model=dict(type='DFINE', decoder=dict())))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(format='tflite'), "format is 'tflite'; choose from onnx, openvino"),
        (dict(precision='int4'), "precision is 'int4'; choose from fp32, fp16, int8"),
        (dict(precision='int8'), 'int8 is made by OpenVINO'),
        (dict(format='torch_export', precision='fp16'), 'is written in fp32'),
        (dict(precision='fp16'), 'is calibrated: give --images'),
        (dict(format='executorch', dynamic_batch=True), 'takes a fixed batch'),
        (dict(evaluate=True, backbone=True), 'predicts nothing'),
        (dict(size_hw=(0, 64)), r'size is \(0, 64\)'),
        (dict(size_hw=(640, 100)), r'size is \(640, 100\).* multiples of 32'),
        (dict(batch_size=0), 'batch_size is 0'),
        (dict(num_images=0, images='x'), 'num_images is 0'),
        (dict(format='openvino', out='a/m.onnx'), 'format openvino writes .xml'),
        (dict(format='triton', out='a/m.onnx'), 'format triton writes a folder'),
    ],
)
def test_options_that_do_not_go_together(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_model(DETECTOR, 'x.py', 'x.pth', ExportOptions(**options))


def test_a_missing_checkpoint_is_named_before_data_sets_are_built() -> None:
    """The config has none; --evaluate would look for them."""
    with pytest.raises(ValueError, match=r"checkpoint 'x\.pth' does not exist"):
        export_model(
            DETECTOR,
            'x.py',
            'x.pth',
            ExportOptions(format='torch_export', evaluate=True),
        )


def test_triton_writes_a_repository_where_it_is_told() -> None:
    cfg = Config(dict(work_dir='runs'))
    told = ExportOptions(format='triton', out='x/repo')
    assert _target(cfg, 'atto', told) == Path('x/repo/atto/1/model.onnx')
    default = _target(cfg, 'atto', ExportOptions(format='triton'))
    assert default == Path('runs/repository/atto/1/model.onnx')


def test_integers_of_few_images_are_doubted() -> None:
    note = _few_images(16, ExportOptions(precision='int8'))
    assert 'on 16 images only' in note and '--evaluate' in note
    assert '--evaluate' not in _few_images(16, ExportOptions(evaluate=True))


def test_a_config_without_a_size_says_so() -> None:
    cfg = dict(model=dict(), test_dataloader=dict(dataset=dict(pipeline=[])))
    with pytest.raises(ValueError, match='give --size H W'):
        default_size(Config(cfg))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(ValueError, match=r'needs openvino: pip install .*\[export\]'):
        need('openvino', 'an OpenVINO file')
    monkeypatch.setitem(sys.modules, 'executorch', None)
    with pytest.raises(ValueError, match=r'needs executorch.*\[executorch\]'):
        need_executorch('executorch.exir')


@pytest.mark.parametrize(
    ('options', 'package'),
    [
        (dict(format='onnx'), 'onnxscript'),
        (dict(format='openvino'), 'openvino'),
        (dict(format='openvino', precision='int8', images='x'), 'nncf'),
        (dict(format='executorch'), 'executorch'),
    ],
)
def test_missing_packages_are_named_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, options: dict, package: str
) -> None:
    for name in ('onnx', 'onnxscript', 'onnxruntime', 'openvino', 'nncf'):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f'needs {package}'):
        export_model(DETECTOR, 'x.py', 'no such file.pth', ExportOptions(**options))


@pytest.mark.parametrize(
    ('backbone', 'licence'),
    [
        (dict(type='HGNetV2', arch='b0'), 'Apache-2.0'),
        (dict(type='ResNetVD', arch='r18'), 'Apache-2.0'),
        (dict(type='ConvNeXtV2', arch='atto'), 'CC-BY-NC-4.0'),
        (dict(type='Hiera', arch='tiny'), 'CC-BY-NC-4.0'),
    ],
)
def test_licences_of_published_weights(backbone: dict, licence: str) -> None:
    with torch.device('meta'):
        assert published_licence(MODELS.build(backbone)) == licence
    assert published_licence(torch.nn.Identity()) == 'unknown'
