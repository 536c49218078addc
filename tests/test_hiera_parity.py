"""Hiera against the repositories whose checkpoints it loads (marker `parity`).

Under MMB_REFERENCE_DIR: `hiera`, `sam2` and `pytorch-image-models`, of which each
test skips without its own. What they import beyond torch is replaced, since only
their networks are used.
"""

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from backbone_helpers import image, relative_errors
from official_helpers import checkout
from test_hiera import fill_hiera
from torch import Tensor, nn

from mmbackbones.backbones import Hiera

pytestmark = pytest.mark.parity

ALL = (0, 1, 2, 3)
GOLDEN = Path(__file__).parent / 'golden' / 'hiera_state_dict.json'
SIZES = ('tiny', 'small', 'base', 'base_plus', 'large', 'huge')


class _Mlp(nn.Module):
    """timm's, as far as the official code needs it."""

    def __init__(self, width: int, inner: int, act_layer: type[nn.Module]) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = (
            nn.Linear(width, inner),
            act_layer(),
            nn.Linear(inner, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(checkout('hiera'))
    for name in ('timm', 'timm.models', 'timm.models.layers'):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules['timm.models.layers'].Mlp = _Mlp
    sys.modules['timm.models.layers'].DropPath = nn.Dropout
    return importlib.import_module('hiera')


@pytest.fixture
def sam2_trunk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    package = ModuleType('sam2')  # its own imports hydra
    package.__path__ = [str(checkout('sam2', 'sam2'))]
    file_io = SimpleNamespace(g_pathmgr=None)
    monkeypatch.setitem(sys.modules, 'sam2', package)
    for name in ('iopath', 'iopath.common', 'iopath.common.file_io'):
        monkeypatch.setitem(sys.modules, name, file_io)
    return importlib.import_module('sam2.modeling.backbones.hieradet').Hiera


class _AnyModule:
    """Imports every submodule of a package as a mock."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name, path, target=None):
        is_ours = name.split('.')[0] == self.package
        return ModuleSpec(name, self, is_package=True) if is_ours else None

    def create_module(self, spec):
        return MagicMock(__spec__=spec, __path__=[], __name__=spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(checkout('pytorch-image-models'))
    monkeypatch.setattr(sys, 'meta_path', [_AnyModule('torchvision'), *sys.meta_path])
    before = set(sys.modules)
    yield importlib.import_module('timm')
    for name in set(sys.modules) - before:  # no other test shall meet the mocks
        if name.split('.')[0] in ('timm', 'torchvision'):
            del sys.modules[name]


def _rename_sam2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        name = name.replace('mlp.layers.0', 'mlp.fc1').replace('layers.1', 'fc2')
        renamed[name] = value
    return renamed


def _load(theirs: nn.Module, ours: Hiera, rename: Callable = dict) -> None:
    """Give both the same weights; only norm and head of theirs may have none."""
    names = dict(zip(rename(theirs.state_dict()), theirs.state_dict(), strict=True))
    state = {names[k]: v for k, v in fill_hiera(ours).state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert {name.split('.')[0] for name in missing} <= {'norm', 'head'}
    assert not unexpected


def _official_spec(net: nn.Module, depths: tuple[int, ...]) -> dict:
    first = net.blocks[0]
    return dict(embed_dims=first.dim, num_heads=first.attn.heads, depths=depths)


@pytest.mark.parametrize('arch', SIZES)
def test_maps_equal_those_of_the_official_code(official, arch):
    # The huge one at full width but with fewer blocks, to fit into small machines.
    kwargs = dict(stages=(1, 1, 2, 1)) if arch == 'huge' else {}
    build = getattr(official, f'hiera_{arch}_224')
    theirs = (
        official.Hiera(embed_dim=256, num_heads=4, **kwargs) if kwargs else build()
    ).eval()
    ours = Hiera(
        _official_spec(theirs, kwargs['stages']) if kwargs else arch, out_indices=ALL
    ).eval()
    _load(theirs, ours)
    with torch.no_grad():
        _, expected = theirs(image(1, 3, 224, 224), return_intermediates=True)
        maps = ours(image(1, 3, 224, 224))
    expected = [e.permute(0, 3, 1, 2) for e in expected]
    errors = relative_errors(maps, expected)
    assert max(errors) < 1e-5


def test_maps_equal_those_of_the_official_code_off_the_square(official):
    size, depths = (96, 160), (1, 2, 3, 2)
    theirs = official.Hiera(
        input_size=size, embed_dim=32, num_heads=2, stages=depths
    ).eval()
    spec = dict(_official_spec(theirs, depths), pos_embed_size=(24, 40))
    ours = Hiera(spec, out_indices=ALL).eval()
    _load(theirs, ours)
    with torch.no_grad():
        _, expected = theirs(image(2, 3, *size), return_intermediates=True)
        maps = ours(image(2, 3, *size))
    expected = [e.permute(0, 3, 1, 2) for e in expected]
    errors = relative_errors(maps, expected)
    assert max(errors) < 1e-5


def test_video_maps_equal_those_of_the_official_code(official):
    depths = (1, 2, 3, 2)
    theirs = official.hiera_base_16x224(embed_dim=32, num_heads=2, stages=depths).eval()
    spec = _official_spec(theirs, depths)
    ours = Hiera(spec, out_indices=ALL, num_frames=16).eval()
    _load(theirs, ours)
    with torch.no_grad():
        _, expected = theirs(image(1, 3, 16, 224, 224), return_intermediates=True)
        maps = ours(image(1, 3, 16, 224, 224))
    expected = [e.permute(0, 4, 1, 2, 3) for e in expected]
    errors = relative_errors(maps, expected)
    assert max(errors) < 1e-5


_SAM2 = {  # sam2/configs/sam2.1/*.yaml: model.image_encoder.trunk
    'sam2_tiny': dict(
        stages=(1, 2, 7, 2),
        global_att_blocks=(5, 7, 9),
        window_pos_embed_bkg_spatial_size=(7, 7),
    ),
    'sam2_small': dict(
        stages=(1, 2, 11, 2),
        global_att_blocks=(7, 10, 13),
        window_pos_embed_bkg_spatial_size=(7, 7),
    ),
    'sam2_base_plus': dict(embed_dim=112, num_heads=2),
    'sam2_large': dict(
        embed_dim=144,
        num_heads=2,
        stages=(2, 6, 36, 4),
        global_att_blocks=(23, 33, 43),
        window_pos_embed_bkg_spatial_size=(7, 7),
        window_spec=(8, 4, 16, 8),
    ),
}


@pytest.mark.parametrize('arch', _SAM2)
def test_maps_equal_those_of_the_trunk_of_sam2(sam2_trunk, arch):
    theirs = sam2_trunk(**_SAM2[arch]).eval()
    ours = Hiera(arch, out_indices=ALL).eval()
    _load(theirs, ours, _rename_sam2)
    for size in ((224, 224), (256, 320)):
        with torch.no_grad():
            errors = relative_errors(
                ours(image(1, 3, *size)), theirs(image(1, 3, *size))
            )
        assert max(errors) < 1e-5


def _rename_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace('pos_embed_win', 'pos_embed_window'): v for k, v in state.items()}


@pytest.mark.parametrize('arch', ['small_abswin', 'base_abswin'])
def test_maps_equal_those_of_timm(timm, arch):
    theirs = timm.create_model(f'hiera_{arch}_256').eval()
    ours = Hiera(arch, out_indices=ALL).eval()
    _load(theirs, ours, _rename_timm)
    with torch.no_grad():
        expected = theirs.forward_intermediates(
            image(1, 3, 256, 256), intermediates_only=True
        )
        errors = relative_errors(ours(image(1, 3, 256, 256)), expected)
    assert max(errors) < 1e-5


@pytest.mark.parametrize('arch', [*SIZES, *_SAM2, 'small_abswin', 'base_abswin'])
def test_the_golden_digests_are_those_of_the_references(request, monkeypatch, arch):
    # On the meta device, where the official code could not read its drop-path rates.
    monkeypatch.setattr(torch, 'linspace', partial(torch.linspace, device='cpu'))
    with torch.device('meta'):
        if arch in SIZES:
            official = request.getfixturevalue('official')
            state = getattr(official, f'hiera_{arch}_224')().state_dict()
        elif arch in _SAM2:
            sam2_trunk = request.getfixturevalue('sam2_trunk')
            state = _rename_sam2(sam2_trunk(**_SAM2[arch]).state_dict())
        else:
            timm = request.getfixturevalue('timm')
            state = _rename_timm(timm.create_model(f'hiera_{arch}_256').state_dict())
    state = {k: v for k, v in state.items() if k.split('.')[0] not in ('norm', 'head')}
    lines = sorted(f'{name} {list(value.shape)}' for name, value in state.items())
    golden = json.loads(GOLDEN.read_text())[arch]
    assert golden == {
        'num_keys': len(lines),
        'num_params': sum(v.numel() for v in state.values()),
        'sha256': hashlib.sha256('\n'.join(lines).encode()).hexdigest(),
    }
