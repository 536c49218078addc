"""Exported files, run by what is installed."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from inference_helpers import export_info
from PIL import Image

from mmbackbones.apis.inferencer import Inferencer
from mmbackbones.inference.exported import resize_as_stated
from mmbackbones.inference.metadata import KEY, Slide, metadata_json, parse_metadata
from mmbackbones.inference.runtimes import _check_input

HW = (32, 64)
# Width 100, height 40: one colour, so that resizing changes nothing.
BGR = (10, 100, 250)
IMAGE = np.full((40, 100, 3), BGR, np.uint8)


def metadata(**changes: object) -> str:
    return json.dumps(asdict(export_info(input_size_hw=HW, **changes)))


def write_onnx(path: Path, *, batch: int | str = 'N', text: str | None = None) -> Path:
    """Scores are the means of red and blue; both boxes are the left half."""
    onnx = pytest.importorskip('onnx', reason='onnx is not installed')
    helper, kinds = onnx.helper, onnx.TensorProto
    boxes = np.array([[[0, 0, 32, 32]] * 2], np.float32)
    constants = dict(
        boxes_of_one=boxes,
        labels_of_one=np.array([[0, 1]]),
        red_blue=np.array([0, 2]),
        two=np.array([2]),
        four=np.array([4]),
    )
    nodes = [
        helper.make_node('GlobalAveragePool', ['images'], ['means']),
        helper.make_node('Flatten', ['means'], ['flat']),
        helper.make_node('Gather', ['flat', 'red_blue'], ['scores'], axis=1),
        helper.make_node('Shape', ['images'], ['count'], end=1),
        helper.make_node('Concat', ['count', 'two'], ['count_2'], axis=0),
        helper.make_node('Concat', ['count', 'two', 'four'], ['count_24'], axis=0),
        helper.make_node('Expand', ['boxes_of_one', 'count_24'], ['boxes']),
        helper.make_node('Expand', ['labels_of_one', 'count_2'], ['labels']),
    ]
    graph = helper.make_graph(
        nodes,
        'toy',
        [helper.make_tensor_value_info('images', kinds.FLOAT, [batch, 3, *HW])],
        [
            helper.make_tensor_value_info('boxes', kinds.FLOAT, [batch, 2, 4]),
            helper.make_tensor_value_info('scores', kinds.FLOAT, [batch, 2]),
            helper.make_tensor_value_info('labels', kinds.INT64, [batch, 2]),
        ],
        [onnx.numpy_helper.from_array(v, name) for name, v in constants.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8
    )
    if text != '':
        helper.set_model_props(model, {KEY: text or metadata()})
    onnx.save(model, path)
    return path


def write_openvino(path: Path) -> Path:
    openvino = pytest.importorskip('openvino', reason='openvino is not installed')
    model = openvino.convert_model(write_onnx(path.with_suffix('.onnx')))
    model.set_rt_info(metadata(), [KEY])
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


def test_the_recipe_of_the_manual_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of docs/export.md without our package, on noise that EXIF turns."""
    pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    monkeypatch.chdir(tmp_path)
    write_onnx(Path('model.onnx'), text=metadata_json(export_info(input_size_hw=HW)))
    noise = np.random.default_rng(0).integers(0, 256, (200, 90, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save('photo.jpg', exif=exif)
    manual = (Path(__file__).parent.parent / 'docs' / 'export.md').read_text()
    section = manual.partition('## Without this package\n')[2]
    found: dict = {}
    exec(section.split('```python\n')[1].split('```')[0], found)
    (wanted,) = Inferencer('model.onnx').predict('photo.jpg', conf=0.0)
    assert wanted.shape_hw == (90, 200) and len(wanted) == 2
    assert (found['boxes'] == wanted.xyxy).all() and wanted.xyxy.max() == 100
    assert (found['scores'] == wanted.scores).all()
    assert (found['labels'] == wanted.labels).all()


def test_metadata_state_the_filter_and_are_read_without_it() -> None:
    info = export_info()
    text = metadata_json(info)
    content = json.loads(text)
    assert content.pop('interpolation').startswith('bilinear, antialiased')
    assert parse_metadata(text, 'new') == parse_metadata(json.dumps(content), 'old')


def check(model: Inferencer, batch_size: int = 3) -> None:
    """RGB in [0, 1] goes in; boxes come back in pixels of each image."""
    images = [IMAGE, IMAGE[:20], IMAGE // 2, IMAGE[:, :50]]
    results = model.predict(images, batch_size=batch_size, conf=0.0)
    for image, result in zip(images, results, strict=True):
        height, width = image.shape[:2]
        assert result.xyxy.tolist() == [[0, 0, width / 2, height]] * 2
        red_blue = image[0, 0, ::-2] / 255
        np.testing.assert_allclose(result.scores, red_blue, atol=1e-5)
        assert result.category_ids == [7, 9]


@pytest.mark.export
def test_onnxruntime(tmp_path: Path) -> None:
    pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    check(Inferencer(write_onnx(tmp_path / 'toy.onnx')))
    with pytest.raises(ValueError, match="device is 'tpu'; this onnxruntime offers"):
        Inferencer(tmp_path / 'toy.onnx', device='tpu')


@pytest.mark.export
@pytest.mark.parametrize('suffix', ['.xml', '.onnx'])
def test_openvino(tmp_path: Path, suffix: str) -> None:
    write_openvino(tmp_path / 'toy.xml')
    model = Inferencer(tmp_path / f'toy{suffix}', backend='openvino')
    assert model.backend.name == 'openvino'
    check(model)


@pytest.mark.export
def test_a_fixed_batch_is_filled_up_but_not_exceeded(tmp_path: Path) -> None:
    pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    model = Inferencer(write_onnx(tmp_path / 'toy.onnx', batch=3))
    check(model)
    with pytest.raises(ValueError, match='batch_size is 4, but the file takes 3'):
        check(model, batch_size=4)
    for option in ('half', 'compile'):
        with pytest.raises(ValueError, match=f'{option} is for PyTorch'):
            model.predict(IMAGE, **{option: True})


@pytest.mark.export
def test_files_of_others(tmp_path: Path) -> None:
    pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    with pytest.raises(ValueError, match='has no metadata'):
        Inferencer(write_onnx(tmp_path / 'foreign.onnx', text=''))
    (tmp_path / 'broken.onnx').write_bytes(b'no model')
    with pytest.raises(ValueError, match=r"onnxruntime refuses .*broken.onnx'"):
        Inferencer(tmp_path / 'broken.onnx')


@pytest.mark.parametrize('backend', ['onnxruntime', 'openvino'])
@pytest.mark.export
def test_files_that_do_not_take_what_they_say(backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend, reason=f'{backend} is not installed')
    text = json.dumps(asdict(export_info(input_size_hw=(32, 32))))
    path = write_onnx(tmp_path / 'other_size.onnx', text=text)
    with pytest.raises(
        ValueError, match=r'\(any, 3, 32, 64\), but .* \(any, 3, 32, 32'
    ):
        Inferencer(path, backend=backend)


@pytest.mark.parametrize('shape', [(None, 3, 32), (None, 1, 32, 64), ()])
def test_a_wrong_rank_shows_when_the_file_is_opened(shape: tuple) -> None:
    with pytest.raises(ValueError, match='export the model anew'):
        _check_input(shape, export_info(input_size_hw=HW), 'x.onnx')
    _check_input((None, 3, None, None), export_info(input_size_hw=HW), 'x.onnx')


def test_programs_that_are_none(tmp_path: Path) -> None:
    (tmp_path / 'broken.pt2').write_bytes(b'no program')
    with pytest.raises(ValueError, match=r"PyTorch refuses .*broken.pt2'"):
        Inferencer(tmp_path / 'broken.pt2')

    class Sum(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    program = torch.export.export(Sum(), (torch.ones(1), torch.ones(1)))
    torch.export.save(program, tmp_path / 'foreign.pt2')
    with pytest.raises(ValueError, match='has no metadata'):
        Inferencer(tmp_path / 'foreign.pt2')


def test_missing_runtimes_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'toy.onnx').write_bytes(b'x')
    for package in ('onnxruntime', 'openvino'):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=f'pip install {package}'):
            Inferencer(tmp_path / 'toy.onnx', backend=package)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (None, 'has no metadata'),
        ('{', 'cannot be used: JSONDecodeError'),
        ('{}', "cannot be used: KeyError 'task'"),
        (metadata(task='backbone'), 'bare backbone, which predicts nothing'),
        (metadata(task='depth'), "task is 'depth'; known are"),
        (metadata(resize='crop'), "resize is 'crop'; known are"),
        (metadata().replace('[32, 64]', '[32]'), 'ValueError not enough values'),
    ],
)
def test_metadata_that_cannot_be_used(text: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_metadata(text, 'x.onnx')


def test_metadata_there_and_back() -> None:
    info = export_info(category_ids=(3, 5), palette=((1, 2, 3), (4, 5, 6)))
    assert parse_metadata(json.dumps(asdict(info)), 'x.onnx') == info
    slide = Slide(stride_hw=(20, 30), scale_wh=None, align_corners=True)
    info = export_info(task='segmentation', resize='keep_ratio', slide=slide)
    assert parse_metadata(json.dumps(asdict(info)), 'x.onnx') == info
    nulls = json.dumps({**asdict(info), 'category_ids': None, 'palette': None})
    assert parse_metadata(nulls, 'x.onnx').category_ids == (0, 1)


def test_resizing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 100, 3), np.uint8)
    resized, inner = resize_as_stated(noise, export_info(input_size_hw=HW))
    expected = Image.fromarray(noise).resize((64, 32), Image.Resampling.BILINEAR)
    assert inner == HW and (resized == np.asarray(expected)).all()

    info = export_info(
        task='segmentation',
        input_size_hw=HW,
        resize='keep_ratio_pad',
        mean=(100.0, 50.0, 0.0),
    )
    resized, inner = resize_as_stated(noise, info)
    assert inner == (26, 64) and resized.shape == (32, 64, 3)
    assert (resized[:26] == cv2.resize(noise, (64, 26))).all()
    assert (resized[26:] == (0, 50, 100)).all()  # the mean, BGR


def test_tensorrt_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'toy.engine').write_bytes(b'x')
    with pytest.raises(ValueError, match=r"lacks .*toy.engine.json', its metadata"):
        Inferencer(tmp_path / 'toy.engine')
    (tmp_path / 'toy.engine.json').write_text(metadata())
    monkeypatch.setitem(sys.modules, 'tensorrt', None)
    with pytest.raises(ValueError, match='pip install tensorrt'):
        Inferencer(tmp_path / 'toy.engine')


@pytest.mark.gpu
def test_tensorrt(tmp_path: Path) -> None:
    trt = pytest.importorskip('tensorrt', reason='tensorrt is not installed')
    if not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network()
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(write_onnx(tmp_path / 'toy.onnx', batch=3).read_bytes())
    engine = builder.build_serialized_network(network, builder.create_builder_config())
    (tmp_path / 'toy.engine').write_bytes(engine)
    (tmp_path / 'toy.engine.json').write_text(metadata())
    check(Inferencer(tmp_path / 'toy.engine'))
