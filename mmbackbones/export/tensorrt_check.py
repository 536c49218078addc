"""Whether TensorRT 10 takes an ONNX file, said without a GPU.

Source: https://github.com/onnx/onnx-tensorrt docs/operators.md, ONNX-TensorRT
10.1 (Apache-2.0), which lists operators with the types they support.
"""

from pathlib import Path
from types import ModuleType

from mmbackbones.export.onnx_file import need
from mmbackbones.inference.metadata import ExportInfo

__all__ = ['check_for_tensorrt', 'unsupported']

_FLOATS = frozenset(('FLOAT', 'FLOAT16', 'BFLOAT16'))
_NUMBERS = _FLOATS | {'INT32', 'INT64'}
_TRUTH = frozenset(('BOOL',))

_TYPES = {
    **dict.fromkeys(
        (
            'Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater '
            'GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod Mul Neg Pad '
            'Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax '
            'ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Scatter '
            'ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK'
        ).split(),
        _NUMBERS,
    ),
    **dict.fromkeys(
        (
            'Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil '
            'Celu Clip Conv ConvTranspose Cos Cosh CumSum Dropout Einsum Elu Erf '
            'Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool '
            'GroupNormalization HardSigmoid HardSwish Hardmax ImageScaler '
            'InstanceNormalization IsInf LRN LSTM LayerNormalization LeakyRelu Log '
            'LogSoftmax LpNormalization LpPool MatMul MaxPool '
            'MeanVarianceNormalization PRelu ParametricSoftplus Pow QuantizeLinear '
            'RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike '
            'Reciprocal Resize Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax '
            'Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample'
        ).split(),
        _FLOATS,
    ),
    **dict.fromkeys(('And', 'Not', 'Or', 'Xor'), _TRUTH),
    **dict.fromkeys(
        (
            'Cast CastLike Concat Constant ConstantOfShape Expand EyeLike Flatten '
            'Gather GatherElements GatherND Identity If Loop OneHot Reshape '
            'ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu '
            'Unsqueeze Where'
        ).split(),
        _NUMBERS | _TRUTH,
    ),
    **dict.fromkeys(
        'DeformConv GridSample Mish NonMaxSuppression NonZero RoiAlign'.split(),
        _FLOATS - {'BFLOAT16'},
    ),
}
"""Types of an operator's data; operators that are missing are not supported."""

_MAX_TOPK = 3839  # docs/operators.md: less than 3840
_MAX_OPSET = 20


def unsupported(model: object) -> list[str]:
    """What TensorRT 10 would refuse in an `onnx.ModelProto`; empty if nothing."""
    onnx = need('onnx', 'the check for TensorRT')
    foreign = [
        f'{node.name}: no operator {node.domain}.{node.op_type}'
        for node in model.graph.node
        if node.domain not in ('', 'ai.onnx')
    ]
    if foreign:  # whose types nobody knows
        return foreign
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    types = {
        value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for tensor in graph.initializer:
        types[tensor.name] = onnx.TensorProto.DataType.Name(tensor.data_type)
    found = [
        f'opset {entry.version}, the parser reads up to {_MAX_OPSET}'
        for entry in model.opset_import
        if entry.domain in ('', 'ai.onnx') and entry.version > _MAX_OPSET
    ]
    for node in graph.node:
        if node.op_type not in _TYPES:
            found.append(f'{node.name}: no operator {node.op_type}')
            continue
        # A condition comes before the data of Where.
        data = node.input[1 if node.op_type == 'Where' else 0] if node.input else ''
        if types.get(data, 'FLOAT') not in _TYPES[node.op_type]:
            found.append(f'{node.name}: {node.op_type} on {types[data]}')
        resize = _attribute(onnx, node, 'mode')
        if node.op_type == 'Resize' and resize not in (None, b'nearest', b'linear'):
            found.append(f'{node.name}: Resize in mode {resize.decode()}')
        if node.op_type == 'TopK' and node.input[1] in constants:
            k = int(onnx.numpy_helper.to_array(constants[node.input[1]]).item())
            if k > _MAX_TOPK:
                found.append(f'{node.name}: TopK of {k}, at most {_MAX_TOPK}')
    return found


def _attribute(onnx: ModuleType, node: object, name: str) -> object:
    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return None


def check_for_tensorrt(path: str | Path, info: ExportInfo) -> list[str]:
    """Check an ONNX file.

    Args:
        path: of the file.
        info: its metadata.

    Returns:
        Lines for the report: that it fits, and the command that builds the engine.

    Raises:
        ValueError: TensorRT 10 would refuse it, with all reasons.
    """
    onnx = need('onnx', 'the check for TensorRT')
    reasons = unsupported(onnx.load(str(path)))
    if reasons:
        raise ValueError(f'TensorRT 10 does not take {path}: ' + '; '.join(reasons))
    height, width = info.input_size_hw
    shapes = ''
    if info.dynamic_batch:
        shapes = ''.join(
            f' --{which}Shapes=images:{n}x3x{height}x{width}'
            for which, n in (('min', 1), ('opt', 8), ('max', 32))
        )
    engine = Path(path).with_suffix('.engine')
    return [
        'every operator and type is one that TensorRT 10 takes; no engine was built',
        f'to build one: trtexec --onnx={path} --saveEngine={engine} --fp16{shapes}',
    ]
