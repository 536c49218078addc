"""Optimiser groups by parameter name, one group per set of options.

Upstream: the option names are those of mmengine's `DefaultOptimWrapperConstructor`
and of mmpretrain's layer-wise decay (https://github.com/open-mmlab, Apache-2.0).
Departs from the source:
- parameters with the same options share one group (mmengine makes a group of each
  tensor, which costs a fifth of a training step);
- rules are regular expressions, the first match wins, and one that matches nothing
  is an error;
- what is not decayed is told by shape and name, since GRN, LAB and layer scale are
  no norm classes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from torch import Tensor, nn

from mmbackbones.engine.fused_clip import fuse_clipping
from mmbackbones.registry import OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ['ParamGroup', 'ParamGroupConstructor', 'assign_groups']

_RULE_KEYS = {'name', 'match', 'lr_mult', 'decay_mult', 'optional'}


@dataclass
class ParamGroup:
    """Trainable parameters that share their options.

    Attributes:
        name: of the rule, with `_depth<d>` and `_no_decay` where these apply.
        lr_mult: factor on the optimiser's learning rate.
        decay_mult: factor on the optimiser's weight decay.
        parameters: by name, in the model's order.
    """

    name: str
    lr_mult: float
    decay_mult: float
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


def assign_groups(
    model: nn.Module,
    groups: Sequence[dict] = (),
    *,
    layer_decay: float | None = None,
    decay_vectors: bool = True,
) -> list[ParamGroup]:
    """Sort a model's trainable parameters into groups.

    Args:
        model: not wrapped.
        groups: rules, tried in order; the first whose regular expression `match` is
            found in a parameter's name (`re.search`) has it. `name` and `match` are
            required; `lr_mult` and `decay_mult` default to 1; a rule with
            `optional=True` may match nothing. What no rule has is in group `rest`.
        layer_decay: factor between neighbouring depths of the backbone, in (0, 1];
            the learning rate of depth d out of n is multiplied by
            `layer_decay ** (n - 1 - d)`, as `model.backbone.get_layer_depth` counts.
        decay_vectors: False exempts from decay, whatever the rule: tensors with one
            dimension (norms, biases, layer scale, LAB), GRN's `(1, 1, 1, C)`, and
            position tables (`pos_embed` in the name).

    Returns:
        Groups that are not empty, in order of the rules, `rest` last; shallow
        depths first. Two of them with the same options become one, named `a+b`.

    Raises:
        ValueError: a rule that matches no parameter, trainable or not; bad or
            repeated names or keys of a rule; no depths in this backbone.
    """
    rules = _check_rules(groups)
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f'layer_decay is {layer_decay}; give a factor in (0, 1]')
    depth_of = None if layer_decay is None else _depth_source(model)
    matched = dict.fromkeys((rule['name'] for rule in rules), False)
    found: dict[tuple, ParamGroup] = {}
    for name, parameter in model.named_parameters():
        order = next(
            (i for i, rule in enumerate(rules) if re.search(rule['match'], name)),
            len(rules),
        )
        rule = rules[order] if order < len(rules) else dict(name='rest')
        matched[rule['name']] = True
        if not parameter.requires_grad:
            continue
        label, depth = rule['name'], -1  # no depth: not of the backbone
        lr_mult, decay_mult = rule.get('lr_mult', 1.0), rule.get('decay_mult', 1.0)
        if depth_of is not None and name.startswith('backbone.'):
            depth, num_depths = depth_of(name, 'backbone.')
            lr_mult *= layer_decay ** (num_depths - 1 - depth)
            label += f'_depth{depth}'
        exempt = not decay_vectors and decay_mult and _is_vector(name, parameter)
        if exempt:
            decay_mult = 0.0
            label += '_no_decay'
        key = (order, depth, exempt)
        group = found.setdefault(key, ParamGroup(label, lr_mult, decay_mult))
        group.parameters[name] = parameter
    _check_matched(rules, matched)
    return _merge([found[key] for key in sorted(found)])


def _check_rules(groups: Sequence[dict]) -> list[dict]:
    rules = [dict(rule) for rule in groups]
    for i, rule in enumerate(rules):
        missing, unknown = {'name', 'match'} - set(rule), set(rule) - _RULE_KEYS
        if missing or unknown:
            raise ValueError(
                f'groups[{i}] is {rule}: '
                + (f'it lacks {sorted(missing)}' if missing else '')
                + (f'it has unknown keys {sorted(unknown)}' if unknown else '')
                + f'; a rule has {sorted(_RULE_KEYS)}'
            )
    names = [rule['name'] for rule in rules] + ['rest']
    if len(set(names)) < len(names):
        raise ValueError(
            f'group names are {names}; each is used once, "rest" is what no rule has'
        )
    return rules


def _check_matched(rules: list[dict], matched: dict[str, bool]) -> None:
    idle = [
        rule
        for rule in rules
        if not matched[rule['name']] and not rule.get('optional', False)
    ]
    if idle:
        raise ValueError(
            'no parameter of the model is left for '
            + ', '.join(f'group {rule["name"]!r} ({rule["match"]!r})' for rule in idle)
            + '; correct the expression or the order, or mark it optional=True'
        )


def _depth_source(model: nn.Module):
    depth_of = getattr(getattr(model, 'backbone', None), 'get_layer_depth', None)
    if depth_of is None:
        raise ValueError(
            f'layer_decay needs {type(model).__name__}.backbone.get_layer_depth, '
            'which this model lacks'
        )
    return depth_of


def _is_vector(name: str, parameter: Tensor) -> bool:
    leading = parameter.shape[:-1]
    is_grn = len(leading) == 3 and leading.numel() == 1
    return parameter.ndim <= 1 or is_grn or 'pos_embed' in name


def _merge(groups: list[ParamGroup]) -> list[ParamGroup]:
    merged: dict[tuple[float, float], ParamGroup] = {}
    for group in groups:
        first = merged.setdefault((group.lr_mult, group.decay_mult), group)
        if first is not group:
            first.name += f'+{group.name}'
            first.parameters.update(group.parameters)
    return list(merged.values())


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ParamGroupConstructor:
    """Builds optimiser and wrapper with the groups of `assign_groups`.

        optim_wrapper=dict(
            type=AmpOptimWrapper,
            constructor=ParamGroupConstructor,
            optimizer=dict(type=AdamW, lr=2.5e-4, weight_decay=1.25e-4, fused=True),
            paramwise_cfg=dict(groups=[dict(name=..., match=..., lr_mult=...)]))

    Logs one table of the groups. Every group of the optimiser carries its `name`.

    Args:
        optim_wrapper_cfg: config of the wrapper, with `optimizer`.
        paramwise_cfg: arguments of `assign_groups`.

    Raises:
        ValueError: unknown keys, no `optimizer`, or no `lr`/`weight_decay` to scale.
    """

    def __init__(
        self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None
    ) -> None:
        self.wrapper_cfg = dict(optim_wrapper_cfg)
        if 'optimizer' not in self.wrapper_cfg:
            raise ValueError('optim_wrapper has no optimizer; give its config')
        self.optimizer_cfg = dict(self.wrapper_cfg.pop('optimizer'))
        self.paramwise_cfg = dict(paramwise_cfg or {})
        known = {'groups', 'layer_decay', 'decay_vectors'}
        if unknown := set(self.paramwise_cfg) - known:
            raise ValueError(
                f'paramwise_cfg has {sorted(unknown)}; ParamGroupConstructor knows '
                f'{sorted(known)}'
            )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """The wrapper for `model`, which may be wrapped itself (DDP)."""
        if is_model_wrapper(model):
            model = model.module
        groups = assign_groups(model, **self.paramwise_cfg)
        options = [
            dict(
                params=list(group.parameters.values()),
                name=group.name,
                **self._scaled('lr', group.lr_mult),
                **self._scaled('weight_decay', group.decay_mult),
            )
            for group in groups
        ]
        _log_table(model, options)
        optimizer = OPTIMIZERS.build({**self.optimizer_cfg, 'params': options})
        wrapper = OPTIM_WRAPPERS.build(
            {'type': 'OptimWrapper', **self.wrapper_cfg, 'optimizer': optimizer}
        )
        fuse_clipping(wrapper)
        return wrapper

    def _scaled(self, key: str, factor: float) -> dict[str, float]:
        """The group's own value of an option; nothing where it is the common one."""
        if key in self.optimizer_cfg:
            return {key: self.optimizer_cfg[key] * factor}
        if factor != 1:
            raise ValueError(
                f'optimizer.{key} is not set, but a parameter group scales it by '
                f'{factor}'
            )
        return {}


def _log_table(model: nn.Module, options: list[dict]) -> None:
    rows = [('group', 'tensors', 'elements', 'lr', 'weight decay')]
    for group in options:
        rows.append(
            (
                group['name'],
                str(len(group['params'])),
                f'{sum(p.numel() for p in group["params"]):,}',
                f'{group["lr"]:g}' if 'lr' in group else 'default',
                f'{group["weight_decay"]:g}' if 'weight_decay' in group else 'default',
            )
        )
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if frozen:
        numel = sum(p.numel() for p in frozen)
        rows.append(('(frozen)', str(len(frozen)), f'{numel:,}', '-', '-'))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(map(str.ljust, row, widths)).rstrip() for row in rows]
    print_log('Parameter groups:\n  ' + '\n  '.join(lines), logger='current')
