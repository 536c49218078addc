"""State-dict conversion by a table of ordered, invertible rules.

Departs from the source: there is none; the idea of one literal table, with None for
what is dropped, is torchtitan's (https://github.com/pytorch/torchtitan, BSD-3-Clause).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = [
    'CONCAT_QKV',
    'ConversionReport',
    'KeyMap',
    'Rule',
    'Transform',
    'concatenation',
]

# What a placeholder stands for; one of any other name is refused.
_PLACEHOLDERS = {'leaf': r'[^.]+', 'path': r'.+'}


@dataclass(frozen=True)
class Transform:
    """What happens to the values of a rule, and how to undo it.

    Attributes:
        forward: from the tensors of the sources to those of the targets.
        inverse: the other way round.
    """

    forward: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    inverse: Callable[[Sequence[Tensor]], Sequence[Tensor]]


def concatenation(num_parts: int) -> Transform:
    """Of tensors of equal size, along the first dimension."""
    return Transform(
        forward=lambda tensors: (torch.cat(tuple(tensors)),),
        inverse=lambda tensors: [part.clone() for part in tensors[0].chunk(num_parts)],
    )


CONCAT_QKV = concatenation(3)


@dataclass(frozen=True)
class Rule:
    """One row of a table: names there, names here.

    Names may hold placeholders: `{n}` or any other single letter is a number,
    `{leaf}` one part of a name without dots, `{path}` any rest of a name. Sources
    and targets hold the same placeholders.

    Without a transform, several names on one side are aliases of one tensor: any of
    them is enough to read, all of them are written. With a transform, all of them
    are needed.

    Attributes:
        sources: name or names in the state dict to convert; None for keys that only
            the result has.
        targets: name or names in the result; None for keys to drop.
        transform: None to keep the tensor.
        reason: why the keys are dropped; required where one side is None.
    """

    sources: str | tuple[str, ...] | None
    targets: str | tuple[str, ...] | None
    transform: Transform | None = None
    reason: str = ''

    def __post_init__(self) -> None:
        """Refuse a silent drop."""
        if (self.sources is None or self.targets is None) and not self.reason:
            raise ValueError(f'{self} drops keys; give a reason')

    def inverse(self) -> 'Rule':
        """The rule that undoes this one."""
        transform = self.transform and Transform(
            self.transform.inverse, self.transform.forward
        )
        return Rule(self.targets, self.sources, transform, self.reason)


@dataclass
class ConversionReport:
    """What a conversion did, apart from converting.

    Attributes:
        unmapped: keys that no rule knows.
        incomplete: keys whose rule needs others that are not there.
        dropped: key to reason.
        unused: rules that met no key. Not an error: a table serves all sizes of a
            family.
    """

    unmapped: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    unused: list[Rule] = field(default_factory=list)

    def raise_if_lossy(self) -> None:
        """Raise where keys were lost without a reason.

        Raises:
            ValueError: names them.
        """
        if self.unmapped or self.incomplete:
            raise ValueError(
                f'{len(self.unmapped)} keys match no rule: {self.unmapped[:10]}; '
                f'{len(self.incomplete)} lack their partners: {self.incomplete[:10]}'
            )


def _names(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def _pattern(name: str) -> re.Pattern[str]:
    """Regular expression with a named group for each placeholder."""
    text, seen = '', set()
    for literal, placeholder in re.findall(r'([^{]*)(?:\{(\w+)\})?', name):
        text += re.escape(literal)
        if not placeholder:
            continue
        if placeholder not in _PLACEHOLDERS and len(placeholder) > 1:
            raise ValueError(
                f'placeholder {{{placeholder}}} in {name!r}; choose one letter or '
                f'from {sorted(_PLACEHOLDERS)}'
            )
        if placeholder in seen:
            text += f'(?P={placeholder})'
        else:
            text += f'(?P<{placeholder}>{_PLACEHOLDERS.get(placeholder, r"[0-9]+")})'
        seen.add(placeholder)
    return re.compile(text)


def _check_aliases(keys: Sequence[str], state_dict: Mapping[str, Tensor]) -> None:
    for key in keys[1:]:
        if not torch.equal(state_dict[key], state_dict[keys[0]]):
            raise ValueError(
                f'{key} and {keys[0]} are names of one tensor, but their values differ'
            )


class KeyMap:
    """Ordered rules; the first that knows a key decides.

    Args:
        rules: special ones before general ones.
        newer_parts: parts of names, and what the rules call them. For sources that
            have renamed tensors in memory, but not in their files: the new names are
            read, the old ones written.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        newer_parts: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.rules = tuple(rules)
        self.newer_parts = tuple(newer_parts)
        self._patterns = [
            [_pattern(name) for name in _names(rule.sources)] for rule in self.rules
        ]

    def inverse(self) -> 'KeyMap':
        """The map that undoes this one, but for what is dropped."""
        return KeyMap([rule.inverse() for rule in self.rules])

    def convert(
        self, state_dict: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], ConversionReport]:
        """Rename, and transform where a rule says so.

        Args:
            state_dict: its tensors are shared with the result where they stay as
                they are.

        Returns:
            The converted state dict, and what did not make it.

        Raises:
            ValueError: two names of one tensor have different values; two tensors
                would have the same name.
        """
        # (rule, placeholder values) -> {index of the source name: key}
        groups: dict[tuple[int, tuple], dict[int, str]] = {}
        report = ConversionReport()
        for key in state_dict:
            match = self._match(key)
            if match is None:
                report.unmapped.append(key)
            else:
                rule_index, name_index, values = match
                group = groups.setdefault((rule_index, values), {})
                if name_index in group:  # under the new name and the old one
                    _check_aliases((key, group[name_index]), state_dict)
                group[name_index] = key

        result: dict[str, Tensor] = {}
        origin: dict[str, str] = {}  # name in the result -> first of its sources
        used = set()
        for (rule_index, values), keys in groups.items():
            rule = self.rules[rule_index]
            used.add(rule_index)
            if rule.targets is None:
                report.dropped.update(dict.fromkeys(keys.values(), rule.reason))
                continue
            targets = [name.format(**dict(values)) for name in _names(rule.targets)]
            ordered = [keys[i] for i in sorted(keys)]
            if twice := origin.keys() & set(targets):
                name = min(twice)
                raise ValueError(f'{origin[name]} and {ordered[0]} both become {name}')
            if rule.transform is None:
                _check_aliases(ordered, state_dict)
                result.update(dict.fromkeys(targets, state_dict[ordered[0]]))
            elif len(keys) < len(_names(rule.sources)):
                report.incomplete.extend(ordered)
            else:
                tensors = rule.transform.forward([state_dict[key] for key in ordered])
                result.update(zip(targets, tensors, strict=True))
            origin.update(dict.fromkeys(targets, ordered[0]))
        report.unused = [
            rule
            for i, rule in enumerate(self.rules)
            if i not in used and rule.sources is not None
        ]
        return result, report

    def _match(self, key: str) -> tuple[int, int, tuple] | None:
        for new, old in self.newer_parts:
            key = key.replace(new, old)
        for rule_index, patterns in enumerate(self._patterns):
            for name_index, pattern in enumerate(patterns):
                if match := pattern.fullmatch(key):
                    values = tuple(sorted(match.groupdict().items()))
                    return rule_index, name_index, values
        return None
