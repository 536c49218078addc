"""Half precision and integers: what stays in single precision is measured.

A node stays in fp32 if, on calibration images, anything it reads or writes leaves the
range of float16, or if half precision makes its output much worse than its inputs are.
"""

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mmbackbones.export.onnx_file import need
from mmbackbones.inference.metadata import ExportInfo, write_openvino_metadata

__all__ = ['LARGEST_HALF', 'fragile_nodes', 'quantise_openvino', 'to_half']

LARGEST_HALF = 65504.0

_WORSE = 10.0  # times the error of the inputs
_COARSE = 0.05  # error relative to the largest value that is worth a look
_CHUNK = 200  # tensors that are read back at once
_NUM_IMAGES = 4  # batches whose tensors are read back


def to_half(path: str | Path, batches: Iterator[np.ndarray]) -> list[str]:
    """Turn an ONNX file to float16 in place, except for what that would spoil.

    Input and outputs stay float32.

    Args:
        path: of the file.
        batches: images to calibrate with.

    Returns:
        Lines for the report: every node that stays in single precision, and why.
    """
    onnx = need('onnx', 'half precision')
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)), data_prop=True)
    _name_nodes(model)
    _unshare(model)
    images = [batch for batch, _ in zip(batches, range(_NUM_IMAGES), strict=False)]
    kept = fragile_nodes(model, images, lambda kept: _convert(model, kept))
    half = _convert(model, kept)
    onnx.checker.check_model(half, full_check=True)
    onnx.save(half, str(path))
    total = len(model.graph.node)
    lines = [
        f'{len(kept)} of {total} nodes stay in fp32, found on {len(images)} batches:'
    ]
    return lines + [f'  {name}: {why}' for name, why in kept.items()]


def _name_nodes(model: Any) -> None:
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f'{node.op_type}_{i}'


def _unshare(model: Any) -> None:
    """Give each node constants of its own.

    Of two nodes that share one, only one may stay in float32.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    seen: set[str] = set()
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name in constants and name in seen:
                copied = model.graph.initializer.add()
                copied.CopyFrom(constants[name])
                copied.name = node.input[i] = f'{name}.{node.name}.{i}'
            seen.add(name)


def _convert(model: Any, kept: dict[str, str]) -> Any:
    """A copy in float16 with float32 input and outputs.

    The converter of onnxconverter-common leaves nodes of two types where nodes that are
    kept meet others, so this does what little is needed for graphs of ours: constants
    of a node follow the node, and casts surround those that are kept.

    Args:
        model: `onnx.ModelProto` in float32; no constant belongs to two nodes.
        kept: names of nodes that stay in float32.
    """
    onnx = need('onnx', 'half precision')
    single, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    floating = _floating(onnx, model)
    model = copy.deepcopy(model)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[Any] = []

    def cast(name: str, to: int, new: str) -> str:
        nodes.append(onnx.helper.make_node('Cast', [name], [new], name=new, to=to))
        return new

    outputs = {value.name for value in graph.output if value.name in floating}
    for value in graph.input:
        cast(value.name, half, f'{value.name}.half')
    renamed = {value.name: f'{value.name}.half' for value in graph.input}
    singles: dict[str, str] = {}  # what would overflow on its way from kept to kept
    for node in graph.node:
        is_kept = node.name in kept
        for i, name in enumerate(node.input):
            if name not in floating or i in _ALWAYS_SINGLE.get(node.op_type, ()):
                continue
            if name in constants:
                if not is_kept:
                    _halve(onnx, constants[name])
                continue
            now = renamed.get(name, name)
            if is_kept and name in singles:
                now = singles[name]
            elif is_kept:
                now = cast(now, single, f'{node.name}.{i}.single')
            node.input[i] = now
        if node.op_type == 'Cast':
            for attribute in node.attribute:
                if attribute.name == 'to' and attribute.i == single and not is_kept:
                    attribute.i = half
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name in outputs:
                renamed[name] = node.output[i] = f'{name}.inside'
            if name in floating and is_kept:
                singles[name] = node.output[i]
                renamed[name] = cast(node.output[i], half, f'{name}.half')
    for name in sorted(outputs):
        cast(singles.get(name, renamed[name]), single, name)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model


_ALWAYS_SINGLE = {'Resize': (1, 2)}
"""Inputs whose type the operator fixes."""


def _floating(onnx: ModuleType, model: Any) -> set[str]:
    """Names of all float32 values."""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    single = onnx.TensorProto.FLOAT
    return {v.name for v in values if v.type.tensor_type.elem_type == single} | {
        tensor.name for tensor in graph.initializer if tensor.data_type == single
    }


def _halve(onnx: ModuleType, tensor: Any) -> None:
    if tensor.data_type != onnx.TensorProto.FLOAT:
        return
    values = onnx.numpy_helper.to_array(tensor).clip(-LARGEST_HALF, LARGEST_HALF)
    tensor.CopyFrom(
        onnx.numpy_helper.from_array(values.astype(np.float16), tensor.name)
    )


def fragile_nodes(model: Any, images: list[np.ndarray], convert: Any) -> dict[str, str]:
    """Names of nodes that have to stay in single precision, each with the reason.

    Args:
        model: `onnx.ModelProto` in float32, nodes named.
        images: batches to run.
        convert: makes the float16 model, given the nodes to keep.
    """
    single = _tensors(model, images)
    peaks = {name: np.abs(value).max() for name, value in single.items() if value.size}
    kept: dict[str, str] = {}
    for node in model.graph.node:
        peak = max((peaks.get(n, 0.0) for n in (*node.input, *node.output)), default=0)
        if peak > LARGEST_HALF:
            kept[node.name] = (
                f'{node.op_type} reaches {peak:.3g}, over {LARGEST_HALF:g}'
            )
    # What comes after a spoilt value shows only once that is mended.
    while worse := _spoilt(model, single, _tensors(convert(kept), images), kept):
        kept |= worse
    return kept


def _spoilt(
    model: Any,
    single: dict[str, np.ndarray],
    half: dict[str, np.ndarray],
    kept: dict[str, str],
) -> dict[str, str]:
    """Nodes whose outputs err much more than their inputs, beyond those kept."""
    errors = {name: _error(half[name], single[name]) for name in single if name in half}
    found = {}
    for node in model.graph.node:
        before = max((errors.get(name, 0.0) for name in node.input), default=0.0)
        after = max((errors.get(name, 0.0) for name in node.output), default=0.0)
        if node.name not in kept and not after <= max(_COARSE, _WORSE * before):
            found[node.name] = (
                f'{node.op_type} errs by {after:.2g}, inputs by {before:.2g}'
            )
    return found


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference relative to the largest value; infinite for NaN."""
    if found.shape != wanted.shape or not wanted.size:
        return 0.0
    gap = np.abs(found.astype(np.float32) - wanted).max()
    return float(gap / max(np.abs(wanted).max(), 1e-6)) if np.isfinite(gap) else np.inf


