"""What TensorRT 10 does not take is named."""

import pytest

onnx = pytest.importorskip('onnx')

from onnx import TensorProto, helper  # noqa: E402

from mmbackbones.export.tensorrt_check import unsupported  # noqa: E402


def model(
    *nodes: object, elem_type: int = TensorProto.FLOAT, opset: int = 18
) -> object:
    """A graph from `x` to `y`."""
    graph = helper.make_graph(
        nodes,
        'g',
        [helper.make_tensor_value_info('x', elem_type, [1, 8])],
        [helper.make_tensor_value_info('y', TensorProto.UNDEFINED, None)],
        [helper.make_tensor('k', TensorProto.INT64, [1], [4000])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', opset)])


def test_what_is_supported_passes() -> None:
    assert unsupported(model(helper.make_node('Relu', ['x'], ['y']))) == []


@pytest.mark.parametrize(
    ('bad', 'reason'),
    [
        (model(helper.make_node('Bernoulli', ['x'], ['y'])), 'no operator Bernoulli'),
        (
            model(helper.make_node('Mine', ['x'], ['y'], domain='my')),
            'no operator my.Mine',
        ),
        (
            model(
                helper.make_node('Equal', ['x', 'x'], ['y']),
                elem_type=TensorProto.BOOL,
            ),
            'Equal on BOOL',
        ),
        (
            model(helper.make_node('TopK', ['x', 'k'], ['v', 'y'])),
            'TopK of 4000, at most 3839',
        ),
        (model(helper.make_node('Relu', ['x'], ['y']), opset=21), 'opset 21'),
        (
            model(helper.make_node('Resize', ['x', '', 'k'], ['y'], mode='cubic')),
            'Resize in mode cubic',
        ),
    ],
)
def test_what_is_not_is_named(bad: object, reason: str) -> None:
    assert any(reason in line for line in unsupported(bad)), unsupported(bad)
