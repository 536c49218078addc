"""Files of every format against the model they came from, in their runtimes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import spread
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from test_segmentation import BACKBONES
from test_segmentation import build as build_segmentor
from torch import nn

import mmbackbones.detectors  # noqa: F401
from mmbackbones.export.comparison import Comparison, compare_outputs
from mmbackbones.export.description import describe
from mmbackbones.export.files import open_file, write_file
from mmbackbones.export.graph import BackboneGraph, Normalise, build_graph
from mmbackbones.export.programs import export_program
from mmbackbones.export.runners import GraphRunner
from mmbackbones.inference.exported import ExportedBackend
from mmbackbones.inference.metadata import ExportInfo, parse_metadata, read_sidecar
from mmbackbones.inference.runtimes import open_exported
from mmbackbones.layers.fold import fold_for_inference, pad_channels

pytestmark = pytest.mark.export

ROOT = Path(__file__).parents[1]


def nano() -> nn.Module:
    """D-FINE-N with weights under which queries differ from each other."""
    torch.manual_seed(0)
    cfg = Config.fromfile(ROOT / 'configs' / 'dfine_nano_hgnetv2_b0_coco.py')
    cfg.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith('lab.bias'):
                param.normal_(std=0.3)
            elif param.requires_grad and param.ndim > 1:
                param.normal_(std=param[0].numel() ** -0.5)
    return model.eval()


def pictures(info: ExportInfo, batch: int) -> np.ndarray:
    """Photographs where there are some, else noise."""
    root = os.environ.get('MMB_COCO_DIR')
    shape = (batch, 3, *info.input_size_hw)
    if root is None:
        return np.random.default_rng(0).random(shape, dtype=np.float32)
    from mmbackbones.export.report import load_images

    files = sorted(map(str, Path(root, 'val2017').glob('*.jpg')))[:batch]
    return next(load_images(files, info, batch))


def export(
    model: nn.Module,
    path: Path,
    *,
    size_hw: tuple[int, int],
    format: str = 'onnx',
    precision: str = 'fp32',
    dynamic_batch: bool = False,
    make: Callable[[nn.Module], nn.Module] = build_graph,
    **options: object,
) -> tuple[Comparison, ExportInfo, list[str]]:
    """Write a file and compare it on a batch, of 3 if that is dynamic."""
    reference = make(model)
    info = describe(
        reference.task,
        input_size_hw=size_hw,
        dynamic_batch=dynamic_batch,
        mean=reference.normalise.mean_rgb,
        std=reference.normalise.std_rgb,
        licence='Apache-2.0',
        dataset_meta=dict(classes=[str(i) for i in range(80)]),
    )
    batch = pictures(info, 3 if dynamic_batch else 1)
    wanted = GraphRunner(reference).run(batch)
    graph = make(pad_channels(fold_for_inference(model, channels_last=False)))
    program = export_program(
        graph, size_hw=size_hw, dynamic_batch=dynamic_batch, **options
    )
    notes = write_file(
        program,
        path,
        info,
        graph.output_names,
        format=format,
        precision=precision,
        batches=lambda: iter([batch[:1]]),
    )
    found = open_file(path, format, graph.output_names, info, 1).run(batch)
    return compare_outputs(info.task, [(wanted, found)], size_hw), info, notes


@pytest.mark.parametrize('size_hw', [(128, 128), (96, 160)], ids=str)
@pytest.mark.parametrize('dynamic_batch', [False, True])
@pytest.mark.parametrize('sampling', ['grid_sample', 'gather'])
def test_nano_in_onnxruntime(
    tmp_path: Path, size_hw: tuple[int, int], dynamic_batch: bool, sampling: str
) -> None:
    pytest.importorskip('onnxscript')
    path = tmp_path / 'nano.onnx'
    found, info, _ = export(
        nano(), path, size_hw=size_hw, dynamic_batch=dynamic_batch, sampling=sampling
    )
    assert not found.exceeds(1e-3), found
    backend = open_exported(str(path), 'onnxruntime', 'cpu')
    assert backend.info == info
    import onnx

    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert ('GridSample' in operators) == (sampling == 'grid_sample')


@pytest.mark.parametrize('size_hw', [(128, 128), (96, 160)], ids=str)
@pytest.mark.parametrize(
    ('format', 'suffix', 'package'),
    [
        ('openvino', '.xml', 'openvino'),
        ('torch_export', '.pt2', 'torch'),
        ('tensorrt', '.onnx', 'onnxruntime'),
        ('executorch', '.pte', 'executorch.runtime'),
    ],
)
def test_nano_in_other_formats(
    tmp_path: Path, size_hw: tuple[int, int], format: str, suffix: str, package: str
) -> None:
    pytest.importorskip(package)
    found, info, notes = export(
        nano(), tmp_path / f'nano{suffix}', size_hw=size_hw, format=format
    )
    assert not found.exceeds(1e-3), found
    if format == 'tensorrt':
        assert any('trtexec' in line for line in notes)
        sidecar = read_sidecar(tmp_path / 'nano.engine')
        assert parse_metadata(sidecar, 'nano.engine') == info
    if format == 'openvino':
        path = tmp_path / 'nano.xml'
        assert open_exported(str(path), 'openvino', 'cpu').info == info


@pytest.mark.parametrize('family', BACKBONES)
@pytest.mark.parametrize('dynamic_batch', [False, True])
def test_upernet_of_each_family(
    tmp_path: Path, family: str, dynamic_batch: bool
) -> None:
    model = build_segmentor(backbone=BACKBONES[family][0]).eval()
    path = tmp_path / 'm.onnx'
    found, _, _ = export(model, path, size_hw=(64, 96), dynamic_batch=dynamic_batch)
    assert not found.exceeds(1e-3), found


@pytest.mark.parametrize('family', BACKBONES)
def test_bare_backbones(tmp_path: Path, family: str) -> None:
    model = MODELS.build(BACKBONES[family][0]).eval()
    found, info, _ = export(
        model, tmp_path / 'm.onnx', size_hw=(64, 96), make=BackboneGraph
    )
    assert info.task == 'backbone'
    assert not found.exceeds(1e-4), found


def test_half_precision_keeps_what_overflows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = spread(MODELS.build(BACKBONES['HGNetV2'][0]))
    with torch.no_grad():  # 1e6 between two convolutions
        model.stem.stem3.bn.weight.mul_(1e6)
        model.stem.stem4.conv.weight.mul_(1e-6)
    found, _, notes = export(
        model,
        tmp_path / 'm.onnx',
        size_hw=(64, 64),
        precision='fp16',
        make=BackboneGraph,
    )
    assert not found.exceeds(2e-2), found
    kept = [line for line in notes if 'over 65504' in line]
    assert 1 <= len(kept) <= 6, notes


def test_half_precision_keeps_an_output_that_overflows(tmp_path: Path) -> None:
    """Nothing comes after the node, by whose input it would show."""

    class Logits(nn.Module):
        task = 'backbone'
        output_names = ('feat0',)

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.normalise, self.model = Normalise.of(None), model

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.model(images),)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with torch.no_grad():
        model[2].weight.mul_(1e6)
    path = tmp_path / 'm.onnx'
    options = dict(size_hw=(16, 16), precision='fp16', make=Logits)
    found, _, notes = export(model.eval(), path, **options)
    assert not found.exceeds(2e-2), found
    assert 'over 65504' in notes[1] and len(notes) == 2


def test_integers_of_openvino(tmp_path: Path) -> None:
    pytest.importorskip('nncf')
    torch.manual_seed(0)
    model = spread(MODELS.build(BACKBONES['HGNetV2'][0]))
    found, _, notes = export(
        model,
        tmp_path / 'm.xml',
        size_hw=(64, 64),
        format='openvino',
        precision='int8',
        make=BackboneGraph,
    )
    assert not found.exceeds(0.2), found
    assert found.exceeds(1e-4), 'nothing was quantised'
    assert int(notes[0].split()[1]) > 3


def test_cpp_prints_what_python_finds(tmp_path: Path) -> None:
    """PPM, so that both read the same pixels; the resizing is Pillow's, twice."""
    openvino = pytest.importorskip('openvino')
    if subprocess.run(['cmake', '--version'], capture_output=True).returncode:
        pytest.skip('cmake is missing')
    path = tmp_path / 'nano.xml'
    _, info, _ = export(nano(), path, size_hw=(96, 128), format='openvino')
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    rgb = np.kron(small, np.ones((23, 17, 1), np.uint8))  # 207 x 204
    picture = tmp_path / 'picture.ppm'
    picture.write_bytes(b'P6 204 207 255\n' + rgb.tobytes())

    cmake = Path(openvino.__file__).parent / 'cmake'
    build = tmp_path / 'build'
    for command in (
        ['cmake', '-S', ROOT / 'examples' / 'cpp', '-B', build],
        ['cmake', '--build', build],
    ):
        if '-B' in command:
            command.append(f'-DOpenVINO_DIR={cmake}')
        subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run(
        [build / 'detect', path, picture, '0.0'],
        check=True,
        capture_output=True,
        text=True,
    )
    lines = [line.split('\t') for line in done.stdout.splitlines()]

    session = open_file(path, 'openvino', ('boxes', 'scores', 'labels'), info, 1)
    backend = ExportedBackend(session, info)
    (wanted,) = backend.predict([backend.prepare(rgb[..., ::-1], 'picture')])
    assert len(lines) == len(wanted.scores) > 0
    assert [line[0] for line in lines] == [str(label) for label in wanted.labels]
    values = np.array([line[1:] for line in lines], np.float64)
    assert np.abs(values[:, 0] - wanted.scores).max() < 1e-4
    assert np.abs(values[:, 1:] - wanted.xyxy).max() < 0.06

    broken = tmp_path / 'broken.ppm'
    broken.write_bytes(b'P6 204 207 255\nabc')
    done = subprocess.run([build / 'detect', path, broken], capture_output=True)
    assert done.returncode == 1 and b'cut off' in done.stderr


def test_the_tool_fails_beyond_its_tolerance(tmp_path: Path) -> None:
    """Exit status 1, and 2 for what does not go together."""
    checkpoint = tmp_path / 'nano.pth'
    torch.save(dict(state_dict=nano().state_dict()), checkpoint)
    command = [sys.executable, 'tools/export.py']
    command += ['configs/dfine_nano_hgnetv2_b0_coco.py', str(checkpoint)]
    command += ['--size', '96', '96', '--work-dir', str(tmp_path)]

    def run(*options: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, *options], cwd=ROOT, capture_output=True, text=True
        )

    done = run('--tolerance', '1e-9')
    assert done.returncode == 1, done.stderr
    assert 'BEYOND the tolerance of 1e-09' in done.stdout
    assert (tmp_path / 'dfine_nano_hgnetv2_b0_coco.onnx.report.json').is_file()
    done = run('--precision', 'int8')
    assert done.returncode == 2
    assert 'precision int8 is made by OpenVINO' in done.stderr
