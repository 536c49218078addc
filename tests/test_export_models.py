"""Every kind of model through `export_model`, as tools/export.py calls it.

MMB_COCO_DIR=data/coco python -m pytest -m export tests/test_export_models.py

compares on photographs; without it, on noise. Weights are random.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import (
    random_checkpoint,
    segmentor_config,
    smooth_image,
    spread,
)
from inference_helpers import toy_detector
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from test_segmentation import BACKBONES

from mmbackbones.apis.config import load_config
from mmbackbones.apis.export import export_model
from mmbackbones.apis.export_options import ExportOptions
from mmbackbones.apis.inferencer import Inferencer
from mmbackbones.export.description import describe, resize_mode, slide_of
from mmbackbones.export.report import Report
from mmbackbones.export.runners import GraphRunner
from mmbackbones.export.windows import WindowGraph
from mmbackbones.inference.exported import ExportedBackend
from mmbackbones.inference.metadata import metadata_json, parse_metadata
from mmbackbones.inference.sliding import slide

COCO = os.environ.get('MMB_COCO_DIR')
IMAGES = sorted(map(str, Path(COCO, 'val2017').glob('*.jpg')))[:3] if COCO else []
TOLERANCE = 1e-3

PACKAGES = {
    'onnx': 'onnxruntime',
    'openvino': 'openvino',
    'torch_export': 'torch',
    'executorch': 'executorch.runtime',
}
SIDES = [(90, 120), (120, 90), (64, 201)]
SQUARE, RECTANGLE = (128, 128), (96, 160)
FIXED, DYNAMIC = dict(batch_size=3), dict(dynamic_batch=True)
FORMS = [
    ('onnx', dict(size_hw=SQUARE, **FIXED)),
    ('onnx', dict(size_hw=RECTANGLE, **DYNAMIC)),
    ('openvino', dict(size_hw=SQUARE, **DYNAMIC)),
    ('openvino', dict(size_hw=RECTANGLE, **FIXED)),
    ('torch_export', dict(size_hw=RECTANGLE, **DYNAMIC)),
    ('executorch', dict(size_hw=SQUARE, batch_size=1)),
]
DETECTORS = [
    'rtdetr_r18vd_coco',
    'rtdetrv2_r18vd_coco',
    'rtdetrv2_r18vd_dsp_coco',
    'deim_nano_hgnetv2_b0_coco',
    'deimv2_hgnetv2_atto_coco',
    'deimv2_nano_hgnetv2_b0_coco',
]


def form_id(value: object) -> str:
    if not isinstance(value, dict):
        return str(value)
    batch = 'dynamic' if value.get('dynamic_batch') else value['batch_size']
    return f'{value["size_hw"]}-{batch}'


def export(
    cfg: Config, checkpoint: str, tmp_path: Path, format: str, **options: object
) -> Report:
    """Write a file; the report has compared it with the model."""
    needed = (PACKAGES[format],)
    if format in ('onnx', 'openvino'):
        needed += ('onnx', 'onnxscript')
    for package in needed:
        pytest.importorskip(package, reason=f'{package} is not installed')
    folder = None
    if IMAGES:
        folder = tmp_path / 'images'
        folder.mkdir(exist_ok=True)
        for path in IMAGES:
            (folder / Path(path).name).symlink_to(Path(path).resolve())
    return export_model(
        cfg,
        'model.py',
        checkpoint,
        ExportOptions(
            format=format,
            out=str(tmp_path / 'model'),
            images=None if folder is None else str(folder),
            tolerance=TOLERANCE,
            **options,
        ),
    )


def check(report: Report, *, num_images: int) -> None:
    print(report.text())
    assert report.passed, report.text()
    assert report.differences.num_images >= num_images


def check_inferencer(cfg: Config, checkpoint: str, report: Report) -> None:
    """The file in the Inferencer answers as the checkpoint does there."""
    images = IMAGES or [smooth_image(90, 70 + 20 * i) for i in range(3)]
    ours = Inferencer(cfg, checkpoint, 'cpu').predict(images, conf=0.0)
    theirs = Inferencer(report.file).predict(images, conf=0.0)
    for one, other in zip(ours, theirs, strict=True):
        count = min(len(one), len(other))
        assert count > 0
        np.testing.assert_allclose(one.scores[:count], other.scores[:count], atol=1e-4)


@pytest.mark.export
@pytest.mark.parametrize(('format', 'options'), FORMS, ids=form_id)
@pytest.mark.parametrize('name', DETECTORS)
def test_detectors(name: str, format: str, options: dict, tmp_path: Path) -> None:
    cfg = load_config(name, work_dir=str(tmp_path))
    checkpoint = random_checkpoint(cfg, tmp_path / 'model.pth')
    report = export(cfg, checkpoint, tmp_path, format, **options)
    check(report, num_images=options.get('batch_size', 3))


@pytest.mark.export
@pytest.mark.parametrize(('format', 'options'), FORMS, ids=form_id)
@pytest.mark.parametrize('mode', ['whole', 'slide'])
@pytest.mark.parametrize('family', BACKBONES)
def test_segmentors(
    family: str, mode: str, format: str, options: dict, tmp_path: Path
) -> None:
    cfg = segmentor_config(tmp_path, family, mode=mode, crop_hw=options['size_hw'])
    checkpoint = random_checkpoint(cfg, tmp_path / 'model.pth')
    report = export(cfg, checkpoint, tmp_path, format, **options)
    check(report, num_images=options.get('batch_size', 3))


@pytest.mark.export
@pytest.mark.parametrize(('format', 'options'), FORMS, ids=form_id)
@pytest.mark.parametrize('family', BACKBONES)
def test_bare_backbones(
    family: str, format: str, options: dict, tmp_path: Path
) -> None:
    cfg = segmentor_config(tmp_path, family)
    checkpoint = random_checkpoint(cfg, tmp_path / 'model.pth')
    report = export(cfg, checkpoint, tmp_path, format, backbone=True, **options)
    check(report, num_images=options.get('batch_size', 3))
    assert report.differences.features < 1e-4
    if format == 'onnx':
        with pytest.raises(ValueError, match='bare backbone, which predicts nothing'):
            Inferencer(report.file)


@pytest.mark.export
@pytest.mark.parametrize('format', ['onnx', 'openvino'])
@pytest.mark.parametrize('name', ['rtdetrv2_r18vd_coco', 'deimv2_hgnetv2_atto_coco'])
def test_files_predict_as_checkpoints_do(
    name: str, format: str, tmp_path: Path
) -> None:
    cfg = load_config(name, work_dir=str(tmp_path))
    checkpoint = random_checkpoint(cfg, tmp_path / 'model.pth')
    report = export(cfg, checkpoint, tmp_path, format, **DYNAMIC)
    check_inferencer(cfg, checkpoint, report)


@pytest.mark.export
@pytest.mark.parametrize('family', BACKBONES)
@pytest.mark.parametrize('format', ['onnx', 'openvino'])
@pytest.mark.parametrize('options', [dict(batch_size=2), DYNAMIC], ids=str)
def test_sliding_windows_of_a_file_equal_those_of_the_checkpoint(
    family: str, format: str, options: dict, tmp_path: Path
) -> None:
    """Masks at the size of the images: wide, high, below the window when resized."""
    compare_slides(tmp_path, family, format, options)


@pytest.mark.parametrize('family', BACKBONES)
@pytest.mark.parametrize('fixed_batch', [None, 3])
def test_sliding_windows_of_a_graph(
    family: str, fixed_batch: int | None, tmp_path: Path
) -> None:
    """What the file does, without a file."""
    cfg = segmentor_config(tmp_path, family)
    ours = Inferencer(cfg, random_checkpoint(cfg, tmp_path / 'model.pth'), 'cpu')
    model = ours.backend.model
    pipeline = cfg.test_dataloader.dataset.pipeline
    graph = WindowGraph(model).eval()
    info = describe(
        'segmentation',
        input_size_hw=(64, 64),
        dynamic_batch=fixed_batch is None,
        mean=graph.normalise.mean_rgb,
        std=graph.normalise.std_rgb,
        licence='MIT',
        dataset_meta=model.dataset_meta,
        resize=resize_mode(pipeline),
        slide=slide_of(model, pipeline, (64, 64)),
    )
    session = GraphRunner(graph)
    session.fixed_batch = fixed_batch
    theirs = Inferencer.__new__(Inferencer)
    theirs.backend = ExportedBackend(session, parse_metadata(metadata_json(info), ''))
    compare_maps(ours, theirs, [smooth_image(*side) for side in SIDES])


def test_windows_are_those_of_mmseg() -> None:
    """Of 100 pixels: 0 to 64, 42 to 106 is moved back to 36 to 100."""
    windows = slide((64, 100), (64, 64), (42, 42))
    assert windows == [(0, 0, 64, 64), (36, 0, 100, 64)]
    assert slide((30, 64), (64, 64), (42, 42)) == [(0, 0, 64, 30)]


def test_one_logit_is_a_class_beside_its_threshold(tmp_path: Path) -> None:
    cfg = segmentor_config(tmp_path, 'HGNetV2')
    cfg.model.num_classes = 1
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = spread(MODELS.build(cfg.model))
    images = torch.rand(2, 3, 64, 64)
    graph = WindowGraph(model)
    with torch.no_grad():
        wanted = model.decode_head(model.extract_feat(graph.normalise(images)))
        wanted = wanted[:, 0].sigmoid()
        model.decode_head.threshold = float(wanted.median()) - 1e-4
        (logits,) = graph(images)
    wanted = wanted > model.decode_head.threshold
    assert 0 < wanted.float().mean() < 1
    assert (logits.argmax(1) == wanted).all()


def test_windows_of_another_size_say_what_to_do(tmp_path: Path) -> None:
    cfg = segmentor_config(tmp_path, 'HGNetV2')
    checkpoint = random_checkpoint(cfg, tmp_path / 'model.pth')
    with pytest.raises(ValueError, match=r'model\.test_cfg\.mode=whole'):
        export(cfg, checkpoint, tmp_path, 'torch_export', size_hw=(96, 96))


def compare_slides(tmp_path: Path, family: str, format: str, options: dict) -> None:
    cfg = segmentor_config(tmp_path, family, mode='slide', crop_hw=(64, 64))
    checkpoint = random_checkpoint(cfg, tmp_path / 'model.pth')
    report = export(cfg, checkpoint, tmp_path, format, **options)
    images = IMAGES or [smooth_image(*side) for side in SIDES]
    ours = Inferencer(cfg, checkpoint, 'cpu')
    compare_maps(ours, Inferencer(report.file), images)


def compare_maps(ours: Inferencer, theirs: Inferencer, images: list) -> None:
    pairs = zip(ours.predict(images), theirs.predict(images, batch_size=2), strict=True)
    for one, other in pairs:
        assert len(one.present) > 1
        assert one.labels.shape == other.labels.shape
        # Logits of two classes may be equal but for rounding.
        assert (one.labels != other.labels).mean() < 1e-3


def test_a_toy_backbone_in_the_default_run(tmp_path: Path) -> None:
    cfg = segmentor_config(tmp_path, 'HGNetV2')
    checkpoint = random_checkpoint(cfg, tmp_path / 'model.pth')
    options = dict(backbone=True, size_hw=(64, 96), batch_size=3)
    report = export(cfg, checkpoint, tmp_path, 'torch_export', **options)
    check(report, num_images=3)
    assert 0 < report.differences.features < 1e-4
    with pytest.raises(ValueError, match='bare backbone, which predicts nothing'):
        Inferencer(report.file)


@pytest.mark.export
@pytest.mark.parametrize('precision', ['fp32', 'int8'])
def test_files_of_other_formats_and_versions_stay(
    precision: str, tmp_path: Path
) -> None:
    """OpenVINO's file comes from an ONNX file, which is not that beside it."""
    if precision == 'int8':
        pytest.importorskip('nncf', reason='nncf is not installed')
    pytest.importorskip('openvino', reason='openvino is not installed')
    cfg = segmentor_config(tmp_path, 'HGNetV2')
    checkpoint = random_checkpoint(cfg, tmp_path / 'weights.pth')
    others = ['v1.onnx', 'v1.2.onnx', 'v1.int8.xml', 'v1.int8.bin', 'v1.xml']
    for other in others:
        (tmp_path / other).write_text('mine')
    Image.fromarray(smooth_image(64, 64)).save(tmp_path / 'a.png')
    options = ExportOptions(
        format='openvino',
        precision=precision,
        out=str(tmp_path / 'v1.2'),
        size_hw=(64, 64),
        images=str(tmp_path / 'a.png'),
        backbone=True,
    )
    report = export_model(cfg, 'model.py', checkpoint, options)
    assert report.file == str(tmp_path / 'v1.2.xml')
    assert [(tmp_path / other).read_text() for other in others] == ['mine'] * 5
    made = {path.name for path in tmp_path.iterdir()} - {*others, 'a.png'}
    names = ('v1.2.bin', 'v1.2.xml', 'v1.2.xml.report.json', 'v1.2.xml.report.txt')
    assert made == {*names, 'weights.pth'}


@pytest.mark.export
def test_programs_of_pytorch_predict(tmp_path: Path) -> None:
    """A program of PyTorch needs no other package; the Inferencer reads it."""
    cfg, checkpoint = toy_detector(tmp_path)
    cfg.work_dir = str(tmp_path)
    options = dict(size_hw=(64, 96), batch_size=1)
    report = export(cfg, checkpoint, tmp_path, 'torch_export', **options)
    check(report, num_images=1)
    assert report.differences.num_detections > 100
    (result,) = Inferencer(report.file).predict(smooth_image(40, 60), conf=0.0)
    assert result.info.classes == ('cat', 'dog', 'bird') and len(result) > 100
    with pytest.raises(ValueError, match="device is 'cuda'; programs"):
        Inferencer(report.file, device='cuda')
