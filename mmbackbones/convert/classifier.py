"""Names of the families' classifiers, to those of `ImageClassifier`.

Upstream: as in the tables of the backbones.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from mmbackbones.convert.sources import (
    Conversion,
    first_names,
    to_ours,
    without_module,
)

__all__ = ['classifier_to_ours']


def _names(**modules: str) -> dict[str, str]:
    """Names of weight and bias of modules, theirs to ours."""
    return {
        f'{theirs}.{leaf}': f'{ours}.{leaf}'
        for ours, theirs in modules.items()
        for leaf in ('weight', 'bias')
    }


_BELOW = 'backbone.'
# Heads of every maker; the first whose names are all there is meant.
HEADS = {
    'HGNetV2': (
        {'last_conv.weight': 'last_conv.weight', **_names(fc='fc')},  # PaddleClas
        {'head.last_conv.0.weight': 'last_conv.weight', **_names(fc='head.fc')},  # timm
        _names(fc='fc'),  # Hugging Face
    ),
    'Hiera': (
        _names(norm='norm', fc='head.projection'),  # official
        _names(norm='head.norm', fc='head.fc'),  # timm
        _names(norm='hiera.pooler.layernorm', fc='classifier'),  # Hugging Face
    ),
    'ConvNeXtV2': (
        _names(norm='norm', fc='head'),  # official
        _names(norm='head.norm', fc='head.fc'),  # timm
        _names(norm='convnextv2.layernorm', fc='classifier'),  # Hugging Face
        _names(norm='backbone.norm3', fc='head.fc'),  # mmpretrain
    ),
}
# HGNetV2's affine in the head exists only with that of the backbone.
_AFFINE = {
    f'{theirs}.{leaf}': f'lab.{leaf}'
    for theirs in ('lab', 'head.last_conv.2')
    for leaf in ('scale', 'bias')
}


def classifier_to_ours(
    state_dict: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Conversion]:
    """Weights of a published classifier, for `ImageClassifier`.

    Args:
        state_dict: as published by PaddleClas, timm, Hugging Face, mmpretrain or
            the authors.

    Returns:
        The state dict, `backbone.` and `head.` before its names, and the report on
        the backbone, for which the head's tensors are among the dropped ones.

    Raises:
        ValueError: the names are nobody's, or the file has no classifier.
    """
    state_dict = without_module(state_dict)
    below = {  # mmpretrain's files are of whole classifiers
        name.removeprefix(_BELOW): value
        for name, value in state_dict.items()
        if name.startswith(_BELOW)
    }
    converted, report = to_ours(below or state_dict)
    heads = HEADS.get(report.source.family) if report else None
    if heads is None:
        raise ValueError(
            f'no known classifier has these names: {first_names(state_dict)}'
        )
    table = next((names for names in heads if names.keys() <= state_dict.keys()), None)
    if table is None:
        raise ValueError(
            f'the weights of {report.source.family} have no classifier; it would be '
            + ' or '.join(first_names(names) for names in heads)
        )
    result = {
        f'{_BELOW}{name}': value
        for name, value in converted.items()
        if f'{_BELOW}{name}' not in table  # a norm of the head's
    }
    for theirs, ours in {**table, **_AFFINE}.items():
        if theirs in state_dict:
            value = state_dict[theirs]
            if ours == 'fc.weight' and 'paddle' in report.source.makers:
                value = value.T  # (in, out) there
            result[f'head.{ours}'] = value
    if below:
        outside = [name for name in state_dict if not name.startswith(_BELOW)]
        dropped = dict.fromkeys(outside, f'not below {_BELOW}')
        report = replace(report, dropped={**report.dropped, **dropped})
    return result, report
