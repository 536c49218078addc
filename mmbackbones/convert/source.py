"""One way of naming the tensors of a family of networks.

Departs from the source: there is none.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from mmbackbones.convert.keymap import KeyMap

__all__ = ['APACHE', 'NON_COMMERCIAL', 'Source']

APACHE, NON_COMMERCIAL = 'Apache-2.0', 'CC BY-NC 4.0'


@dataclass(frozen=True)
class Source:
    """Names that some makers of weights use.

    Attributes:
        family: our class.
        makers: short names of those who publish weights in this form.
        table: from these names to ours; or a function from a state dict, under
            either names, to the table.
        marks: regular expressions; names of this source match each of them.
        licence: of the published weights.
        prefixes: what may stand before each name, the one to write first.
        note: what else the user of these weights has to know.
    """

    family: str
    makers: tuple[str, ...]
    table: KeyMap | Callable[[Mapping[str, Tensor]], KeyMap]
    marks: tuple[str, ...]
    licence: str
    prefixes: tuple[str, ...] = ('',)
    note: str = ''

    def __str__(self) -> str:
        """What the weights are, and on what terms."""
        lines = [
            f'{self.family} (names: {", ".join(self.makers)})',
            f'licence of the published weights: {self.licence}',
            *([self.note] if self.note else []),
        ]
        return '; '.join(lines)

    def table_for(self, state_dict: Mapping[str, Tensor]) -> KeyMap:
        """The table of this state dict, under either names."""
        return self.table if isinstance(self.table, KeyMap) else self.table(state_dict)

    def find_prefix(self, names: Iterable[str]) -> str | None:
        """What stands before the names; None if they are of another source."""
        lines = '\n'.join(names)
        for prefix in self.prefixes:
            start = rf'^{re.escape(prefix)}'
            if all(
                re.search(f'{start}(?:{mark})$', lines, re.MULTILINE)
                for mark in self.marks
            ):
                return prefix
        return None
