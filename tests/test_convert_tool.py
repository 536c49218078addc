"""tools/convert_weights.py on files, and its errors."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbone_helpers import fill
from torch.testing import assert_close

from mmbackbones.backbones import HGNetV2
from mmbackbones.convert import from_ours
from mmbackbones.engine.checkpoint_io import load_from_local

TOOL = Path(__file__).parents[1] / 'tools' / 'convert_weights.py'


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('convert_weights', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def b0(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('weights') / 'b0.pth'
    torch.save(fill(HGNetV2('b0')).state_dict(), path)
    return path


@pytest.fixture
def run(tool, monkeypatch, capsys):
    def call(*args: object) -> str:
        monkeypatch.setattr(sys, 'argv', ['tool', *map(str, args)])
        tool.main()
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize(
    ('maker', 'suffix'),
    [('paddle', '.pdparams'), ('hf', '.safetensors'), ('timm', '.pth')],
)
def test_there_and_back(run, b0, tmp_path, maker, suffix):
    if suffix == '.safetensors':
        pytest.importorskip('safetensors', reason='needs safetensors')
    there, back = tmp_path / f'new/there{suffix}', tmp_path / 'back.pth'
    out = run(b0, there, '--to', maker)
    assert f"of HGNetV2 'b0' to {there}" in out
    state = torch.load(b0, weights_only=True)
    theirs, _ = from_ours(state, maker)
    assert_close(dict(load_from_local(there)['state_dict']), theirs, rtol=0, atol=0)
    out = run(there, back, '--arch', 'B0')
    assert maker in out.partition('HGNetV2 (names: ')[2].partition(')')[0].split(', ')
    assert 'Apache-2.0' in out and "HGNetV2 'B0'" in out
    for name, value in load_from_local(back)['state_dict'].items():
        assert torch.equal(value, state[name])


def test_the_backbone_of_a_whole_model(run, b0, tmp_path):
    state = torch.load(b0, weights_only=True)
    whole = {f'backbone.{name}': value for name, value in state.items()}
    whole['decoder.weight'] = torch.zeros(2)
    torch.save({'state_dict': whole, 'meta': {}}, tmp_path / 'whole.pth')
    out = run(tmp_path / 'whole.pth', tmp_path / 'out.pth', '--backbone')
    assert '1 tensors are not of the backbone' in out
    assert_close(torch.load(tmp_path / 'out.pth'), dict(state), rtol=0, atol=0)


def test_sizes_of_nobodys_are_said(run, tmp_path):
    from helpers import TOY_ARCH

    torch.save(HGNetV2(TOY_ARCH).state_dict(), tmp_path / 'toy.pth')
    out = run(tmp_path / 'toy.pth', tmp_path / 'out.pth')
    assert "HGNetV2 of none of ['b0', 'b1'" in out


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['{b0}', 'x.onnx'], r"out is 'x.onnx'; it ends in one of \['.pth', "),
        (['{b0}', 'x.pth', '--arch', 'b1'], r'this HGNetV2\. shapes: stem.stem1.conv'),
        (['{b0}', 'x.pth', '--arch', 'huge'], "arch is 'huge'; it is one of"),
        (['{b0}', 'x.pth', '--to', 'sam2'], "HGNetV2 has no form of 'sam2'"),
        (['{b0}', 'x.pth', '--backbone'], 'these weights are of nobody known: stem'),
        (['{tmp}/none.pth', 'x.pth'], 'does not exist'),
        (['{tmp}/other.pth', 'x.pth'], 'nobody known: a.b. Known are ConvNeXtV2'),
    ],
)
def test_mistakes_are_one_error_and_write_nothing(run, b0, tmp_path, args, message):
    torch.save({'a.b': torch.zeros(1)}, tmp_path / 'other.pth')
    args = [arg.format(b0=b0, tmp=tmp_path) for arg in args]
    args[1] = str(tmp_path / args[1]) if 'onnx' not in args[1] else args[1]
    with pytest.raises(ValueError, match=message):
        run(*args)
    assert not Path(args[1]).exists()


def test_the_command_line_ends_with_one_line(tmp_path):
    command = [sys.executable, TOOL, tmp_path / 'none.pth', tmp_path / 'x.pth']
    env = {**os.environ, 'PYTHONPATH': str(TOOL.parents[1])}
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=env
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-2].startswith('error: checkpoint')
    assert 'Traceback' not in result.stderr
