"""Where weights come from: recognised by their names, turned into ours and back.

Departs from the source: there is none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from mmbackbones.convert import (
    convnextv2,
    deimv2,
    dfine,
    hgnetv2,
    hiera,
    resnet_vd,
    rtdetr,
)
from mmbackbones.convert.keymap import KeyMap, Rule
from mmbackbones.convert.source import APACHE, Source

__all__ = [
    'SOURCES',
    'Conversion',
    'first_names',
    'from_ours',
    'recognise',
    'to_ours',
    'without_module',
]


# Where two fit, the first is meant.
SOURCES = (
    *rtdetr.SOURCES,
    *deimv2.SOURCES,
    Source(
        'DFINE',
        ('hf',),
        dfine.HUGGING_FACE,
        (r'model\.backbone\.model\.embedder\.stem1\.convolution\.weight',),
        APACHE,
    ),
    Source(
        'DFINE',
        ('ours', 'dfine'),
        KeyMap([Rule('{path}', '{path}')]),
        (r'backbone\.stem\.stem1\.conv\.weight', r'decoder\.dec_score_head\..+'),
        APACHE,
    ),
    *hgnetv2.SOURCES,
    *hiera.SOURCES,
    *convnextv2.SOURCES,
    *resnet_vd.SOURCES,
)


@dataclass(frozen=True)
class Conversion:
    """What became of the tensors of a source.

    Attributes:
        source: who names them so.
        num_tensors: of the result.
        dropped: name to reason.
    """

    source: Source
    num_tensors: int
    dropped: Mapping[str, str]

    def __str__(self) -> str:
        """A few lines; of dropped names the first."""
        lines = [
            f'{self.num_tensors} tensors of {self.source}; {len(self.dropped)} dropped'
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f'dropped, {r}: {first_names(names)}' for r, names in reasons.items()]
        return '\n  '.join(lines)


def first_names(names: Iterable[str], limit: int = 4) -> str:
    """The first of a list, and how many more."""
    names = list(names)
    more = f', and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more


def recognise(names: Iterable[str]) -> Source | None:
    """Whose names these are; None if nobody's."""
    names = list(names)
    return next((s for s in SOURCES if s.find_prefix(names) is not None), None)


def without_module(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Names without the `module.` that torch's wrappers put before all of them."""
    if not all(name.startswith('module.') for name in state_dict):
        return state_dict
    return {k.removeprefix('module.'): v for k, v in state_dict.items()}


def to_ours(
    state_dict: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Conversion | None]:
    """Weights from anywhere, under our names.

    Args:
        state_dict: weights of one network, `module.` before all names or not.

    Returns:
        The converted state dict, which shares what needs no change, and the report;
        where the names are nobody's, the state dict as it is, and None.

    Raises:
        ValueError: the source is known, but not all of its names; a tensor lacks
            another that it is to be joined with; or ours have no place for its values.
    """
    state_dict = without_module(state_dict)
    source = recognise(state_dict)
    if source is None:
        return dict(state_dict), None
    prefix = source.find_prefix(state_dict)
    stripped = {name.removeprefix(prefix): name for name in state_dict}
    theirs = {short: state_dict[name] for short, name in stripped.items()}
    result, report = source.table_for(theirs).convert(theirs)
    outside = [n for n in report.unmapped if not stripped[n].startswith(prefix)]
    reason = f'it is outside of {prefix!r}, where the backbone is'
    dropped = {**report.dropped, **dict.fromkeys(outside, reason)}
    report.unmapped = [n for n in report.unmapped if n not in dropped]
    try:
        report.raise_if_lossy()
    except ValueError as error:
        raise ValueError(
            f'the weights look like {source.family} (names: '
            f'{", ".join(source.makers)}), but {error}'
        ) from None
    return result, Conversion(source, len(result), dropped)


def from_ours(
    state_dict: Mapping[str, Tensor], maker: str
) -> tuple[dict[str, Tensor], Conversion]:
    """Our weights under another's names.

    Args:
        state_dict: with our names.
        maker: one of the `makers` of a source of this family.

    Returns:
        The converted state dict, which shares what needs no change, and the report.

    Raises:
        ValueError: names are not ours; the maker has no such family, or no such
            network of the family.
    """
    ours = recognise(state_dict)
    if ours is None or 'ours' not in ours.makers:
        raise ValueError(f'not under our names: {first_names(state_dict)}')
    family = [s for s in SOURCES if s.family == ours.family]
    sources = [s for s in family if maker in s.makers]
    if not sources:
        raise ValueError(
            f'{ours.family} has no form of {maker!r}; it has those of '
            f'{sorted({m for s in family for m in s.makers})}'
        )
    reasons = []
    for source in sources:
        result, report = source.table_for(state_dict).inverse().convert(state_dict)
        result = {source.prefixes[0] + name: value for name, value in result.items()}
        if report.unmapped or report.incomplete:
            lost = first_names([*report.unmapped, *report.incomplete])
            reasons.append(f'there is no name for {lost}')
        elif recognise(result) is not source:
            reasons.append(f'it would lack {" or ".join(source.marks)}')
        else:
            return result, Conversion(source, len(result), report.dropped)
    raise ValueError(f'{maker!r} has no {ours.family} like this: {"; ".join(reasons)}')
