"""Trained weights out of an ONNX file of DEIMv2 with HGNetV2, into a checkpoint.

    python tests/onnx_weights.py deimv2_hgnetv2_atto_coco.onnx \
        configs/deimv2_hgnetv2_atto_coco.py atto.pth
    python tools/test.py configs/deimv2_hgnetv2_atto_coco.py atto.pth

Upstream's export is of the deployed model: batch norms are folded, blocks fused, most
names lost, and heads that only training uses are gone. What is left comes in the order
of execution. Our model runs once, its modules note the order in which they compute,
and the two orders are laid side by side: kinds and shapes have to agree throughout,
names where both have any, and nothing may be left over on either side.

The checkpoint has the training form, which `switch_to_deploy` takes back to that of
the file: a norm has a mean of 0, a variance of 1 and the folded bias, the 1x1 branch
of a RepVGG block is zero. It evaluates as the file does. It is no point to train from,
since the statistics that the norms had are lost.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnx
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from onnx import numpy_helper
from torch import Tensor, nn

import mmbackbones  # noqa: F401  (registers)
from mmbackbones.layers.attention import DeformableAttention, SelfAttention
from mmbackbones.layers.conv import LearnableAffine
from mmbackbones.layers.norm import FrozenBatchNorm2d, RMSNorm
from mmbackbones.layers.position import sincos_position_2d
from mmbackbones.layers.reparam import RepVGGBlock
from mmbackbones.ops.distribution import weighting_function

_NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)
# Training's alone, but deployment keeps it.
_EMBEDDING = 'decoder.denoising_class_embed.weight'
_NAMED = re.compile(r'^(?:model\.)?((?:backbone|encoder|decoder)\..+)\.\w+$')


@dataclass
class Use:
    """One operation with parameters.

    Attributes:
        kind: conv, linear, affine (two scalars), scale or layer_norm.
        values: of the file, in the layout of torch; of ours, the shapes alone.
        where: node of the file, or module of ours.
        paths: modules that the file's names of the values speak of, if they do.
        write: puts values into our module.
    """

    kind: str
    values: list[np.ndarray]
    where: str
    paths: set[str] = field(default_factory=set)
    write: Callable[..., None] | None = None

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [v.shape if isinstance(v, np.ndarray) else v for v in self.values]

    def __str__(self) -> str:
        return f'{self.kind} {self.shapes} at {self.where}'


class Graph:
    """Constants of a file and its operations with parameters, in order."""

    def __init__(self, path: str | Path) -> None:
        self.graph = onnx.load(str(path)).graph
        self.constants = {
            t.name: numpy_helper.to_array(t) for t in self.graph.initializer
        }
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        self.origin: dict[str, str] = {}  # of folded constants
        for node in self.graph.node:
            self._fold(node)
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.used: set[str] = set()
        self.uses = [use for node in self.graph.node for use in self._uses(node)]

    def _fold(self, node: onnx.NodeProto) -> None:
        """What exporters leave between a constant and its use."""
        known = [self.constants.get(name) for name in node.input]
        if node.op_type == 'Constant':
            value = next((a.t for a in node.attribute if a.name == 'value'), None)
            if value is not None:
                self.constants[node.output[0]] = numpy_helper.to_array(value)
        elif node.op_type in ('Identity', 'Transpose') and known[0] is not None:
            perm = next((a.ints for a in node.attribute if a.name == 'perm'), None)
            value = known[0] if node.op_type == 'Identity' else known[0].transpose(perm)
            self.constants[node.output[0]] = value
            self.origin[node.output[0]] = self.origin.get(node.input[0], node.input[0])

    def _uses(self, node: onnx.NodeProto) -> Iterator[Use]:
        if node.op_type == 'Conv' and node.input[1] in self.constants:
            use = self._use('conv', node, node.input[1:])
            if len(use.values) == 1:
                self._fold_frozen_norm(use, node)
            yield use
        elif node.op_type == 'MatMul' and self._ndim(node.input[1]) == 2:
            bias = self._added_to(node)
            yield self._use('linear', node, [node.input[1], *bias], transposed=True)
        elif node.op_type == 'Gemm' and self._ndim(node.input[1]) == 2:
            options = {a.name: a for a in node.attribute}
            keeps = 'transB' in options and options['transB'].i == 1
            if any(options[n].f != 1 for n in ('alpha', 'beta') if n in options):
                raise ValueError(f'{node.name}: Gemm with alpha or beta')
            yield self._use('linear', node, node.input[1:], transposed=not keeps)
        elif node.op_type == 'LayerNormalization':
            yield self._use('layer_norm', node, node.input[1:])
        elif node.op_type == 'Mul':
            for name in node.input:
                if self._shape(name) == (1,) and (bias := self._added_to(node)):
                    yield self._use('affine', node, [name, *bias])
                elif self._ndim(name) == 1 and self._shape(name) > (1,):
                    bias = self._added_to(node)  # of a layer norm, before opset 17
                    kind = 'layer_norm' if bias else 'scale'
                    yield self._use(kind, node, [name, *bias])

    def _fold_frozen_norm(self, use: Use, conv: onnx.NodeProto) -> None:
        """A norm of constants comes as a product and a sum for each channel."""
        node, channels = conv, len(use.values[0])
        for op_type in ('Mul', 'Add'):
            consumers = self.consumers.get(node.output[0], [])
            if [c.op_type for c in consumers] != [op_type]:
                return
            node = consumers[0]
            names = [n for n in node.input if self._shape(n) == (1, channels, 1, 1)]
            self.used.update(self.origin.get(name, name) for name in names)
            for value in (self.constants[n].reshape(-1) for n in names):
                if op_type == 'Mul':
                    use.values[0] = use.values[0] * value[:, None, None, None]
                else:
                    use.values.append(value)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        value = self.constants.get(name)
        return None if value is None or value.dtype.kind != 'f' else value.shape

    def _ndim(self, name: str) -> int | None:
        shape = self._shape(name)
        return None if shape is None else len(shape)

    def _added_to(self, node: onnx.NodeProto) -> list[str]:
        """The vector that is added to the result of a node, and nothing else done."""
        consumers = self.consumers.get(node.output[0], [])
        if [c.op_type for c in consumers] != ['Add']:
            return []
        return [name for name in consumers[0].input if self._ndim(name) == 1]

    def _use(
        self,
        kind: str,
        node: onnx.NodeProto,
        names: list[str],
        *,
        transposed: bool = False,
    ) -> Use:
        names = list(filter(None, names))
        self.used.update(self.origin.get(name, name) for name in names)
        values = [self.constants[name].astype(np.float32) for name in names]
        if transposed:
            values[0] = values[0].T
        # A tensor of several uses may have the name of any.
        paths = {
            found[1]
            for name in names
            if (found := _NAMED.match(name)) and len(self.consumers[name]) == 1
        }
        return Use(kind, values, node.name or node.output[0], paths)

    def leftovers(self) -> dict[str, np.ndarray]:
        """Floating initialisers of several numbers that no operation above has."""
        return {
            t.name: value
            for t in self.graph.initializer
            if t.name not in self.used
            and (value := self.constants[t.name]).dtype.kind == 'f'
            and value.size > 1
            and not any(
                node.op_type == 'Resize' for node in self.consumers.get(t.name, ())
            )
        }


def module_uses(model: nn.Module, image: Tensor) -> list[Use]:
    """Operations with parameters of our model in evaluation, in order."""
    calls: list[tuple[str, nn.Module]] = []
    blocks = tuple(
        f'{n}.' for n, m in model.named_modules() if isinstance(m, RepVGGBlock)
    )
    leaves = (
        nn.Conv2d, nn.Linear, nn.LayerNorm, RMSNorm, LearnableAffine, RepVGGBlock,
        SelfAttention, *_NORMS,
    )  # fmt: skip
    handles = [
        module.register_forward_pre_hook(
            lambda m, _, name=name: calls.append((name, m))
        )
        for name, module in model.named_modules()
        if isinstance(module, leaves) and not name.startswith(blocks or ('\0',))
    ]
    with torch.no_grad():
        model.eval()._forward(image)
    for handle in handles:
        handle.remove()
    uses: list[Use] = []
    for i, (name, module) in enumerate(calls):
        after = calls[i + 1][1] if i + 1 < len(calls) else None
        uses += _uses_of(name, module, after)
    return uses


def _uses_of(name: str, module: nn.Module, after: nn.Module | None) -> list[Use]:
    if isinstance(module, _NORMS):
        return []  # with its convolution
    if isinstance(module, nn.Conv2d):
        norm = after if isinstance(after, _NORMS) else None
        values = [module.weight, module.weight[:, 0, 0, 0]]
        kind = 'conv'

        def write(weight: Tensor, bias: Tensor) -> None:
            _write_conv(module, norm, weight, bias)
    elif isinstance(module, RepVGGBlock):
        first, second = module.conv1, module.conv2
        values, kind = [first.conv.weight, first.norm.bias], 'conv'

        def write(weight: Tensor, bias: Tensor) -> None:
            _write_conv(first.conv, first.norm, weight, bias)
            zeros = torch.zeros_like(second.conv.weight)
            _write_conv(second.conv, second.norm, zeros, zeros[:, 0, 0, 0])
    elif isinstance(module, SelfAttention):
        parts = zip(
            module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True
        )
        return [_copying('linear', name, list(part)) for part in parts]
    else:
        kind = {
            nn.Linear: 'linear', nn.LayerNorm: 'layer_norm', RMSNorm: 'scale',
            LearnableAffine: 'affine',
        }[type(module)]  # fmt: skip
        return [_copying(kind, name, list(module.parameters()))]
    return [Use(kind, [tuple(v.shape) for v in values], name, write=write)]


def _copying(kind: str, name: str, own: list[Tensor]) -> Use:
    def write(*values: Tensor) -> None:
        for parameter, value in zip(own, values, strict=True):
            if not parameter.isnan().any() and not torch.equal(parameter, value):
                raise ValueError(f'{name} is shared, but its values differ')
            parameter.copy_(value)

    return Use(kind, [tuple(p.shape) for p in own], name, write=write)


def _write_conv(
    conv: nn.Conv2d, norm: nn.Module | None, weight: Tensor, bias: Tensor
) -> None:
    conv.weight.copy_(weight)
    if norm is None:
        conv.bias.copy_(bias)
        return
    norm.weight.fill_(1)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)  # so that the divisor is 1
    norm.bias.copy_(bias)


@torch.no_grad()
def load(path: str | Path, model: nn.Module) -> list[str]:
    """Fill a model with the weights of a file.

    Args:
        path: of the ONNX file.
        model: our detector in its training form.

    Returns:
        Parameters that only training uses, which no such file has. They keep their
        values.

    Raises:
        ValueError: the file is not of this model.
    """
    graph = Graph(path)
    own = module_uses(model, torch.zeros(1, 3, *input_size(graph.graph)))
    constants = _known_constants(model)
    deployed = deepcopy(model)
    deployed.switch_to_deploy()
    needed = {name for name, _ in deployed.named_parameters()} - {_EMBEDDING}

    kept = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    for theirs, ours in zip_longest(graph.uses, own):
        _compare(theirs, ours)
        ours.write(*(torch.from_numpy(np.ascontiguousarray(v)) for v in theirs.values))
    for name, value in graph.leftovers().items():
        if value.shape == model.decoder.anchors.shape:
            anchors = torch.from_numpy(value.copy())
            model.decoder.load_state_dict(dict(anchors=anchors), strict=False)
        if not any(_same(value, constant) for constant in constants):
            raise ValueError(f'{name} {value.shape} of the file has no place in ours')
    unfilled = [n for n, p in model.named_parameters() if p.isnan().any()]
    for name in unfilled:
        model.get_parameter(name).copy_(kept[name])
    given = {'decoder.up', 'decoder.reg_scale'}  # by the config; bins were compared
    run = tuple(f'{use.where}.' for use in own)
    missing = {n for n in unfilled if n in needed or n.startswith(run)} - given
    if missing:
        raise ValueError(f'the file does not fill {sorted(missing)}')
    return [name for name in unfilled if name not in given]


def input_size(graph: onnx.GraphProto) -> tuple[int, int]:
    """Height and width of the images that a file takes."""
    shape = next(i for i in graph.input if i.name == 'images').type.tensor_type.shape
    return shape.dim[2].dim_value, shape.dim[3].dim_value


def _compare(theirs: Use | None, ours: Use | None) -> None:
    if theirs is None or ours is None or theirs.kind != ours.kind:
        raise ValueError(f'the file has {theirs} where the model has {ours}')
    if theirs.shapes != ours.shapes:
        raise ValueError(f'the file has {theirs} where the model has {ours}')
    path = ours.where.removesuffix('.conv')
    for name in theirs.paths:
        if name.removesuffix('.conv_bn_fused').removesuffix('.conv') != path:
            raise ValueError(f'by order {ours.where} gets what the file calls {name}')


def _known_constants(model: nn.Module) -> list[np.ndarray]:
    """What a file holds beside parameters, as the config states or implies it."""
    decoder = model.decoder
    found = [
        decoder.anchors,
        decoder.valid_mask.float(),
        weighting_function(decoder.reg_max, decoder.up, decoder.reg_scale),
    ]
    for module in decoder.modules():
        if isinstance(module, DeformableAttention):
            found.append(module.num_points_scale[:, None])
    dim = decoder.hidden_dim
    for height, width in decoder.anchor_sizes_hw:
        if dim % 4 == 0:
            found.append(sincos_position_2d(height, width, dim))
    return [value.detach().numpy() for value in found]


def _same(value: np.ndarray, constant: np.ndarray) -> bool:
    """Whether they are about equal; a logit that means a border may be infinite.

    Upstream averages its anchors like weights, which costs them some digits.
    """
    if value.ndim < constant.ndim or value.shape[-1] != constant.shape[-1]:
        return False
    bounded = np.clip(value, None, 1e4)
    try:
        return bool(np.abs(bounded - constant).max() < 1e-3)
    except ValueError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('onnx', help='exported by the official code')
    parser.add_argument('config', help='ours, of the same size')
    parser.add_argument('out', help='checkpoint to be written')
    args = parser.parse_args()
    config = Config.fromfile(args.config)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    left = load(args.onnx, model)
    state = {k: v for k, v in model.state_dict().items() if k not in left}
    torch.save(dict(state_dict=state, meta=dict(source=args.onnx)), args.out)
    print(
        f'{args.out}: {len(state)} tensors. The file lacks what only training uses: '
        f'{", ".join(left)}'
    )


if __name__ == '__main__':
    main()
