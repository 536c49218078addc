"""What may import what: read from the source, and tried with packages missing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mmbackbones

PACKAGE = Path(mmbackbones.__file__).parent

# Part of the package -> parts that it may import, besides itself and `registry`.
MAY_IMPORT = {
    'registry': '',
    'ops': '',
    'layers': 'ops',
    'backbones': 'ops layers',
    'classifiers': 'ops layers backbones',
    'necks': 'ops layers backbones',
    'decoders': 'ops layers backbones necks',
    'losses': 'ops',
    'convert': '',
    'data': 'ops',
    'engine': 'ops convert',
    'evaluation': 'ops',
    'inference': 'data evaluation',
    'serving': 'inference',
    'export': 'ops layers backbones inference',
    'detectors': 'ops layers backbones necks decoders losses',
    'segmentors': 'ops layers backbones necks decoders losses',
    'apis': 'ops layers backbones necks decoders losses convert data engine '
    'evaluation detectors segmentors inference export',
    '__init__': 'ops engine backbones classifiers necks',
}

# Parts that run with torch and MMEngine alone; the rest may need mmdet.
WITHOUT_MMDET = (
    'registry',
    'ops',
    'layers',
    'backbones',
    'classifiers',
    'necks',
    'decoders',
    'losses',
    'convert',
    'engine',
    '__init__',
)
MAY_IMPORT_MMSEG = ('segmentors/', 'data/seg_', 'evaluation/seg_', 'apis/segm')
NEVER = {'torchvision', 'mmpretrain', 'transformers', 'timm', 'tests', 'tools'}


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imported(path):
    """Full names of all imports of a file, relative ones resolved."""
    package = ('mmbackbones', *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = '.'.join((*base, *filter(None, [node.module])))
            if module == 'mmbackbones':
                yield from (f'mmbackbones.{alias.name}' for alias in node.names)
            else:
                yield module


def source_files():
    return sorted(PACKAGE.rglob('*.py'))


def test_every_part_has_a_row():
    assert {part_of(path) for path in source_files()} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    'path', source_files(), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_direction_of_imports(path):
    part = part_of(path)
    own = {name.split('.')[1] for name in imported(path) if name.startswith('mmbackb')}
    assert own <= {part, 'registry', *MAY_IMPORT[part].split()}
    others = {name.partition('.')[0] for name in imported(path)}
    assert not others & NEVER
    if part in WITHOUT_MMDET:
        assert not others & {'mmdet', 'mmcv'}
    if not str(path.relative_to(PACKAGE)).startswith(MAY_IMPORT_MMSEG):
        assert 'mmseg' not in others


def test_the_reader_of_imports_sees_them_all(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), 'PACKAGE', tmp_path)
    (tmp_path / 'ops').mkdir()
    (path := tmp_path / 'ops' / 'x.py').write_text(
        'import a.b, c\nfrom . import d\nfrom .e import f\nfrom ..layers import g\n'
        'from mmbackbones import data\n'
        'def late():\n    from mmdet.models import h\n'
    )
    assert set(imported(path)) == {
        'a.b',
        'c',
        'mmbackbones.ops',
        'mmbackbones.ops.e',
        'mmbackbones.layers',
        'mmbackbones.data',
        'mmdet.models',
    }


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(f'{{name}} is blocked', name=name)
sys.meta_path.insert(0, Block())
"""

FORWARD = """
import torch, mmbackbones
from mmbackbones.registry import MODELS
net = MODELS.build(dict(type='HGNetV2', arch='b0'))
assert len(net(torch.zeros(1, 3, 64, 64))) == len(net.out_channels)
import mmbackbones.decoders, mmbackbones.convert, mmbackbones.engine
from mmengine.utils.dl_utils import mmcv_full_available
assert not mmcv_full_available()
"""

# Packages that are missing -> what has to work all the same.
TIERS = {
    'torch and MMEngine': (
        'mmcv mmdet mmseg mmpretrain torchvision transformers pycocotools '
        'faster_coco_eval safetensors',
        FORWARD,
    ),
    'with mmdet': (
        'mmseg mmpretrain torchvision transformers',
        'import mmbackbones.detectors, mmbackbones.losses, mmbackbones.data\n'
        'import mmbackbones.evaluation, mmbackbones.apis\n',
    ),
    'everything, and nobody imports torchvision': (
        'torchvision',
        'import mmbackbones, mmbackbones.detectors, mmbackbones.apis, mmseg.models\n',
    ),
}


@pytest.mark.parametrize('tier', TIERS)
def test_tiers(tier):
    blocked, code = TIERS[tier]
    done = subprocess.run(
        [sys.executable, '-c', BLOCK.format(blocked=blocked.split()) + code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
