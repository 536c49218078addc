"""A model repository for Triton."""

from pathlib import Path

import pytest
from inference_helpers import export_info

onnx = pytest.importorskip('onnx', reason='needs onnx: pip install mmbackbones[export]')

from mmbackbones.export.triton import place_in_repository, write_config  # noqa: E402


def save_graph(path: Path, batch: int | str, boxes_type: int = 1) -> None:
    def value(name: str, kind: int, shape: list) -> object:
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    graph = onnx.helper.make_graph(
        [],
        'toy',
        [value('images', 1, [batch, 3, 96, 96])],
        [value('boxes', boxes_type, [batch, 60, 4]), value('labels', 7, [batch, 60])],
    )
    onnx.save(onnx.helper.make_model(graph), str(path))


@pytest.mark.parametrize('dynamic', [True, False])
def test_repository_states_what_the_file_takes(tmp_path: Path, dynamic: bool) -> None:
    path = place_in_repository(tmp_path, 'toy')
    assert path == tmp_path / 'toy' / '1' / 'model.onnx'
    path.parent.mkdir(parents=True)
    save_graph(path, 'N' if dynamic else 2)
    info = export_info(dynamic_batch=dynamic)
    written = write_config(path, info, max_batch_size=4)
    assert written == tmp_path / 'toy' / 'config.pbtxt'
    config = written.read_text()
    assert 'name: "toy"' in config and 'platform: "onnxruntime_onnx"' in config
    assert f'max_batch_size: {4 if dynamic else 0}\n' in config
    first = '' if dynamic else '2, '
    assert (
        f'{{ name: "images" data_type: TYPE_FP32 dims: [{first}3, 96, 96] }}' in config
    )
    assert f'name: "labels" data_type: TYPE_INT64 dims: [{first}60]' in config
    assert ('dynamic_batching' in config) is dynamic


def test_unknown_types_are_named(tmp_path: Path) -> None:
    save_graph(tmp_path / 'toy.onnx', 1, boxes_type=11)
    with pytest.raises(ValueError, match='boxes is of type float64'):
        write_config(tmp_path / 'toy.onnx', export_info())
