"""Half precision of ONNX files: what overflows stays in single precision throughout."""

from pathlib import Path

import numpy as np
import pytest

from mmbackbones.export.precision import LARGEST_HALF, to_half

onnx = pytest.importorskip('onnx', reason='needs onnx')
onnxruntime = pytest.importorskip('onnxruntime', reason='needs onnxruntime')


@pytest.mark.parametrize('ends_large', [False, True])
def test_large_values_pass_between_nodes_that_stay(
    tmp_path: Path, ends_large: bool
) -> None:
    """Also where one of them is an output; float16 ends at 65504."""
    factors = (1e6, 1.0, 1e6 if ends_large else 1e-6)
    names = ['images', 'a', 'b', 'out']
    make = onnx.helper
    shape = (onnx.TensorProto.FLOAT, (2, 4))
    graph = make.make_graph(
        [
            make.make_node('Mul', [names[i], f'factor{i}'], [names[i + 1]])
            for i in range(3)
        ],
        'large',
        [make.make_tensor_value_info('images', *shape)],
        [make.make_tensor_value_info('out', *shape)],
        [
            onnx.numpy_helper.from_array(np.float32([factor]), f'factor{i}')
            for i, factor in enumerate(factors)
        ],
    )
    path = tmp_path / 'large.onnx'
    opset = [make.make_opsetid('', 17)]
    onnx.save(make.make_model(graph, opset_imports=opset, ir_version=9), str(path))
    images = np.linspace(0.1, 1, 8, dtype=np.float32).reshape(2, 4)
    notes = to_half(path, iter([images]))
    assert notes[0].startswith('3 of 3 nodes stay in fp32')
    session = onnxruntime.InferenceSession(str(path))
    (found,) = session.run(None, {'images': images})
    assert (found.max() > LARGEST_HALF) == ends_large
    np.testing.assert_allclose(found, images * np.prod(factors), rtol=2e-3)