def _tensors(model: Any, images: list[np.ndarray]) -> dict[str, np.ndarray]:
    """All floating tensors of a model on the images, flat, by name.

    Sorted outputs change places between precisions, so what follows a TopK is compared
    by what it reaches, not by its order: values are sorted.
    """
    onnx = need('onnx', 'half precision')
    runtime = need('onnxruntime', 'half precision')
    names = [name for node in model.graph.node for name in node.output if name]
    found: dict[str, list[np.ndarray]] = {}
    options = runtime.SessionOptions()
    # As written: fused nodes would not show what is between them.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    inferred = onnx.shape_inference.infer_shapes(model)
    types = {v.name: v for v in (*inferred.graph.value_info, *inferred.graph.output)}
    floating = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    names = [
        name
        for name in names
        if name in types and types[name].type.tensor_type.elem_type in floating
    ]
    outputs = {value.name for value in model.graph.output}
    for start in range(0, len(names), _CHUNK):
        probe = copy.deepcopy(model)
        wanted = names[start : start + _CHUNK]
        probe.graph.output.extend(
            onnx.helper.make_tensor_value_info(
                name, types[name].type.tensor_type.elem_type, None
            )
            for name in wanted
            if name not in outputs
        )
        session = runtime.InferenceSession(
            probe.SerializeToString(), options, providers=['CPUExecutionProvider']
        )
        for batch in images:
            for name, value in zip(
                wanted, session.run(wanted, {'images': batch}), strict=True
            ):
                values = np.sort(value.astype(np.float32), axis=None)
                found.setdefault(name, []).append(_thin(values))
    return {name: np.concatenate(values) for name, values in found.items()}


def _thin(values: np.ndarray) -> np.ndarray:
    """At most some thousand of sorted values, the extremes among them."""
    if values.size <= 4096:
        return values
    index = np.linspace(0, values.size - 1, 4096).round().astype(np.int64)
    return values[index]


def quantise_openvino(
    path: str | Path, info: ExportInfo, batches: Iterator[np.ndarray]
) -> list[str]:
    """Quantise an OpenVINO file to 8 bits in place, by NNCF after training.

    Args:
        path: `.xml` of the file.
        info: metadata.
        batches: images to calibrate with.

    Returns:
        Lines for the report.
    """
    openvino = need('openvino', 'precision int8')
    nncf = need('nncf', 'precision int8')
    model = openvino.Core().read_model(str(path))
    images = list(batches)
    quantised = nncf.quantize(
        model,
        nncf.Dataset(images),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
        fast_bias_correction=True,
    )
    write_openvino_metadata(quantised, info)
    # Written elsewhere first: the old weights are mapped into memory.
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        new = Path(folder, 'int8.xml')
        openvino.save_model(quantised, str(new), compress_to_fp16=False)
        for suffix in ('.xml', '.bin'):
            new.with_suffix(suffix).replace(Path(path).with_suffix(suffix))
    count = sum(op.get_type_name() == 'FakeQuantize' for op in quantised.get_ops())
    return [f'int8: {count} quantisers, calibrated on {len(images)} batches']
